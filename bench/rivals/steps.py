"""One training step of CLIP: ours, the released algorithm op for op, and that of others on the same model.

Every step starts from equal adapters and computes one loss, the contrastive one of CLIP. A rival encodes every position
of a text unless "short texts" stands in its name: then it is given prompts cut after the longest, as ours cuts them.
Rivals without a gate fold it into lora_B and take no proximal step; their AdamW is torch's fused one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.optim import ProxAdamW
from rivals import models, peft_layer
from rivals.clip import Sizes, StandIn
from rivals.optimizers import BETAS, KAPPA, LR, as_released

Step = Callable[[], Tensor]


class Place(Protocol):
    """Where a step runs; dtype: of autocast, or of our frozen weights without it."""

    device: torch.device
    dtype: torch.dtype


class OnCpu(NamedTuple):
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    tokens: Tensor


def make_batch(place: Place, s: Sizes) -> Batch:
    """Prompts of "a photo of a ...": 4 to 14 tokens, end of text (the largest id), then padding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(s.images, 3, s.image, s.image, generator=generator)
    labels = torch.randint(s.classes, (s.images,), generator=generator)
    tokens = torch.zeros(s.classes, s.context, dtype=torch.long)
    for row in tokens:
        end = int(torch.randint(4, min(15, s.context), (1,), generator=generator))
        row[:end] = torch.randint(1, s.vocabulary - 1, (end,), generator=generator)
        row[end] = s.vocabulary - 1
    return Batch(images.to(place.device), labels.to(place.device), tokens.to(place.device))


def short(batch: Batch) -> Batch:
    """Texts cut after the longest."""
    return batch._replace(tokens=batch.tokens[:, : int(batch.tokens.argmax(-1).max()) + 1])


def contrastive(image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy both ways, the text side with 0/1 targets; in float32."""
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    logits = 100.0 * image @ text.t()
    targets = F.one_hot(labels, len(text)).t().to(logits.dtype)
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), targets)


def ours(place: Place, plain: nn.Module, s: Sizes, batch: Batch, *, autocast: bool = False) -> Step:
    """Packed q, k, v, short texts, ProxAdamW; over weights of place.dtype unless under autocast."""
    drawn = models.draw_adapters(plain, s.rank)
    model = _copy(plain, place, None if autocast else place.dtype)
    fastlora.inject(model, rank=s.rank)
    with torch.no_grad():
        for (_, adapter), values in zip(fastlora.adapters(model), drawn):
            for parameter, value in zip((adapter.lora_a, adapter.lora_b, adapter.gate), values):
                parameter.copy_(value)
    optimizer = ProxAdamW(model, lr=LR, betas=BETAS)
    optimizer.kappa = KAPPA
    for group in optimizer.param_groups if place.device.type == "cuda" else ():
        group["capturable"] = True
    batch = short(batch if autocast else batch._replace(images=batch.images.to(place.dtype)))
    return _training_step(place, model, batch, optimizer.step, autocast)


def released(place: Place, plain: nn.Module, s: Sizes, batch: Batch, *, autocast: bool = False) -> Step:
    """q, k and v apart, all positions of a text, AdamW and a loop of proximal steps with boolean masks."""
    model = _copy(plain, place)
    models.adapt(model, models.ReleasedLinear, s.rank)
    return _training_step(place, model, batch, _released_optimizer(model), autocast)


def compiled(place: Place, plain: nn.Module, s: Sizes, batch: Batch, *, autocast: bool = False, backend="inductor"):
    """The released layers, every block under torch.compile, which makes one program for all blocks of a tower."""
    torch._dynamo.reset()
    model = _copy(plain, place)
    models.adapt(model, models.ReleasedLinear, s.rank)
    for block in models.blocks(model):
        block.compile(dynamic=False, backend=backend)
    return _training_step(place, model, short(batch), _released_optimizer(model), autocast)


def peft(place: Place, plain: nn.Module, s: Sizes, batch: Batch, *, autocast: bool = False) -> Step:
    return _without_gates(place, plain, s, batch, peft_layer.layer, autocast)


def peft_short(place: Place, plain: nn.Module, s: Sizes, batch: Batch, *, autocast: bool = False) -> Step:
    return _without_gates(place, plain, s, short(batch), peft_layer.layer, autocast)


def unsloth(place: Place, plain: nn.Module, s: Sizes, batch: Batch, *, autocast: bool = False) -> Step:
    return _without_gates(place, plain, s, short(batch), models.UnslothLinear, autocast)


STEPS: dict[str, Callable[..., Step]] = {
    "ours": ours,
    "as released": released,
    "compiled, short texts": compiled,
    "peft": peft,
    "peft, short texts": peft_short,
    "unsloth style, short texts": unsloth,
}


def build(name: str, place: Place, plain: nn.Module, s: Sizes, batch: Batch, *, small: bool = False) -> Step:
    """The step `name`, not under autocast. A small run looks at the plumbing, not at the compiler."""
    options = {"backend": "aot_eager"} if small and STEPS[name] is compiled else {}
    return STEPS[name](place, plain, s, batch, **options)


def _copy(plain: nn.Module, place: Place, dtype: torch.dtype | None = None) -> Any:
    """The model on the device. Frozen weights that need no change are shared: six copies of ViT-B/16 are 3.6 GB."""
    parameters = list(plain.parameters())
    if all(p.device == place.device and dtype in (None, p.dtype) and not p.requires_grad for p in parameters):
        return copy.deepcopy(plain, {id(p): p for p in parameters})
    return copy.deepcopy(plain).to(device=place.device, dtype=dtype)


def _released_optimizer(model: Any) -> Callable[[], None]:
    layers = [module for module in model.modules() if isinstance(module, models.ReleasedLinear)]
    directions = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    return as_released(directions, [layer.gate for layer in layers], False)


def _without_gates(place: Place, plain: nn.Module, s: Sizes, batch: Batch, linear: models.Linear, autocast: bool):
    model = _copy(plain, place)
    trained = models.adapt(model, linear, s.rank)
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    return _training_step(place, model, batch, optimizer.step, autocast)


def _training_step(place: Place, model: Any, batch: Batch, optimize: Callable[[], None], autocast: bool) -> Step:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    encode_text = _text_encoder(model)

    def one() -> Tensor:
        context = torch.autocast(place.device.type, dtype=place.dtype) if autocast else contextlib.nullcontext()
        with context:
            image_features, text_features = model.encode_image(batch.images), encode_text(batch.tokens)
        loss = contrastive(image_features, text_features, batch.labels)
        for parameter in trained:
            parameter.grad = None
        loss.backward()
        optimize()
        return loss.detach()

    return one


def _text_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    """For texts of any length: open_clip's own takes whole contexts alone."""
    if isinstance(model, StandIn):
        return model.encode_text
    from fastlora.continual.text import encode_text

    return lambda tokens: encode_text(model, tokens)
