"""All adapters of a model into its weights, in place and in one call, and out of them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastlora.adapt import adapters_or_raise
from fastlora.checks import check_finite_gate
from fastlora.interrupts import uninterrupted
from fastlora.modules.adapter import RankAdapter
from fastlora.modules.quantized import QuantizedRankLoRALinear, put_requantized, requantized
from fastlora.ops.merge import MergeReport, merge_, new_residuals, one_at_a_time, unmerge_
from fastlora.sharded import is_sharded, merge_shards
from fastlora.tied import check_untied

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastlora.ops.merge import MergeOptions


@one_at_a_time
def merge(
    model: nn.Module,
    *,
    residuals: dict[str, Tensor] | None = None,
    requantize: Any = False,
    allow_tied: bool = False,
    **merge_kwargs: Unpack[MergeOptions],
) -> MergeReport:
    """Merge every adapter into its weight, all in one call of `fastlora.ops.merge_`, then start fresh adapters.

    A model whose weights torch's `fully_shard` has dealt out by rows is merged in place in all its processes, which all
    call this; the bits are those of the whole. Fresh adapters are alike in all of them.

    Args:
        model: with adapters; weights and adapters are written in place.
        allow_tied: merge into weights that are tied to others as well, which changes those too.
        residuals: name -> what rounding has dropped from that adapter's weight so far. An adapter without an entry gets
            one of zeros in the weight's dtype, so start with {} and pass the same dict at every merge; for one byte an
            element put `fastlora.ops.new_residuals(weights, int8=True)` there first. Of a sharded model they are of the
            rows that this process holds.
        requantize: for adapters over quantised weights, see `QuantizedRankLoRALinear.merge_`.
        merge_kwargs: passed to `fastlora.ops.merge_` (rounding, seed, check).
    Returns:
        What was merged, and what rounding took of it, for each adapter.
    Raises:
        MergeError: some adapter is not finite, a sum overflows, or a weight is quantised and `requantize` was not given;
            no weight and no adapter has changed.
        ValueError: no adapters, a gate that is not finite, a weight that is tied to another one while allow_tied is
            False, or weights that `fastlora.ops.merge_` refuses; likewise.
    Threads:
        Calls from several threads run one after the other, and the later ones find fresh adapters: no update is merged
        twice.
    """
    found = adapters_or_raise(model)
    quantized = {name: layer for name, layer in found.items() if isinstance(layer, QuantizedRankLoRALinear)}
    if not allow_tied:
        check_untied(model, found)
    if not quantized:
        return _merge_all(model, found, residuals, False, merge_kwargs)
    made = requantized(quantized, requantize)
    plain = {name: layer for name, layer in found.items() if name not in quantized}
    with uninterrupted():
        merged = _merge_all(model, plain, residuals, False, merge_kwargs) if plain else None
        rows = (*(merged or ()), *put_requantized(quantized, made))
    return MergeReport(lambda: rows, f"{merged.backend}+requantize" if merged else "requantize")


@one_at_a_time
def unmerge(
    model: nn.Module, *, residuals: dict[str, Tensor] | None = None, allow_tied: bool = False, check: bool = True
) -> MergeReport:
    """Take the adapters that the model holds out of its weights, then start fresh ones: undoes the merge of the same.

        fastlora.load_adapter(model, "adapters/task_03.safetensors")
        fastlora.unmerge(model, residuals=residuals)

    Args:
        model: with the adapters that were merged; weights and adapters are written in place.
        residuals: as `merge` filled them; with them the weights come back bit for bit (see `fastlora.ops.unmerge_`).
        allow_tied: as for `merge`.
        check: look at everything first, and write only if every adapter and every result is finite.
    Returns:
        What was taken out, for each adapter.
    Raises:
        MergeError, ValueError: as `merge`; ValueError also where a weight is quantised, since it would not come back.
    """
    found = adapters_or_raise(model)
    quantized = [name for name, layer in found.items() if isinstance(layer, QuantizedRankLoRALinear)]
    if quantized:
        raise ValueError(
            f"{quantized[0]} stores its weight quantised, so what was merged into it cannot be taken out again. Load the "
            "weights from before the merge."
        )
    if not allow_tied:
        check_untied(model, found)
    return _merge_all(model, found, residuals, True, {"check": check})


def _merge_all(
    model: nn.Module,
    found: dict[str, RankAdapter],
    residuals: dict[str, Tensor] | None,
    undo: bool,
    options: Mapping[str, Any],
) -> MergeReport:
    if is_sharded(model):
        return merge_shards(model, found, residuals, undo=undo, **options)
    for name, adapter in found.items():
        check_finite_gate(adapter.gate, f"{name}.gate")
    layers = list(found.values())
    weights = [layer.weight for layer in layers]
    if residuals is not None:
        fresh = zip(found, weights)
        residuals |= {name: new_residuals([weight])[0] for name, weight in fresh if name not in residuals}
        options = {**options, "residuals": [residuals[name] for name in found]}
    renewed = [layer.fresh_tensors() for layer in layers]  # before the merge: whatever fails here, nothing has changed
    with uninterrupted():  # an update that is in the weight and in the adapter still would act twice
        report = (unmerge_ if undo else merge_)(
            weights,
            [layer.lora_a for layer in layers],
            [layer.lora_b for layer in layers],
            [layer.effective_gate() for layer in layers],
            scaling=[layer.scaling for layer in layers],
            names=list(found),
            **options,
        )
        for layer, tensors in zip(layers, renewed):
            layer._set(*tensors)
    return report
