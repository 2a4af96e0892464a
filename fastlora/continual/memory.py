"""What training takes of memory, known before it is taken: for the plan of a dry run, and for the message when it ran out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora.continual.features import image_features, logit_scale, text_features
from fastlora.continual.losses import contrastive_loss
from fastlora.continual.precision import DTYPES, computing_in
from fastlora.continual.training_data import prompts

if TYPE_CHECKING:
    from fastlora.continual.trainer import Trainer


@dataclass(frozen=True)
class Needs:
    """What training takes beside the weights. Sizes are bytes.

    Args:
        adapters: adapted modules by tower.
        parameters: number of trainable parameters.
        trained: their size; their gradients take as much.
        optimizer: its state; None where it is no Adam.
        activations: what one step on the largest batch keeps for backward, without a method's extra loss.
        rounded: the copy of the weights that a half-precision step computes with; 0 in float32.
        teacher: the copy of the model that distillation compares with; 0 without it.
        adapter_file: a task's adapters at full rank.
    """

    adapters: dict[str, int]
    parameters: int
    trained: int
    optimizer: int | None
    activations: int
    rounded: int
    teacher: int
    adapter_file: int


def needs_of(trainer: Trainer, ctx: Any, images: Tensor) -> Needs:
    """For the task of `ctx`, which has begun; images [B, 3, H, W] of a step."""
    model, optimizer, config = trainer.model, ctx.optimizer, trainer.config
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    adapters: dict[str, int] = {}
    for name, _ in fastlora.adapters(model):
        tower = "vision" if name.startswith("visual.") else "text"
        adapters[tower] = adapters.get(tower, 0) + 1
    tokens = max((prompts(task, model, trainer.tokenizer) for task in trainer.stream.tasks), key=Tensor.numel)
    trained, dtype = size_of(parameters), DTYPES[config.dtype]
    half = dtype.itemsize < 4
    with computing_in(dtype, model):
        rounded = size_of(p for p in [*model.parameters(), *model.buffers()] if p.dtype == dtype) if half else 0
        part = images[: -(-len(images) // config.accumulate)]
        kept = saved_bytes(model, part, tokens.to(images.device), config.activation_checkpointing)
    return Needs(
        adapters=adapters,
        parameters=sum(p.numel() for p in parameters),
        trained=trained,
        optimizer=2 * trained if isinstance(optimizer, torch.optim.Adam) else None,  # AdamW is one
        activations=kept,
        rounded=rounded,
        teacher=size_of(ctx.distillation.teacher.state_dict().values()) if ctx.distillation else 0,
        adapter_file=size_of(fastlora.adapter_parameters(model)),
    )


def consumers(weights: int, needs: Needs | None) -> dict[str, int]:
    """Bytes by what takes them; what takes none is left out."""
    if needs is None:
        return {"weights": weights}
    found = {
        "weights": weights,
        "weights in the dtype of the step": needs.rounded,
        "trained parameters": needs.trained,
        "their gradients": needs.trained,
        "optimizer": needs.optimizer or 0,
        "kept for backward, largest step": needs.activations,
        "teacher of distillation": needs.teacher,
    }
    return {what: size for what, size in found.items() if size}


def saved_bytes(
    model: Any, images: Tensor, tokens: Tensor, checkpointing: bool = False, fake: FakeTensorMode | None = None
) -> int:
    """What autograd keeps for the backward pass of one step, parameters not counted; computed on fake tensors.

    Args:
        images: [B, 3, H, W]. tokens: [C, L]. Their values play no part.
        checkpointing: the blocks of the towers keep their inputs alone, and backward has one block whole at a time.
        fake: the mode that model, images and tokens are fake tensors of; None where they are real.
    """
    training = model.training
    model.train()
    try:
        kept, inputs = _kept_by_block(model, images, tokens, fake)
    finally:
        model.train(training)
    outside, inside = kept.pop(None, 0), kept.values()
    return outside + (sum(inputs.values()) + max(inside, default=0) if checkpointing else sum(inside))


def _kept_by_block(
    model: Any, images: Tensor, tokens: Tensor, fake: FakeTensorMode | None
) -> tuple[dict[int | None, int], dict[int, int]]:
    """(bytes kept within each block of a tower, None for what is outside of them; bytes of each block's input).

    A storage counts once, where it is kept first.
    """
    known: dict[int, Tensor] = {}  # held, so that no other storage takes the place of one
    kept: dict[int | None, int] = {}
    inputs: dict[int, int] = {}
    place: list[int | None] = [None]
    with fake or FakeTensorMode(allow_non_fake_inputs=True) as mode, _entering_blocks(model, place, inputs):
        weights = [*model.parameters(), *model.buffers()]
        if fake is None:
            weights += [mode.from_tensor(weight) for weight in weights]  # what a view of a weight is made of
            images, tokens = mode.from_tensor(images), mode.from_tensor(tokens)
        own = {weight.untyped_storage()._cdata for weight in weights}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and storage._cdata not in known:
                known[storage._cdata] = tensor
                kept[place[-1]] = kept.get(place[-1], 0) + storage.nbytes()
            return tensor

        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scale = logit_scale(model)
            contrastive_loss(image_features(model, images), text_features(model, tokens), labels, scale)
    return kept, inputs


@contextlib.contextmanager
def _entering_blocks(model: nn.Module, place: list[int | None], inputs: dict[int, int]) -> Iterator[None]:
    """`place` ends with the block that is at work, and `inputs` gets the bytes that it was given."""

    def enter(block: nn.Module, given: tuple[Any, ...]) -> None:
        place.append(id(block))
        inputs[id(block)] = size_of(given[:1])

    def leave(block: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        place.pop()

    blocks = [block for module in model.modules() for block in getattr(module, "resblocks", ())]
    handles = [block.register_forward_pre_hook(enter) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of their elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether there was no memory for a tensor; of a CPU's, torch has no type of error."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def out_of_memory(trainer: Trainer, ctx: Any, images: Tensor) -> str:
    """The message when the device's memory ran out in a step: what it takes, the three largest consumers, what helps."""
    failed = f"memory of {trainer.device} ran out on {len(images)} images a step."
    advice = "Give --accumulate 4, --activation_checkpointing true, --dtype bfloat16 or a smaller --method.batch_size."
    if trainer.config.parallel == "fsdp":  # while weights are dealt out nothing can be counted on the model
        return f"{failed} {advice}"
    weights = size_of(trainer.model.state_dict().values()) - size_of(fastlora.adapter_parameters(trainer.model))
    found = consumers(weights, needs_of(trainer, ctx, images))
    largest = sorted(found, key=found.__getitem__, reverse=True)[:3]
    told = ", ".join(f"{what} {found[what] / 2**20:,.0f} MiB" for what in largest)
    return f"{failed} Training takes about {sum(found.values()) / 2**20:,.0f} MiB, most of it: {told}. {advice}"
