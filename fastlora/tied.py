"""Weights that are more than one parameter of a model, as a language model's head that is its embedding."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from fastlora.modules.adapter import RankAdapter


def ties(model: nn.Module, adapters: Mapping[str, RankAdapter]) -> dict[str, list[str]]:
    """Adapter name -> the parameters in the memory of its weight, for those that have several. Meta tensors have none."""
    return {name: shared for name, shared in owners(model, adapters).items() if len(shared) > 1}


def owners(model: nn.Module, adapters: Mapping[str, RankAdapter]) -> dict[str, list[str]]:
    """Adapter name -> the parameters in the memory of its weight."""
    blocks: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    # module by module: one that has two places in the model is still one owner
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if has_memory(parameter):
                blocks[parameter.untyped_storage().data_ptr()].append((name, parameter))
    found = {}
    for name, adapter in adapters.items():
        weight = adapter.weight
        if has_memory(weight):
            near = blocks[weight.untyped_storage().data_ptr()]
            found[name] = [other for other, parameter in near if _overlap(weight, parameter)]
    return found


def check_untied(model: nn.Module, adapters: Mapping[str, RankAdapter]) -> None:
    """Raises ValueError when the weight of an adapter is tied to another: a merge would change both."""
    for name, shared in ties(model, adapters).items():
        raise ValueError(
            f"the weight of {name} is one tensor under {len(shared)} names ({', '.join(shared)}); a merge would change "
            "them all. Pass allow_tied=True to fastlora.merge if that is wanted; else leave the module out with where=..., "
            "or give it a weight of its own: module.weight = torch.nn.Parameter(module.weight.detach().clone(), "
            "requires_grad=False)."
        )


def check_no_ties(merged: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError where one of `weights` shares memory with one of `merged` and is not merged itself."""
    # 0: no memory of its own that Python sees, as that of a meta tensor or of a DTensor
    memory = {pointer: name for name, weight in merged.items() if (pointer := weight.data_ptr())}
    for name, weight in weights.items():
        other = None if name in merged else memory.get(weight.data_ptr())
        if other is not None:
            raise ValueError(
                f"{other} and {name} are one tensor (tied); a merge into the first would change what the second computes, "
                f"which nobody trained. Give the adapted module a weight of its own before: module.weight = "
                "torch.nn.Parameter(module.weight.detach().clone(), requires_grad=False)."
            )


def warn_of_ties(model: nn.Module, adapters: Mapping[str, RankAdapter]) -> None:
    """Says at the start what `check_untied` would say at the end."""
    for name, shared in ties(model, adapters).items():
        warnings.warn(
            f"the weight of {name} is one tensor under {len(shared)} names ({', '.join(shared)}): its adapter trains and "
            "leaves them alone, but fastlora.merge(model) will refuse to change them all. Leave the module out with "
            "where=..., or pass allow_tied=True to the merge.",
            UserWarning,
            stacklevel=3,
        )


def has_memory(tensor: Tensor) -> bool:
    """Whether `tensor` is a plain one with elements that are somewhere."""
    # a subclass, such as DTensor, may not tell where its memory is
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0


def _overlap(one: Tensor, two: Tensor) -> bool:
    (start, end), (first, last) = _span(one), _span(two)
    return start < last and first < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address and the one behind the last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
