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
    "merge": "fastlora.adapt",
    "open_clip_demo": "fastlora.continual.demo",
    "prune": "fastlora.adapt",
    "rank_report": "fastlora.adapt",
    "remove": "fastlora.adapt",
    "save_adapter": "fastlora.adapter_file",
    "unmerge": "fastlora.adapt",
}
_SUBMODULES = ("continual", "interop", "modules", "ops", "optim", "reference", "tune")

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]

if TYPE_CHECKING:
    from fastlora.adapt import (
        InjectReport,
        RankReport,
        adapter_parameters,
        adapters,
        inject,
        merge,
        prune,
        rank_report,
        remove,
        unmerge,
    )
    from fastlora.adapter_file import load_adapter, save_adapter
    from fastlora.build import build_info
    from fastlora.continual.demo import open_clip_demo
    from fastlora.interop import export_peft, import_peft
    from fastlora.journal import Journal
    from fastlora.modules.linear import FusedRankLoRALinear
    from fastlora.ops.explain import explain
    from fastlora.ops.merge import MergeError, MergeReport


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
