"""Attention with one adapter each on q, k, v and the output projection, over an untouched packed in_proj_weight.

`nn.MultiheadAttention` (open_clip 3.x) reads `out_proj.weight` instead of calling `out_proj`, so an adapter that is put
there alone never trains; and it holds q, k and v in one `in_proj_weight` [3 d, d]. These modules replace the whole
attention: the packed weight stays one parameter, q, k and v are adapted through row views of it (contiguous, so that a
merge writes them in place), and the base keys of the state_dict stay as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.modules.adapter import AdapterOptions, RankAdapter
from fastlora.modules.linear import FusedRankLoRALinear
from fastlora.ops.backend import TRITON_MAX_RANK
from fastlora.ops.rank_lora import rank_lora_packed

if TYPE_CHECKING:
    from typing_extensions import Unpack

PARTS = ("q", "k", "v", "out")


class PackedProjection(RankAdapter):
    """Adapter of q, k or v: its weight is a block of rows of the attention's in_proj_weight."""

    _attention: _PackedAttention

    def __init__(self, attention: _PackedAttention, part: str, rank: int, **options: Unpack[AdapterOptions]) -> None:
        super().__init__()
        # not through nn.Module.__setattr__: the attention is the parent, not a child, and owns the weight
        self.__dict__["_attention"] = attention
        self.part = part
        width = attention.embed_dim
        device = attention.in_proj_weight.device
        self._init_adapter(width, width, rank, **options, device=device)

    @property
    def _rows(self) -> slice:
        width, index = self.in_features, PARTS.index(self.part)
        return slice(index * width, (index + 1) * width)

    @property
    def weight(self) -> Tensor:
        """[d, d], a view of the packed weight."""
        return self._attention.in_proj_weight[self._rows]

    def weight_rows(self) -> tuple[Tensor, int]:
        return self._attention.in_proj_weight, self._rows.start

    @property
    def bias(self) -> Tensor | None:
        """[d], a view of the packed bias, or None."""
        packed = self._attention.in_proj_bias
        return None if packed is None else packed[self._rows]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., d] through this block of the packed projection."""
        return self._adapted(x, weight, bias)


class _PackedAttention(nn.Module):
    """What both attentions share: taking over, projecting, attending, and giving back the plain module."""

    in_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    q: PackedProjection | None
    k: PackedProjection | None
    v: PackedProjection | None
    out_proj: nn.Linear
    _plain: Any

    def __init__(self, plain: nn.Module, parts: tuple[str, ...], rank: int, **options: Unpack[AdapterOptions]) -> None:
        super().__init__()
        refuse_unsupported(plain)
        unknown = [part for part in parts if part not in PARTS]
        if unknown or not parts:
            raise ValueError(f"attention targets {list(parts)} were given; accepted: any of {list(PARTS)}.")
        source: Any = plain  # one of two classes that share these names, and no base
        self.embed_dim: int = source.in_proj_weight.shape[1]
        self.num_heads: int = source.num_heads
        self.in_proj_weight = source.in_proj_weight.requires_grad_(False)
        self.in_proj_bias = source.in_proj_bias
        if self.in_proj_bias is not None:
            self.in_proj_bias.requires_grad_(False)
        for part in PARTS[:3]:
            self.add_module(part, PackedProjection(self, part, rank, **options) if part in parts else None)
        self.out_proj = source.out_proj.requires_grad_(False)
        if "out" in parts:
            self.out_proj = FusedRankLoRALinear.from_linear(source.out_proj, rank, **options)
        # the emptied original is kept for to_plain(); it holds no tensor, so nothing has to follow .to() or a copy
        self.__dict__["_plain"] = _emptied(plain)
        self.train(plain.training)

    def to_plain(self) -> nn.Module:
        """The original attention over the same parameters; the adapters are left behind."""
        plain = self._plain
        plain.in_proj_weight, plain.in_proj_bias = self.in_proj_weight, self.in_proj_bias
        out = self.out_proj
        plain.out_proj = out.to_linear() if isinstance(out, FusedRankLoRALinear) else out
        return plain.train(self.training)

    def _project(self, part: str, x: Tensor) -> Tensor:
        rows = slice(PARTS.index(part) * self.embed_dim, (PARTS.index(part) + 1) * self.embed_dim)
        weight = self.in_proj_weight[rows]
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
        adapter = getattr(self, part)
        return F.linear(x, weight, bias) if adapter is None else adapter(x, weight, bias)

    def _project_all(self, query: Tensor, key: Tensor, value: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each [batch, heads, tokens, d / heads]. shared: the three inputs are one tensor."""
        if shared and self._packs():
            # unbound along a middle axis, so that the three gradients come back as one contiguous [.., 3, d]
            q, k, v = self._project_packed(query).unflatten(-1, (3, self.embed_dim)).unbind(-2)
        else:
            q, k, v = (self._project(part, x) for part, x in zip(PARTS, (query, key, value)))
        return self._heads(q), self._heads(k), self._heads(v)

    def _packs(self) -> bool:
        """Whether one product over the packed weight can serve q, k and v: equal options, and no dropout before lora_a."""
        adapters = self._adapters()
        options = {(a.backend, a.scaling, a.recompute) for a in adapters}
        ranks = sum(a.gate.numel() for a in adapters)
        return len(options) == 1 and ranks <= TRITON_MAX_RANK and not any(a.drops_out() for a in adapters)

    def _adapters(self) -> list[PackedProjection]:
        return [adapter for adapter in (self.q, self.k, self.v) if adapter is not None]

    def _project_packed(self, x: Tensor) -> Tensor:
        """[batch, tokens, d] -> [batch, tokens, 3 d]; q, k and v are read here, their own forward is not called."""
        parts = (self.q, self.k, self.v)
        first = self._adapters()[0]
        return rank_lora_packed(
            x, self.in_proj_weight, self.in_proj_bias,
            [None if a is None else a.lora_a for a in parts], [None if a is None else a.lora_b for a in parts],
            [None if a is None else a.gate for a in parts], [0.0 if a is None else a.call_kappa() for a in parts],
            first.scaling, backend=first.backend, recompute=first.recompute,
        )  # fmt: skip

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, d] -> [batch, heads, tokens, d / heads]."""
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, self.num_heads, -1).transpose(1, 2)

    def _merge_heads(self, attended: Tensor) -> Tensor:
        """[batch, heads, tokens, d / heads] -> [batch, tokens, d], through the output projection."""
        batch, _, tokens, _ = attended.shape
        return self.out_proj(attended.transpose(1, 2).reshape(batch, tokens, self.embed_dim))

    def _mask(self, attn_mask: Tensor | None, batch: int) -> Tensor | None:
        """[tokens, tokens] or [batch * heads, tokens, tokens], broadcast to the heads."""
        if attn_mask is None or attn_mask.dim() == 2:
            return attn_mask
        return attn_mask.view(batch, self.num_heads, *attn_mask.shape[-2:])


class FusedRankLoRAMultiheadAttention(_PackedAttention):
    """Drop-in for `nn.MultiheadAttention` with equal key, query and value widths d; `fastlora.inject` makes it.

    Adapters, each `None` or a `RankAdapter`: q, k, v and out_proj. state_dict keys: those of the plain attention, and
    lora_a, lora_b, gate of each adapter.

    Args:
        plain: gives up its parameters, which are frozen.
        parts: which of "q", "k", "v", "out" get an adapter.
        rank: R >= 1 of each.
        options: of each adapter, as `fastlora.FusedRankLoRALinear` takes them.
    Raises:
        ValueError: an option of the attention that is not supported, or no known part.
    """

    def __init__(
        self,
        plain: nn.MultiheadAttention,
        parts: tuple[str, ...] = PARTS,
        rank: int = 16,
        **options: Unpack[AdapterOptions],
    ):
        super().__init__(plain, parts, rank, **options)
        self.batch_first, self.attention_dropout = plain.batch_first, plain.dropout
        # nn.TransformerEncoderLayer has a fast path for evaluation that reads the weights and would skip the adapters;
        # it is closed to attentions that do not share one width
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`; a boolean mask marks what is not attended to.

        Returns:
            (output, attention weights or None), shaped as `nn.MultiheadAttention` returns them.
        """
        unbatched = query.dim() == 2
        shared = query is key is value
        if unbatched:
            axis = 0 if self.batch_first else 1
            query, key, value = (t.unsqueeze(axis) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project_all(query, key, value, shared)
        mask = self._combined_mask(attn_mask, key_padding_mask, q)
        dropout = self.attention_dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            attended, weights = _attend_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            causal = is_causal and attn_mask is None
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        out = self._merge_heads(attended)
        if not self.batch_first:
            out = out.transpose(0, 1)
        if unbatched:
            out, weights = out.squeeze(axis), None if weights is None else weights.squeeze(0)
        return out, weights

    def _combined_mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """One additive mask in the dtype of q, or None."""
        mask = _additive(self._mask(attn_mask, q.shape[0]), q.dtype)
        if padding is None:
            return mask
        padded = _additive(padding, q.dtype)[:, None, None, :]
        return padded if mask is None else mask + padded


class FusedRankLoRAAttention(_PackedAttention):
    """Drop-in for open_clip's own `Attention` with its packed in_proj_weight; `fastlora.inject` makes it.

    Args, Raises: as `FusedRankLoRAMultiheadAttention`.
    """

    attn_drop: nn.Dropout
    out_drop: nn.Dropout

    def __init__(
        self, plain: nn.Module, parts: tuple[str, ...] = PARTS, rank: int = 16, **options: Unpack[AdapterOptions]
    ) -> None:
        super().__init__(plain, parts, rank, **options)
        source: Any = plain
        self.attn_drop, self.out_drop = source.attn_drop, source.out_drop

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """As open_clip's; a boolean mask marks what is attended to.

        Args:
            x: [batch, tokens, d].
            k_x: input of k where it is another one.
            v_x: input of v where it is another one.
            attn_mask: [tokens, tokens] or [batch * heads, tokens, tokens], boolean or additive.
        Returns:
            [batch, tokens, d].
        """
        k_x = x if k_x is None else k_x
        v_x = x if v_x is None else v_x
        q, k, v = self._project_all(x, k_x, v_x, x is k_x is v_x)
        dropout = self.attn_drop.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, self._mask(attn_mask, x.shape[0]), dropout)
        return self.out_drop(self._merge_heads(attended))


def is_attention(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether `module` is `nn.MultiheadAttention` or has the build of open_clip's `Attention`."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    named = ("in_proj_weight", "in_proj_bias", "out_proj", "num_heads", "attn_drop", "out_drop")
    return not isinstance(module, _PackedAttention) and all(hasattr(module, name) for name in named)


def adapt_attention(
    plain: nn.Module, parts: tuple[str, ...], rank: int, **options: Unpack[AdapterOptions]
) -> _PackedAttention:
    """The adapted twin of an attention module; `plain` gives up its parameters to it.

    Raises:
        TypeError: no attention of a kind that is known. ValueError: one with an option that is not supported.
    """
    if isinstance(plain, nn.MultiheadAttention):
        return FusedRankLoRAMultiheadAttention(plain, parts, rank, **options)
    if is_attention(plain):
        return FusedRankLoRAAttention(plain, parts, rank, **options)
    raise TypeError(f"a {type(plain).__name__} was given; nn.MultiheadAttention or open_clip's Attention is accepted.")


def refuse_unsupported(plain: nn.Module) -> None:
    """Raise ValueError for attention options whose computation these modules do not have."""
    extras = {
        "separate key and value widths (kdim, vdim)": plain.in_proj_weight is None,
        "bias_k / bias_v": getattr(plain, "bias_k", None) is not None,
        "add_zero_attn": getattr(plain, "add_zero_attn", False),
        "scaled cosine attention": getattr(plain, "logit_scale", None) is not None,
        "head_scale": getattr(plain, "head_scale", None) is not None,
        "qk_norm": not isinstance(getattr(plain, "ln_q", nn.Identity()), nn.Identity),
        "inner_norm": not isinstance(getattr(plain, "ln_inner", nn.Identity()), nn.Identity),
    }
    found = [name for name, present in extras.items() if present]
    if found:
        raise ValueError(
            f"{type(plain).__name__} uses {', '.join(found)}, which the adapted attention does not compute. "
            "Leave it out with where=..., or adapt its linear layers only."
        )


def _emptied(plain: Any) -> Any:
    plain.in_proj_weight = plain.in_proj_bias = None
    plain.out_proj = None
    return plain


@overload
def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)


def _attend_with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = F.dropout(weights, dropout)
    return weights @ v, weights
