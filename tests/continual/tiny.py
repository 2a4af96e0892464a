"""A CLIP of a few thousand parameters and a stream of random images: seconds, not minutes."""

from __future__ import annotations

import torch
from open_clip.model import CLIP, CustomTextCLIP

from fastlora.continual.stream import InMemoryImages, Task, TaskStream

CONTEXT, END_OF_TEXT = 16, 63


def tokenize(texts: list[str]) -> torch.Tensor:
    """One token per word, the end-of-text token (largest id), zeros."""
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [1 + sum(map(ord, word)) % 60 for word in text.split()] + [END_OF_TEXT]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def tiny_clip(custom_text: bool = False, layers: int = 1, **text_options) -> torch.nn.Module:
    torch.manual_seed(0)
    vision = dict(width=32, head_width=16, layers=layers, patch_size=8, image_size=16)
    text = dict(width=32, heads=2, layers=layers, context_length=CONTEXT, vocab_size=64) | text_options
    model = (CustomTextCLIP if custom_text else CLIP)(32, vision, text)
    with torch.no_grad():
        for parameter in model.parameters():  # open_clip's init leaves the towers nearly linear and biases at 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tiny_task(name: str, classes: int, shots: int = 8, templates: int = 2, noise: float = 0.3, seed: int = 0) -> Task:
    """Classes are random patterns; images are noisy copies."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 3, 16, 16, generator=generator)

    def images(per_class: int) -> InMemoryImages:
        labels = torch.arange(classes).repeat_interleave(per_class)
        return InMemoryImages(
            patterns[labels] + noise * torch.randn(len(labels), 3, 16, 16, generator=generator), labels
        )

    forms = ("a photo of a {}", "the {} in a large picture", "{}")[:templates]
    return Task(name, tuple(f"{name}{'abcdefgh'[i]}" for i in range(classes)), forms, images(shots), images(5))


def tiny_stream(**options) -> TaskStream:
    tasks = [tiny_task("red", 3, seed=1), tiny_task("green", 4, seed=2), tiny_task("blue", 2, seed=3)]
    return TaskStream("tiny", tasks, held_out=tiny_task("grey", 5, seed=4), **options)
