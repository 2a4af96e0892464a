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
    Entry("InfLoRA r=8", "inflora", {"rank": 8}),
    Entry("InfLoRA r=8, held by captions", "inflora", {"rank": 8, "distillation": 1.0}),
    Entry("O-LoRA", "o_lora"),
    Entry("SD-LoRA", "sd_lora"),
    Entry("SD-LoRA, magnitudes at lr 0.02", "sd_lora", {"magnitude_lr": 0.02}),
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

_EIGHT = {"rank": 8}
_REFERENCE = {"distillation": 1.0, "distil_on": "reference", "teacher": "base"}  # ZSCL's loss, images of no task
_SHRUNK, _WHOLE = (0.5, 0.75, 1.0), (0.25, 0.5, 0.75)  # methods that shrink the update themselves need less of it


def _scaled(label: str, method: str, lr: float, scales: tuple[float, ...] = _SHRUNK, **options: Any) -> Entry:
    """A rule over merge_scale, at a learning rate chosen on the validation sets."""
    return Entry(f"{label} x alpha", method, {"lr": lr} | options, "merge_scale", scales)


# curves of learning against forgetting and against held-out accuracy; all of them keep a rank of about 8. Scales are
# such that the curves cross the same range of learning.
RULES = (
    _scaled("CoDyRA", "codyra", 2e-3),
    _scaled("CoDyRA, gates without gradient", "codyra", 2e-3, gates="null_control"),
    _scaled("LoRA r=8", "lora", 2e-3, _WHOLE, **_EIGHT),
    _scaled("decay of B", "decay_b", 4e-3, _WHOLE),
    _scaled("uniform shrink", "uniform_shrink", 2e-3),
    _scaled("InfLoRA r=8", "inflora", 4e-3, **_EIGHT),
    _scaled("InfLoRA r=8, held by reference images", "inflora", 4e-3, **_EIGHT, **_REFERENCE),
)
