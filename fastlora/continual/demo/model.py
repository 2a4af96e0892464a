"""The tiny CLIP of the demo: an open_clip model of about 1.5 M parameters with its tokenizer and transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fastlora.continual.demo.tokenizer import CONTEXT, WordTokenizer
from fastlora.continual.demo.world import SIZE

WEIGHTS = Path(__file__).with_name("tiny_clip.safetensors")
MEAN, STD = 0.5, 0.25

CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": WordTokenizer().vocab_size,
        "width": 128,
        "heads": 4,
        "layers": 3,
    },
}


class OpenClipDemo(NamedTuple):
    """The embedded model and what belongs to it.

    Attributes:
        model: open_clip.CLIP, float32, in eval mode.
        tokenizer: list of texts -> [n, context] int64.
        preprocess: PIL image -> [3, 32, 32] float32.
    """

    model: open_clip.CLIP
    tokenizer: WordTokenizer
    preprocess: Callable[..., torch.Tensor]


def build_model() -> open_clip.CLIP:
    """The architecture with random weights drawn from torch's global generator."""
    config = copy.deepcopy(CONFIG)
    return open_clip.CLIP(
        config["embed_dim"],
        open_clip.CLIPVisionCfg(**config["vision_cfg"]),
        open_clip.CLIPTextCfg(**config["text_cfg"]),
    )


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, 3, H, W]: what `preprocess` does, for a whole array of 32 px pictures."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float()
    return images.div_(255.0).sub_(MEAN).div_(STD)


def load_weights(model: open_clip.CLIP, path: Path) -> None:
    """Fill the model, strictly. RuntimeError when the file is missing, unreadable, or of another architecture."""
    remake = "Reinstall fastlora, or remake it with `python -m fastlora.continual.demo.pretrain --out DIR`."
    if not path.is_file():
        raise RuntimeError(f"{path} is missing; the demo needs the weights that ship with the package. {remake}")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise RuntimeError(f"{path} is not a readable safetensors file ({error}). {remake}") from error
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)


def open_clip_demo() -> OpenClipDemo:
    """The pretrained tiny CLIP.

    Returns:
        OpenClipDemo, a tuple of model, tokenizer and preprocess. Weights are stored in float16 and held in float32.
    Raises:
        RuntimeError: the shipped weights are missing or damaged.
    """
    with torch.random.fork_rng(devices=[]):  # building draws random weights; the caller's stream must not notice
        model = build_model()
    load_weights(model, WEIGHTS)
    preprocess = open_clip.image_transform(SIZE, is_train=False, mean=(MEAN,) * 3, std=(STD,) * 3)
    return OpenClipDemo(model.eval(), WordTokenizer(), preprocess)
