"""Memory and time of a training step of a model that nobody has built yet: `fastlora doctor --estimate MODEL`.

Counted on fake tensors: bytes as in a dry run, operations as torch counts them (a product of M, K and N is 2 M K N). Time is
operations over the rate of the device: here that of one product of the model's own size, measured now; for a GPU by name
the peak of its data sheet, so that no step is faster than told and every step is slower.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.continual.clip_model import registered
from fastlora.continual.config import UsageError, check_one_of
from fastlora.continual.configs.base import check_count
from fastlora.continual.features import image_features, logit_scale, text_features
from fastlora.continual.losses import contrastive_loss
from fastlora.continual.memory import saved_bytes, size_of
from fastlora.continual.precision import DTYPES, computing_in
from fastlora.continual.tables import text_table


class Gpu(NamedTuple):
    """A data sheet, dense: 10^12 operations a second in half precision and in float32, memory in 10^9 bytes."""

    half: float
    float32: float
    memory: float


GPUS = {
    "H200": Gpu(989.0, 67.0, 141.0),
    "H100": Gpu(989.0, 67.0, 80.0),
    "A100": Gpu(312.0, 19.5, 80.0),
    "L40S": Gpu(362.0, 91.6, 48.0),
    "RTX 4090": Gpu(165.0, 82.6, 24.0),
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A step of CoDyRA with adapters on all six matrices of every block in both towers.

    Args:
        model: architecture as open_clip lists it, or a JSON file that describes one.
        rank: of each adapter.
        images, classes: of a step; prompt_tokens: of the longest prompt, end of text included.
        dtype, accumulate, activation_checkpointing: as for `fastlora train`.
    """

    model: str
    rank: int = 16
    images: int = 64
    classes: int = 100
    prompt_tokens: int = 16
    dtype: str = "float32"
    accumulate: int = 1
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "images", "classes", "prompt_tokens", "accumulate"):
            check_count(name, getattr(self, name), "Give how many.")
        check_one_of("dtype", self.dtype, DTYPES)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by what takes them, operations of a step, and (M, K, N) of the product that the most operations are like."""

    memory: dict[str, int]
    operations: int
    product: tuple[int, int, int]


def estimate(wanted: Wanted) -> Estimate:
    """Without the memory or the time of the model itself.

    Raises:
        UsageError: open_clip has no such model, or one whose towers are not its own.
    """
    with FakeTensorMode() as mode:
        model = _build(wanted.model)
        weights = size_of(model.state_dict().values())
        fastlora.inject(model, rank=wanted.rank)
        trained = size_of(fastlora.adapter_parameters(model))
        size = model.visual.image_size
        images = torch.zeros(wanted.images, 3, *(size if isinstance(size, tuple) else (size, size)))
        tokens = torch.zeros(wanted.classes, wanted.prompt_tokens, dtype=torch.long)
        with computing_in(DTYPES[wanted.dtype], model):
            part = images[: -(-wanted.images // wanted.accumulate)]
            kept = saved_bytes(model, part, tokens, wanted.activation_checkpointing, mode)
            operations = _operations(model, images, tokens, wanted)
    memory = {
        "weights": weights,
        "weights in the dtype of the step": weights * DTYPES[wanted.dtype].itemsize // 4
        if wanted.dtype != "float32"
        else 0,
        "adapters": trained,
        "their gradients": trained,
        "optimizer": 2 * trained,
        "kept for backward": kept,
    }
    width = model.visual.transformer.width
    tokens_of_images = wanted.images * (model.visual.grid_size[0] * model.visual.grid_size[1] + 1)
    return Estimate(memory, operations, (tokens_of_images, width, 4 * width))


def _build(name: str) -> Any:
    """The architecture with tensors of the mode that is on; open_clip's own factory moves tensors about."""
    config = open_clip.get_model_config(registered(name))
    custom = config.pop("custom_text", False)
    unknown = set(config) - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias", "init_logit_scale"}
    vision, text = config["vision_cfg"], config["text_cfg"]
    if unknown or "timm_model_name" in vision or "hf_model_name" in text or isinstance(vision.get("layers"), list):
        raise UsageError(
            f"{name} has a tower that is no transformer of open_clip's own, or more than two towers; an estimate needs those. "
            "Give a model such as ViT-B-16 or ViT-L-14."
        )
    return (CustomTextCLIP if custom else CLIP)(**config).requires_grad_(False)


def _operations(model: Any, images: Tensor, tokens: Tensor, wanted: Wanted) -> int:
    labels, scale = torch.zeros(len(images), dtype=torch.long), logit_scale(model)
    with FlopCounterMode(display=False) as counter:
        features = image_features(model, images)
        once = counter.get_total_flops()
        contrastive_loss(features, text_features(model, tokens), labels, scale).backward()
    # a second forward pass: of the images with accumulation, of everything in the blocks with checkpointing
    again = once if wanted.accumulate > 1 else 0
    return (
        counter.get_total_flops() + again + (counter.get_total_flops() // 3 if wanted.activation_checkpointing else 0)
    )


def rate_here(product: tuple[int, int, int], dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of one such product on the device at hand, the fastest of those that go into `seconds`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    m, k, n = product
    rows = min(m, 1024) if device.type == "cpu" else m  # of a CPU the rate no longer grows
    x, weight = torch.randn(rows, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    best, start = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2 * rows * k * n / best


def text(wanted: Wanted, found: Estimate, rate: float | None = None) -> str:
    """Tables of an estimate; rate: `rate_here`, None to leave this machine out."""
    options = ", ".join(f"{field.name} {getattr(wanted, field.name)}" for field in dataclasses.fields(wanted)[1:])
    rows = [[what, f"{size / 2**20:,.0f}"] for what, size in found.memory.items() if size]
    total = sum(found.memory.values())
    rows.append(["in all", f"{total / 2**20:,.0f}"])
    times = []
    if rate:
        times.append(
            ["here", f"{found.operations / rate:,.3g} s", f"{rate / 1e9:,.0f} x 10^9 operations a second, measured now"]
        )
    for name, gpu in GPUS.items():
        peak = gpu.float32 if wanted.dtype == "float32" else gpu.half
        fits = "fits" if total < 0.9e9 * gpu.memory else f"does not fit into {gpu.memory:g} x 10^9 bytes"
        times.append([name, f"> {found.operations / peak / 1e9:,.3g} ms", f"{fits}; from the data sheet, not measured"])
    lines = [f"{wanted.model}, a training step: {options}", "", "Memory, MiB:", text_table(["", ""], rows), ""]
    lines += [f"Operations: {found.operations / 1e12:,.2f} x 10^12. Time:", text_table(["", "", ""], times)]
    return "\n".join(lines)
