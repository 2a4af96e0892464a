"""The calls that an adapted CLIP makes of the kernels, without its weights."""

from __future__ import annotations

import difflib
from dataclasses import replace

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastlora.adapt import inject
from fastlora.continual.config import UsageError
from fastlora.continual.demo.model import build_model
from fastlora.tune import Call, calls_of


def clip_calls(name: str | None, rank: int, where: str, images: int, texts: int, dtype: str) -> list[Call]:
    """Calls of an open_clip architecture with adapters, for a batch of images and one of texts.

    Nothing is downloaded and nothing computed: the model runs on fake tensors.

    Args:
        name: as open_clip lists it; None for the embedded tiny CLIP.
        rank, where: as for `fastlora.inject`. dtype: of the calls, such as "bfloat16".
    Raises:
        UsageError: open_clip has no architecture of that name.
    """
    model = _architecture(name)
    inject(model, rank, where=where)
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pixels = torch.empty(images, 3, height, width)
        tokens = torch.empty(texts, model.context_length, dtype=torch.long)
        calls = calls_of(model, pixels, tokens)
    return [replace(call, dtype=getattr(torch, dtype)) for call in calls]


def _architecture(name: str | None) -> open_clip.CLIP | open_clip.CustomTextCLIP:
    known = open_clip.list_models()
    if name is not None and name not in known:
        near = difflib.get_close_matches(name, known, 3) or known[:3]
        raise UsageError(f"--model {name!r} is no architecture of open_clip; near: {', '.join(near)}.")
    return build_model() if name is None else open_clip.create_model(name)
