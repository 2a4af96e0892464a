"""Features of images and texts as losses and figures want them, whatever dtype the model computes in."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastlora.continual.text import encode_text


def image_features(model: Any, images: Tensor) -> Tensor:
    """[B, D], unit rows, float32; images [B, 3, H, W] in any floating dtype."""
    dtype = next(model.visual.parameters()).dtype
    return F.normalize(model.encode_image(images.to(dtype)).float(), dim=-1)


def logit_scale(model: Any) -> Tensor:
    """What cosines are multiplied with, 0-d, detached."""
    return model.logit_scale.detach().exp()


def text_features(model: Any, tokens: Tensor) -> Tensor:
    """[C, D], unit rows, float32; tokens [C, L] integers, which `cut_context` may have cut."""
    return F.normalize(encode_text(model, tokens).float(), dim=-1)
