"""Which methods the comparison on the embedded benchmark runs, with which options, at which learning rates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ADAPTER_LRS = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
FULL_LRS = (1e-5, 3e-5, 1e-4, 3e-4)


@dataclass(frozen=True)
class Entry:
    """A row of the table: what it is called, the method, its options, and the option whose value is to be chosen."""

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    vary: str = "lr"
    values: tuple[float, ...] = ADAPTER_LRS


GRID = (
    Entry("zero-shot", "zero_shot", values=()),
    Entry("LoRA r=16", "lora"),
    Entry("CoDyRA", "codyra"),
    Entry("CoDyRA, gates without gradient", "codyra", {"gates": "null_control"}),
    Entry("uniform shrink", "uniform_shrink"),
    Entry("uniform shrink, merged x 0.75", "uniform_shrink", {"merge_scale": 0.75}),
    Entry("LoRA r=4", "lora", {"rank": 4}),
    Entry("LoRA r=1", "lora", {"rank": 1}),
    Entry("LoRA r=64", "lora", {"rank": 64}),
    Entry("LoRA r=16, merged x 0.5", "lora", {"merge_scale": 0.5}),
    Entry("full fine-tuning", "full", values=FULL_LRS),
    Entry("ZSCL", "zscl", values=FULL_LRS),
    Entry("per task, task known", "per_task"),
    Entry("joint", "joint"),
    Entry("WiSE-FT", "wise_ft", values=FULL_LRS),
    Entry("LwF", "lwf", values=FULL_LRS),
    Entry("InfLoRA", "inflora"),
    Entry("O-LoRA", "o_lora"),
    Entry("SD-LoRA", "sd_lora"),
    Entry("LoRA-Squeeze 16 to 4", "lora_squeeze"),
    Entry("PEARL", "pearl"),
    Entry("rank-1 expert pool", "expert_pool"),
    Entry("CoDyRA, gates shrunk at once and frozen", "codyra", {"gates": "preshrunk"}),
    Entry("CoDyRA, random gates, no pruning", "codyra", {"gates": "random"}),
    Entry("CoDyRA, gates from 1", "codyra", {"gate_init": "ones"}),
    Entry("decay of B", "decay_b"),
    Entry("random half + uniform shrink", "random_selection", {"shrink": 1.0}),
    Entry("path credit + uniform shrink", "path_credit", {"shrink": 1.0}),
    Entry("path credit per module + uniform shrink", "path_credit", {"shrink": 1.0, "budget": "module"}),
    Entry("contribution prox", "contribution_prox"),
    Entry("SoRA", "sora"),
)

# the rows above that select components, for bench/selection.py; all at the benchmark's own learning rate
SELECTING = tuple(
    entry
    for entry in GRID
    if entry.method in ("codyra", "sora", "path_credit", "contribution_prox", "random_selection")
    and entry.options.get("gates") not in ("preshrunk", "random")  # chosen before the first step, or never
    and entry.options.get("gate_init") != "ones"  # of which none dies
)

_SCALES = (0.35, 0.5, 0.75, 1.0)
_EIGHT = {"rank": 8}

# curves of learning against forgetting
RULES = (
    Entry("LoRA r=16 x alpha", "lora", {"rank": 16}, "merge_scale", _SCALES),
    Entry("LoRA r=8 x alpha", "lora", _EIGHT, "merge_scale", _SCALES),
    Entry("LoRA r=4 x alpha", "lora", {"rank": 4}, "merge_scale", _SCALES),
    Entry("LoRA r=8 vision x alpha", "lora", _EIGHT | {"where": "vision"}, "merge_scale", _SCALES),
    Entry("LoRA r=8 text x alpha", "lora", _EIGHT | {"where": "text"}, "merge_scale", _SCALES),
    Entry("LoRA r=8 attention x alpha", "lora", _EIGHT | {"targets": ("q", "k", "v", "out")}, "merge_scale", _SCALES),
    Entry("LoRA r=8 feed-forward x alpha", "lora", _EIGHT | {"targets": ("fc1", "fc2")}, "merge_scale", _SCALES),
    Entry("CoDyRA x alpha", "codyra", {}, "merge_scale", _SCALES),
)
