"""Putting adapters into a model and working on all of them: inject, prune, remove, report. `merging` merges them."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fastlora.checks import check_finite_gate
from fastlora.interrupts import uninterrupted
from fastlora.modules.adapter import RankAdapter
from fastlora.modules.attention import PARTS, _PackedAttention, adapt_attention, is_attention, refuse_unsupported
from fastlora.modules.conv1d import FusedRankLoRAConv1D, conv1d_class, is_conv1d
from fastlora.modules.linear import FusedRankLoRALinear
from fastlora.modules.quantized import QuantizedRankLoRALinear, format_of
from fastlora.tied import warn_of_ties

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastlora.modules.adapter import AdapterOptions

Where = str | Callable[[str, nn.Module], bool] | Sequence[str]

TARGETS = (*PARTS, "fc1", "fc2")
TOWERS = ("vision", "text", "all")
# open_clip's names of a block's feed-forward layers
_FEED_FORWARD = {"c_fc": "fc1", "c_proj": "fc2"}
# what stands in the place of a module of the plain model
_HOSTS = (FusedRankLoRALinear, FusedRankLoRAConv1D, QuantizedRankLoRALinear, _PackedAttention)


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did; len() is the number of adapters, str() one line.

    Attributes:
        names: of the adapters, as `adapters` gives them.
        trainable_parameters: of all adapters in the model that train.
    """

    names: tuple[str, ...]
    trainable_parameters: int

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        return f"{len(self)} adapters, {self.trainable_parameters:,} trainable parameters"


@dataclass(frozen=True)
class RankRow:
    """One adapter in a `RankReport`.

    Attributes:
        name: of the adapter.
        rank: what it holds, dead ranks included.
        active_rank: gates with |gate| > kappa.
        delta_norm: ||scaling * lora_b @ diag(soft_threshold(gate, kappa)) @ lora_a||_F.
    """

    name: str
    rank: int
    active_rank: int
    delta_norm: float


@dataclass(frozen=True)
class RankReport:
    """What `rank_report` found; len() and iteration are over the adapters, str() is a table.

    Attributes:
        rows: one `RankRow` for each adapter, in the order of the modules.
    """

    rows: tuple[RankRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[RankRow]:
        return iter(self.rows)

    @property
    def mean_active(self) -> float:
        """Mean active rank over the adapters; 0 where there are none."""
        return sum(row.active_rank for row in self.rows) / len(self.rows) if self.rows else 0.0

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows] + [len("module")])
        lines = [f"{'module':<{width}}  rank  active  ||delta||_F"]
        lines += [
            f"{row.name:<{width}}  {row.rank:4d}  {row.active_rank:6d}  {row.delta_norm:11.4g}" for row in self.rows
        ]
        return "\n".join([*lines, f"mean active rank {self.mean_active:.2f} over {len(self)} modules"])


def adapters(model: nn.Module) -> Iterator[tuple[str, RankAdapter]]:
    """(name, adapter) of every adapter in `model`, in the order of its modules.

    Args:
        model: any module; without adapters it gives nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, RankAdapter):
            yield name, module


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """lora_a [R, K], lora_b [N, R] and gate [R] of every adapter in `model`, float32.

    Args:
        model: any module; without adapters it gives nothing.
    """
    for _, adapter in adapters(model):
        yield from (adapter.lora_a, adapter.lora_b, adapter.gate)


def inject(
    model: nn.Module,
    rank: int = 16,
    *,
    targets: Sequence[str] = TARGETS,
    where: Where = "all",
    **layer_kwargs: Unpack[AdapterOptions],
) -> InjectReport:
    """Give layers of `model` an adapter each, in place, and freeze everything else.

    In an open_clip model `where` names the tower, and `targets` the matrices of every block: q, k, v and out of the
    attention, fc1 and fc2 of the feed-forward part. In any other module, `where` is a predicate or a list of globs over
    module names; it selects nn.Linear layers, transformers' Conv1D, and whole attentions (of which `targets` picks the
    parts). A linear layer that bitsandbytes or torchao quantised becomes a `QuantizedRankLoRALinear` over it.

    Args:
        model: changed in place; its weights keep their storage.
        rank: R >= 1 of each adapter.
        targets: subset of ("q", "k", "v", "out", "fc1", "fc2").
        where: "vision", "text", "all", a predicate (name, module) -> bool, or glob patterns.
        layer_kwargs: kappa, scaling, dropout, gate_init, backend, recompute of every adapter, as `FusedRankLoRALinear`
            takes them.
    Returns:
        InjectReport with the adapters' names.
    Raises:
        ValueError: unknown target or tower, nothing found (near names are listed), already adapted, or an attention
            with options that are not supported.
        TypeError: a selected module has a forward of its own.
        RuntimeError: there is no memory for an adapter.
        Whatever is raised, the model is unchanged.
    Warns:
        UserWarning: a weight is tied to another one, such as that of a language model's head to its embedding. The
            adapter leaves the tie alone, and `merge` refuses the weight.
    """
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"targets {list(targets)} were given; accepted: any of {list(TARGETS)}.")
    parts = tuple(part for part in PARTS if part in targets)
    if isinstance(model, nn.Linear) or is_attention(model):
        raise ValueError(
            f"the model is itself a {type(model).__name__}, and adapters replace modules inside of one. Put it into "
            "nn.Sequential(model), or make the layer with FusedRankLoRALinear.from_linear(model, rank)."
        )
    selected = _select_tower(model, targets, where) if isinstance(where, str) else _select(model, where)
    _check_selection(model, selected, parts)
    # one throw-away adapter: bad options are found before anything in the model has changed
    FusedRankLoRALinear(1, 1, rank, **layer_kwargs)
    _replace(model, selected, parts, rank, layer_kwargs)
    added = {name: adapter for name, adapter in adapters(model) if _within(name, selected)}
    warn_of_ties(model, added)
    return InjectReport(tuple(added), sum(p.numel() for p in adapter_parameters(model) if p.requires_grad))


def _adapted(module: nn.Module, parts: tuple[str, ...], rank: int, options: AdapterOptions) -> Any:
    if is_attention(module):
        return adapt_attention(module, parts, rank, **options)
    if is_conv1d(module):
        return FusedRankLoRAConv1D(module, rank, **options)
    if format_of(module) is not None:
        return QuantizedRankLoRALinear(module, rank, **options)
    return FusedRankLoRALinear.from_linear(cast(nn.Linear, module), rank, **options)  # which refuses any other


def _is_adaptable(module: nn.Module) -> bool:
    # an adapted one as well, to be refused by name
    return isinstance(module, (nn.Linear, FusedRankLoRAConv1D)) or is_attention(module) or is_conv1d(module)


def _replace(
    model: nn.Module, selected: dict[str, nn.Module], parts: tuple[str, ...], rank: int, layer_kwargs: AdapterOptions
) -> None:
    """Freeze all but adapters and put adapted modules in place of the selected ones: all of them, or, on error, none."""
    kept = {id(parameter) for parameter in adapter_parameters(model)}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    replaced: dict[str, Any] = {}
    try:
        with uninterrupted():
            for parameter, _ in flags:
                parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)
            for name, module in selected.items():
                replaced[name] = _adapted(module, parts, rank, layer_kwargs)
                model.set_submodule(name, replaced[name])
    except Exception:
        for name, adapted in replaced.items():
            emptied = isinstance(adapted, (_PackedAttention, FusedRankLoRAConv1D))
            model.set_submodule(name, adapted.to_plain() if emptied else selected[name])
        for parameter, trained in flags:
            parameter.requires_grad_(trained)
        raise


def _within(name: str, selected: dict[str, nn.Module]) -> bool:
    return name in selected or any(name.startswith(f"{parent}.") for parent in selected)


def _select_tower(model: nn.Module, targets: Sequence[str], where: str) -> dict[str, nn.Module]:
    if where not in TOWERS:
        raise ValueError(
            f"where={where!r} is no tower; accepted: {', '.join(map(repr, TOWERS))}, a predicate (name, module) -> bool, "
            f"or a list of glob patterns such as [{where!r}]."
        )
    selected: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        tower = "vision" if name.startswith("visual.") else "text"
        parent, _, last = name.rpartition(".")
        if where not in (tower, "all"):
            continue
        # a residual block is what has both an attention and a feed-forward part; poolers and heads are left alone
        if last == "attn" and is_attention(module) and hasattr(model.get_submodule(parent), "mlp"):
            if any(part in targets for part in PARTS):
                selected[name] = module
        elif _FEED_FORWARD.get(last) in targets and parent.endswith(".mlp") and isinstance(module, nn.Linear):
            selected[name] = module
    if not selected:
        already = any(True for _ in adapters(model))
        raise ValueError(
            f"{type(model).__name__} has no block of open_clip's build in where={where!r}"
            + ("; its adapters are in place already, call fastlora.remove(model) first." if already else
               "; pass a predicate or glob patterns, e.g. where=['*.q_proj', '*.v_proj'].")
        )  # fmt: skip
    return selected


def _select(model: nn.Module, where: Any) -> dict[str, nn.Module]:
    patterns = None if callable(where) else list(where)
    selected: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or not _is_adaptable(module):
            continue
        matched = where(name, module) if patterns is None else any(fnmatch.fnmatchcase(name, p) for p in patterns)
        # what lies inside a selected attention is adapted with it
        if matched and not any(name.startswith(f"{outer}.") for outer in selected):
            selected[name] = module
    if not selected:
        raise ValueError(_nothing_found(model, patterns))
    return selected


def _nothing_found(model: nn.Module, patterns: list[str] | None) -> str:
    names = [name for name, module in model.named_modules() if _is_adaptable(module)]
    if patterns is None:
        return f"the predicate selected none of the {len(names)} linear and attention modules, e.g. {names[:5]}."
    near = [match for pattern in patterns for match in difflib.get_close_matches(pattern.strip("*."), names, 3, 0.3)]
    return (
        f"the patterns {patterns} match none of the {len(names)} linear and attention modules; "
        f"near: {near or names[:5]}. Globs match whole module names, e.g. '*.{(names or ['fc'])[0].split('.')[-1]}'."
    )


def _check_selection(model: nn.Module, selected: dict[str, nn.Module], parts: tuple[str, ...]) -> None:
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    for name, module in selected.items():
        if len(places[id(module)]) > 1:
            raise ValueError(
                f"{' and '.join(places[id(module)])} are one module in several places; an adapter would be put in one of "
                "them alone. Leave it out with where=..., or give each place a module of its own."
            )
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, RankAdapter) or isinstance(parent, (_PackedAttention, QuantizedRankLoRALinear)):
            raise ValueError(f"{name} is adapted already; call fastlora.remove(model) first, or leave it out.")
        if is_attention(module):
            refuse_unsupported(module)
            if not parts:
                raise ValueError(f"{name} is an attention, and targets name none of its parts {list(PARTS)}.")
        elif is_attention(parent):
            raise ValueError(
                f"{name} belongs to {type(parent).__name__}, which reads its weight without calling it: an adapter there "
                f"would never train. Select the attention itself ({name.rpartition('.')[0]!r}) with targets=['out']."
            )
        elif _has_own_forward(module) and format_of(module) is None:
            hooked = " (if from a device_map: load the model on one device)" if "forward" in vars(module) else ""
            raise TypeError(
                f"{name} is a {type(module).__name__} with a forward of its own{hooked}; a plain nn.Linear is accepted."
            )
        elif isinstance(parent, nn.TransformerEncoderLayer) and not any(_inside(parent, m) for m in selected.values()):
            raise ValueError(
                f"{name} belongs to nn.TransformerEncoderLayer, whose fast path for evaluation reads its weight without "
                "calling it. Select its self_attn as well, which closes that path."
            )


def _has_own_forward(module: nn.Module) -> bool:
    plain = (conv1d_class() if is_conv1d(module) else None) or nn.Linear
    # one of the instance alone is how accelerate moves operands between the devices of a device_map
    return type(module).forward is not plain.forward or "forward" in vars(module)


def _inside(layer: nn.TransformerEncoderLayer, module: nn.Module) -> bool:
    return module is layer.self_attn


def prune(model: nn.Module) -> dict[str, int]:
    """Drop the dead ranks of every adapter, those with |gate| <= kappa; outputs do not change.

    Args:
        model: with adapters, which are changed in place.
    Returns:
        Name -> kept rank. 0 is legal, and leaves the frozen layer alone at work.
    Raises:
        ValueError: no adapters, or a gate is not finite (named); no adapter has changed.
    """
    found = adapters_or_raise(model)
    for name, adapter in found.items():
        check_finite_gate(adapter.gate, f"{name}.gate")
    return {name: adapter.prune_() for name, adapter in found.items()}


def remove(model: nn.Module) -> nn.Module:
    """Take all adapters out: `model` is the plain model again, over the same weights, with its original keys.

    What was not merged is dropped; call `fastlora.merge(model)` first to keep it. The weights stay frozen.

    Args:
        model: changed in place; one without adapters stays as it is.
    Returns:
        The model; when `model` itself is an adapted layer, the plain layer.
    """
    if isinstance(model, _HOSTS):
        return _plain(model)
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, _HOSTS)]:
        # an adapted out_proj goes with its attention
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), _PackedAttention):
            model.set_submodule(name, _plain(module))
    return model


def _plain(host: Any) -> nn.Module:
    if isinstance(host, QuantizedRankLoRALinear):
        return host.base
    return host.to_linear() if isinstance(host, FusedRankLoRALinear) else host.to_plain()


def rank_report(model: nn.Module) -> RankReport:
    """Rank held, active rank and Frobenius norm of the update of every adapter.

    Args:
        model: any module; without adapters the report is empty.
    """
    return RankReport(
        tuple(
            RankRow(name, adapter.gate.numel(), adapter.active_rank(), float(adapter.delta_weight().norm()))
            for name, adapter in adapters(model)
        )
    )


def adapters_or_raise(model: nn.Module) -> dict[str, RankAdapter]:
    found = dict(adapters(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters; call fastlora.inject(model, rank=...) first.")
    return found
