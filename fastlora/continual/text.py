"""Text features of open_clip models without the padding: the context is cut after the longest prompt.

A causal tower that pools at the end-of-text token never looks behind it, so tokens (and positions) after the last
end-of-text of a batch change nothing. Cutting 77 to 12 does the same sum over fewer rows: exact in real arithmetic; in
float32 the features differ by rounding alone, because matrix products of another size add in another order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn


class _Tower(NamedTuple):
    module: Any  # holds token_embedding, positional_embedding, transformer, ln_final, text_projection, attn_mask
    pool_type: str
    eos_id: Any  # int with pool_type "eos"


def why_uncut(model: Any) -> str | None:
    """Why the context of `model` cannot be cut, or None where it can."""
    tower = _tower(model)
    if tower is None:
        return f"the text tower of {type(model).__name__} is not one of open_clip's CLIP or TextTransformer"
    if tower.pool_type not in ("argmax", "eos"):
        return f"it pools with {tower.pool_type!r}, not at the end-of-text token"
    if tower.module.attn_mask is None:
        return "its attention is not causal: padding reaches the pooled token"
    if getattr(tower.module, "cls_emb", None) is not None:
        return "it appends a class token after the padding"
    return None


def cut_context(model: Any, tokens: Tensor) -> Tensor:
    """Tokens up to and including the last end-of-text of the batch.

    Args:
        tokens: [n, context] integers. On a GPU this waits for the device: cut once per task, not once per step.
    Returns:
        A view [n, longest], or `tokens` itself where `why_uncut` gives a reason.
    """
    tower = _tower(model)
    if tower is None or why_uncut(model) is not None or len(tokens) == 0:
        return tokens
    return tokens[:, : int(_end_of_text(tower, tokens).max()) + 1]


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """`model.encode_text` that also takes tokens from `cut_context`.

    Args:
        tokens: [n, L] integers, L at most the model's context length.
    Returns:
        [n, D] in the dtype of the model. Within rounding of `model.encode_text` on the uncut tokens.
    Raises:
        ValueError: more tokens than the model has positions.
    """
    tower = _tower(model)
    if tower is None or why_uncut(model) is not None:
        return model.encode_text(tokens)
    text, length = tower.module, tokens.shape[1]
    if length > len(text.positional_embedding):
        raise ValueError(
            f"tokens has shape {list(tokens.shape)}; this model has {len(text.positional_embedding)} positions. "
            "Tokenize with the model's own tokenizer or a shorter context_length."
        )
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)  # [n, L, width]
    x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
    # the final norm acts on each row alone, so the pooled rows are enough
    x = text.ln_final(x[torch.arange(len(x), device=x.device), _end_of_text(tower, tokens)])  # [n, width]
    projection = text.text_projection
    if isinstance(projection, nn.Linear):
        return projection(x)
    return x if projection is None else x @ projection


def _tower(model: Any) -> _Tower | None:
    if isinstance(model, CLIP):
        return _Tower(model, model.text_pool_type, getattr(model, "text_eos_id", None))
    if isinstance(model, CustomTextCLIP) and isinstance(model.text, TextTransformer):
        return _Tower(model.text, model.text.pool_type, getattr(model.text, "eos_id", None))
    return None


def _end_of_text(tower: _Tower, tokens: Tensor) -> Tensor:
    """[n]: position at which open_clip pools; with 'argmax' the largest token id is the end of the text."""
    return torch.eq(tokens, tower.eos_id).int().argmax(dim=-1) if tower.pool_type == "eos" else tokens.argmax(dim=-1)
