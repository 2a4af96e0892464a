"""fastlora: fused gated-rank LoRA, in-place merging, and the CoDyRA continual trainer.

    y = x @ weight.T + bias + scaling * ((x @ lora_a.T) * soft_threshold(gate, kappa)) @ lora_b.T

Names are resolved on first use, so that `import fastlora` is quick and needs neither Triton nor open_clip.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "FusedRankLoRALinear": "fastlora.modules.linear",
    "MergeError": "fastlora.ops.merge",
    "MergeReport": "fastlora.ops.merge",
    "Journal": "fastlora.journal",
    "InjectReport": "fastlora.adapt",
    "RankReport": "fastlora.adapt",
    "adapter_parameters": "fastlora.adapt",
    "adapters": "fastlora.adapt",
    "build_info": "fastlora.build",
    "explain": "fastlora.ops.explain",
    "export_peft": "fastlora.interop",
    "import_peft": "fastlora.interop",
    "inject": "fastlora.adapt",
    "load_adapter": "fastlora.adapter_file",
    "merge": "fastlora.merging",
    "open_clip_demo": "fastlora.continual.demo",
    "prune": "fastlora.adapt",
    "rank_report": "fastlora.adapt",
    "remove": "fastlora.adapt",
    "save_adapter": "fastlora.adapter_file",
    "unmerge": "fastlora.merging",
}
_SUBMODULES = ("continual", "interop", "modules", "ops", "optim", "reference", "tune")

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    # "as" says to type checkers that a name is public; to them __getattr__ would give any name at all
    from fastlora import continual as continual
    from fastlora import interop as interop
    from fastlora import modules as modules
    from fastlora import ops as ops
    from fastlora import optim as optim
    from fastlora import reference as reference
    from fastlora import tune as tune
    from fastlora.adapt import InjectReport as InjectReport
    from fastlora.adapt import RankReport as RankReport
    from fastlora.adapt import adapter_parameters as adapter_parameters
    from fastlora.adapt import adapters as adapters
    from fastlora.adapt import inject as inject
    from fastlora.adapt import prune as prune
    from fastlora.adapt import rank_report as rank_report
    from fastlora.adapt import remove as remove
    from fastlora.adapter_file import load_adapter as load_adapter
    from fastlora.adapter_file import save_adapter as save_adapter
    from fastlora.build import build_info as build_info
    from fastlora.continual.demo import open_clip_demo as open_clip_demo
    from fastlora.interop import export_peft as export_peft
    from fastlora.interop import import_peft as import_peft
    from fastlora.journal import Journal as Journal
    from fastlora.merging import merge as merge
    from fastlora.merging import unmerge as unmerge
    from fastlora.modules.linear import FusedRankLoRALinear as FusedRankLoRALinear
    from fastlora.ops.explain import explain as explain
    from fastlora.ops.merge import MergeError as MergeError
    from fastlora.ops.merge import MergeReport as MergeReport
else:

    def __getattr__(name: str) -> Any:
        if name in _EXPORTS:
            value = getattr(importlib.import_module(_EXPORTS[name]), name)
        elif name in _SUBMODULES:
            value = importlib.import_module(f"fastlora.{name}")
        else:
            raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
