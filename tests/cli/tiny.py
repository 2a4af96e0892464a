"""A benchmark of seconds for the command line."""

import torch

from fastlora.continual import benchmarks
from fastlora.continual.stream import InMemoryImages, Task, TaskStream

QUICK = ["--benchmark", "tiny", "--method.iterations=3", "--method.rank=2", "--method.batch_size=8"]


def tiny(config=None, reference=None):
    """Two tasks of random images for a CLIP of one narrow block per tower."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = dict(width=32, head_width=16, layers=1, patch_size=8, image_size=16)
    model = CLIP(32, vision, dict(width=32, heads=2, layers=1, context_length=8, vocab_size=32))
    generator = torch.Generator().manual_seed(1)

    def images(n):
        return InMemoryImages(torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 2)

    def tokenize(texts):
        tokens = torch.zeros(len(texts), 8, dtype=torch.long)
        for row, text in zip(tokens, texts):
            row[:2] = torch.tensor([1 + sum(map(ord, text)) % 30, 31])
        return tokens

    tasks = [Task(name, (f"{name} a", f"{name} b"), ("a {}", "{}"), images(8), images(6)) for name in ("red", "blue")]
    held_out = Task("grey", ("grey a", "grey b"), ("{}",), None, images(6))
    return benchmarks.Loaded(model, tokenize, TaskStream("tiny", tasks, held_out, reference))
