"""How a decoded image becomes input of the model: open_clip's transforms, in parts that threads and a cache can share.

open_clip's training transform draws its crop from torch's global generator; with threads the draws would come in any
order. Here the crop is drawn first, from a generator of the batch, and then cut: the same boxes as torchvision's from
the same generator.
"""

from __future__ import annotations

import math
import platform
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import PIL
import torch
import torchvision
from PIL import Image, ImageFile, features
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomResizedCrop
from torchvision.transforms import functional as F

from fastlora.continual.batches import generator_for

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class Transforms:
    """Parts of open_clip's transforms.

    Args:
        fit: RGB image -> RGB image of the model's size, for tests: resize and centre crop.
        size: (height, width) of the model's input. scale, ratio, interpolation: of the random crops in training.
        mean, std: per channel, of pixels in [0, 1].
    """

    fit: Callable[[Image.Image], Image.Image]
    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: InterpolationMode
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, train: Compose, test: Compose) -> Transforms:
        """From the pair that open_clip.create_model_and_transforms gives."""
        crop, normalize = train.transforms[0], test.transforms[-1]
        assert isinstance(crop, RandomResizedCrop) and isinstance(normalize, Normalize), (train, test)
        return cls(
            Compose(test.transforms[:-2]),  # the last two: to a tensor, normalise
            tuple(crop.size),
            tuple(crop.scale),
            tuple(crop.ratio),
            crop.interpolation,
            tuple(normalize.mean),
            tuple(normalize.std),
        )

    def draw(self, height: int, width: int, generator: torch.Generator) -> Box:
        """The random crop of a training image."""
        return random_box(height, width, self.scale, self.ratio, generator)

    def cut(self, image: Image.Image, box: Box) -> Tensor:
        """uint8 [3, H, W]: the box, resized to the model's input."""
        return to_pixels(F.resized_crop(image, *box, list(self.size), self.interpolation))

    def fitted(self, image: Image.Image) -> Tensor:
        """uint8 [3, H, W]: what a test image is before it is normalised."""
        return to_pixels(self.fit(image))

    def recipe(self) -> str:
        """All that `fitted` and `cut` depend on beside the image, its file's decoder included; equal for equal pixels."""
        steps = (
            [_described(step) for step in self.fit.transforms] if isinstance(self.fit, Compose) else [repr(self.fit)]
        )
        text = "\n".join([*steps, f"cut {self.size} {self.interpolation}", *_libraries()])
        # what shows its address cannot be told from others that were there before: a recipe of this process alone
        return f"{text}\n{secrets.token_hex()}" if " at 0x" in text else text

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32, as open_clip's last two transforms do for single images, bit for bit."""
        return F.normalize(pixels.float().div_(255), self.mean, self.std, inplace=True)


def _described(step: Any) -> str:
    """Class and parameters; the text that some of open_clip's transforms give of themselves leaves parameters out."""
    given = {key: value for key, value in vars(step).items() if key != "training" and not key.startswith("_")}
    return f"{type(step).__module__}.{type(step).__qualname__} {sorted(given.items())} {step!r}"


def _libraries() -> list[str]:
    codecs = [
        f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "jpg", "jpg_2000", "webp", "avif", "libtiff")
    ]
    packages = [f"{package.__name__} {package.__version__}" for package in (PIL, torchvision, open_clip)]
    return [*packages, *codecs, platform.machine(), f"truncated {ImageFile.LOAD_TRUNCATED_IMAGES}"]


def to_pixels(image: Image.Image) -> Tensor:
    """uint8 [3, H, W] of an RGB image."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def random_box(height: int, width: int, scale: Any, ratio: Any, generator: torch.Generator) -> Box:
    """A box of a random share of the area and a random aspect ratio; after ten that do not fit, the central one.

    Draws as torchvision's RandomResizedCrop does, in that order.
    """
    area, bounds = height * width, torch.log(torch.tensor(ratio))
    for _ in range(10):
        target = area * torch.empty(1).uniform_(scale[0], scale[1], generator=generator).item()
        aspect = torch.exp(torch.empty(1).uniform_(float(bounds[0]), float(bounds[1]), generator=generator)).item()
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(height - h + 1, (1,), generator=generator).item()
            left = torch.randint(width - w + 1, (1,), generator=generator).item()
            return int(top), int(left), h, w
    narrow, wide = min(ratio), max(ratio)
    h, w = height, width
    if width < narrow * height:
        h = round(width / narrow)
    elif width > wide * height:
        w = round(height * wide)
    return (height - h) // 2, (width - w) // 2, h, w


def fixed_generator(index: int) -> torch.Generator:
    """For crops of images that are looked at outside of any training order."""
    return generator_for(0, "crop", index)
