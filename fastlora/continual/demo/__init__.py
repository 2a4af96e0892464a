"""The embedded benchmark: a tiny CLIP, the small world that it was trained on, and six tasks that shift that world.

Nothing is downloaded. The weights are remade by `python -m fastlora.continual.demo.pretrain`.
"""

from fastlora.continual.demo.model import OpenClipDemo, open_clip_demo
from fastlora.continual.demo.tasks import demo_stream

__all__ = ["OpenClipDemo", "demo_stream", "open_clip_demo"]
