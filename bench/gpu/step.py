"""One training step of CLIP ViT-B/16, 64 images and 100 classes (G10): ours, and as the released code computes it.

The model is open_clip's where that is installed, else a stand-in of torch layers of the same sizes and names; weights
are random. Ours: packed q, k, v, text cut after the longest prompt, ProxAdamW. As released: q, k and v apart, all 77
positions, AdamW and a loop of proximal steps with boolean masks.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.optim import ProxAdamW
from gpu import timing
from gpu.clip import Sizes, StandIn, adapt_as_released, make_model
from gpu.context import Context, told
from gpu.whole import BETAS, KAPPA, LR, _profile, released_prox


def step(run: Context) -> None:
    """Ours under bf16 autocast and over a bf16 base, the released code under bf16 autocast and in float32."""
    run.begin("the model")
    model, sizes, which = make_model(run.small)
    model.requires_grad_(False)
    run.put("model", which)
    run.put("sizes", sizes._asdict())
    batch = make_batch(run, sizes)
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "ours bf16 autocast": lambda: ours(run, model, sizes, batch, autocast=True),
        "ours bf16 base": lambda: ours(run, model, sizes, batch, autocast=False),
        "released bf16 autocast": lambda: released(run, model, sizes, batch, autocast=True),
        "released float32": lambda: released(run, model, sizes, batch, autocast=False),
    }
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, make in makers.items():
        if run.excluded(name):
            run.put(name, {"reason": run.excluded(name)})
            continue
        run.begin(name)
        try:
            steps[name] = make()
            losses = [float(steps[name]()) for _ in range(3)]
            if not all(math.isfinite(loss) for loss in losses):
                raise AssertionError(f"its losses are {losses}")
            run.put(name, {"losses": losses, "reason": "not timed yet"})
        except Exception as error:  # one that cannot run must not lose the others
            run.check_alive()
            steps.pop(name, None)
            run.put(name, {"reason": told(error)})
    run.begin("timing steps", 150)
    calls = {name: _ignoring(each) for name, each in steps.items()}
    eager = timing.interleaved(calls, run.device, 1, seconds=6.0)
    run.begin("capturing steps", 150)
    masks = {name: "its boolean masks wait for the device" for name in calls if name.startswith("released")}
    graphs = timing.interleaved(calls, run.device, 1, seconds=3.0, graph=True, uncapturable=masks)
    for name, each in steps.items():
        # a rival that waits for the device in its step cannot be captured: then its eager time is the base of both
        to = {
            base: {
                "eager": eager[name].over(eager[base]),
                "graph": graphs[name].over(graphs[base] if graphs[base].samples else eager[base]),
                "graph_base": "graph" if graphs[base].samples else f"eager: {graphs[base].reason}",
            }
            for base in steps
        }
        times = {"eager_us": eager[name].summary(), "graph_us": graphs[name].summary()}
        run.put(name, {"losses": run.data[name]["losses"], **times, "to": to, "profile": _profile(run, each, 1)})


def _ignoring(call: Callable[[], Any]) -> timing.Call:
    return lambda i: call()


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    tokens: Tensor


def make_batch(run: Context, s: Sizes) -> Batch:
    """Prompts of "a photo of a ...": 4 to 14 tokens, end of text (the largest id), then padding."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(s.images, 3, s.image, s.image, generator=generator)
    labels = torch.randint(s.classes, (s.images,), generator=generator)
    tokens = torch.zeros(s.classes, s.context, dtype=torch.long)
    for row in tokens:
        end = int(torch.randint(4, min(15, s.context), (1,), generator=generator))
        row[:end] = torch.randint(1, s.vocabulary - 1, (end,), generator=generator)
        row[end] = s.vocabulary - 1
    return Batch(images.to(run.device), labels.to(run.device), tokens.to(run.device))


def contrastive(image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy both ways, the text side with 0/1 targets; in float32."""
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    logits = 100.0 * image @ text.t()
    targets = F.one_hot(labels, len(text)).t().to(logits.dtype)
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), targets)


def ours(run: Context, plain: nn.Module, s: Sizes, batch: Batch, *, autocast: bool) -> Callable[[], Tensor]:
    model = copy.deepcopy(plain).to(run.device)
    if not autocast:
        model = model.to(run.dtype)
    fastlora.inject(model, rank=s.rank)
    start([(adapter.lora_a, adapter.lora_b, adapter.gate) for _, adapter in fastlora.adapters(model)])
    optimizer = ProxAdamW(model, lr=LR, betas=BETAS)
    optimizer.kappa = KAPPA
    for group in optimizer.param_groups if run.device.type == "cuda" else ():
        group["capturable"] = True
    images = batch.images if autocast else batch.images.to(run.dtype)
    tokens = batch.tokens[:, : int(batch.tokens.argmax(-1).max()) + 1]
    encode_text = _text_encoder(model)
    return _training_step(run, model, images, lambda: encode_text(tokens), batch.labels, optimizer, None, autocast)


@torch.no_grad()
def start(adapters: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Equal adapters for both: (lora_a [R, K], lora_b [N, R], gate [R] or [1, R]), vision first, block by block."""
    generator = torch.Generator().manual_seed(0)
    for lora_a, lora_b, gate in adapters:
        for tensor, scale in ((lora_a, lora_a.shape[1] ** -0.5), (lora_b, 0.01), (gate, 1.0)):
            drawn = torch.randn(tensor.numel(), generator=generator).mul_(scale)
            tensor.copy_(drawn.view_as(tensor))


def _text_encoder(model: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(model, StandIn):
        return model.encode_text
    from fastlora.continual.text import encode_text

    return lambda tokens: encode_text(model, tokens)


def released(run: Context, plain: nn.Module, s: Sizes, batch: Batch, *, autocast: bool) -> Callable[[], Tensor]:
    model: Any = copy.deepcopy(plain).to(run.device)
    layers = adapt_as_released(model, s.rank)
    start([(layer.lora_A, layer.lora_B, layer.gate) for layer in layers])
    parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B, layer.gate)]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, weight_decay=0.0)

    def prox() -> None:
        for layer in layers:
            released_prox(layer.gate, KAPPA)

    text = lambda: model.encode_text(batch.tokens)  # noqa: E731
    return _training_step(run, model, batch.images, text, batch.labels, optimizer, prox, autocast)


def _training_step(run, model, images, text, labels, optimizer, prox, autocast) -> Callable[[], Tensor]:
    model.train()

    def one() -> Tensor:
        context = torch.autocast(run.device.type, dtype=run.dtype) if autocast else contextlib.nullcontext()
        with context:
            image_features, text_features = model.encode_image(images), text()
        loss = contrastive(image_features, text_features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if prox is not None:
            prox()
        return loss.detach()

    return one
