"""CLIP for the training step: open_clip's where it is installed, else a stand-in of torch layers."""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastlora


class Sizes(NamedTuple):
    """Of a CLIP with a vision transformer."""

    image: int
    patch: int
    vision_width: int
    text_width: int
    layers: int
    heads: tuple[int, int]
    embed: int
    vocabulary: int
    context: int
    rank: int
    images: int
    classes: int


B16 = Sizes(224, 16, 768, 512, 12, (12, 8), 512, 49408, 77, 16, 64, 100)
TINY = Sizes(32, 8, 32, 32, 2, (2, 2), 16, 96, 16, 4, 4, 6)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Vision(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        width, tokens = s.vision_width, (s.image // s.patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, s.patch, s.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Transformer(width, s.heads[0], s.layers)
        self.proj = nn.Parameter(torch.randn(width, s.embed) * width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class StandIn(nn.Module):
    """CLIP of torch layers, with open_clip's names where fastlora.inject looks for them."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        width = s.text_width
        self.visual = _Vision(s)
        self.token_embedding = nn.Embedding(s.vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(s.context, width) * 0.01)
        self.transformer = _Transformer(width, s.heads[1], s.layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, s.embed) * width**-0.5)
        causal = torch.full((s.context, s.context), -math.inf).triu_(1)
        self.register_buffer("attn_mask", causal, persistent=False)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.transformer(x, self.attn_mask[:length, :length].to(x.dtype))
        rows = x[torch.arange(len(x), device=x.device), tokens.argmax(-1)]
        return self.ln_final(rows) @ self.text_projection


def make_model(small: bool) -> tuple[nn.Module, Sizes, str]:
    """The model on the CPU, its sizes, and in words which one it is."""
    torch.manual_seed(0)
    sizes = TINY if small else B16
    if importlib.util.find_spec("open_clip") is None:
        return StandIn(sizes), sizes, "stand-in of torch layers (open_clip is not installed)"
    if small:
        model = fastlora.open_clip_demo().model
        return model, sizes._replace(context=model.context_length, vocabulary=model.vocab_size), "open_clip, tiny"
    import open_clip

    return open_clip.create_model("ViT-B-16"), sizes, "open_clip ViT-B-16, random weights"
