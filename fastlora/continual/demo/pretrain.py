"""Contrastive pretraining of the demo's tiny CLIP: `python -m fastlora.continual.demo.pretrain --out DIR --seed 0`.

Pictures and captions are rendered on the fly, so no picture is seen twice. Written to DIR: tiny_clip.safetensors
(float16), tiny_clip.csv (loss by step) and tiny_clip.json (settings, versions, SHA-256, and the zero-shot accuracy of
the weights as stored). The bytes repeat only with the same library versions, kind of CPU and thread count.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastlora.continual.demo import tasks
from fastlora.continual.demo.captions import caption
from fastlora.continual.demo.model import build_model, load_weights, normalise
from fastlora.continual.demo.tokenizer import WordTokenizer
from fastlora.continual.demo.world import render, sample_scene
from fastlora.continual.stream import InMemoryImages, Task

MAX_LOGIT_SCALE = math.log(100.0)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Settings of a run. Raises ValueError when steps or batch cannot train a contrastive model."""

    seed: int = 0
    steps: int = 2000
    batch: int = 128
    lr: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; it must be 1 or more. Give --steps 2000 for the shipped weights.")
        if self.batch < 2:
            raise ValueError(f"batch is {self.batch}; a contrastive loss needs 2 or more. Give --batch 128.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more. Give another seed.")


def contrastive_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over the pairs of a batch.

    Args:
        image, text: [n, D] unit features.
        scale: factor of the similarities.
        same: [n, n] bool, True where two captions are equal: such an off-diagonal pair is no negative and is left out.
    """
    logits = scale * image @ text.T
    logits = logits.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), -torch.inf)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def make_batch(
    rng: np.random.Generator, n: int, tokenizer: WordTokenizer
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [n, 3, 32, 32], tokens [n, context], and which captions are equal [n, n]."""
    scenes = [sample_scene(rng) for _ in range(n)]
    images = normalise(render(scenes, rng))
    tokens = tokenizer([caption(scene, rng) for scene in scenes])
    return images, tokens, (tokens[:, None] == tokens[None]).all(dim=-1)


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = min(config.warmup, max(1, config.steps // 10))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def train(config: PretrainConfig, echo_every: int = 100) -> tuple[torch.nn.Module, list[tuple[int, float, float]]]:
    """Returns the model in eval mode and rows of (step, loss, learning rate)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model().train()
    tokenizer = WordTokenizer()
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((config.seed, 0x77061D))))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    rows = []
    for step in range(config.steps):
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, tokens, same = make_batch(rng, config.batch, tokenizer)
        features = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        loss = contrastive_loss(*features, model.logit_scale.exp(), same)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        rows.append((step, loss.item(), lr))
        if (step + 1) % echo_every == 0:
            mean = sum(row[1] for row in rows[-echo_every:]) / echo_every
            print(f"step {step + 1:5d}/{config.steps}  loss {mean:.3f}", flush=True)
    return model.eval(), rows


@torch.no_grad()
def zero_shot(model: Any, tokenizer: WordTokenizer, task: Task) -> float:
    """Accuracy in percent on the test set over the task's classes; class features are the mean over all templates."""
    images = task.test
    assert isinstance(images, InMemoryImages)
    heads = []
    for template in task.templates:
        heads.append(model.encode_text(tokenizer([template.format(name) for name in task.classes]), normalize=True))
    classes = F.normalize(torch.stack(heads).mean(dim=0), dim=-1)
    predicted = (model.encode_image(images.images, normalize=True) @ classes.T).argmax(dim=1)
    return 100.0 * (predicted == images.labels).float().mean().item()


def _versions() -> dict[str, str]:
    modules = {"torch": torch, "open_clip": open_clip, "numpy": np, "pillow": PIL}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in modules.items()}}


def write(
    model: torch.nn.Module, rows: list[tuple[int, float, float]], config: PretrainConfig, seconds: float, out: Path
) -> dict[str, Any]:
    """Store weights, log and metadata in `out`; returns the metadata."""
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "tiny_clip.safetensors"
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, weights)
    with open(out / "tiny_clip.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "loss", "lr"))
        writer.writerows((step, f"{loss:.4f}", f"{lr:.3e}") for step, loss, lr in rows)
    load_weights(model, weights)  # what is measured is what is stored
    tokenizer, stream = WordTokenizer(), tasks.demo_stream()
    assert stream.held_out is not None
    metadata = {
        **dataclasses.asdict(config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "held_out": round(zero_shot(model, tokenizer, stream.held_out), 2),
        "zero_shot": {task.name: round(zero_shot(model, tokenizer, task), 2) for task in stream.tasks},
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (out / "tiny_clip.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return metadata


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.continual.demo.pretrain", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights, the log and the metadata")
    for field in dataclasses.fields(PretrainConfig):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help="default: %(default)s")
    values = vars(parser.parse_args(arguments))
    out = values.pop("out")
    try:
        config = PretrainConfig(**values)
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    model, rows = train(config)
    metadata = write(model, rows, config, time.perf_counter() - start, out)
    print(json.dumps({key: metadata[key] for key in ("held_out", "zero_shot", "seconds", "sha256")}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
