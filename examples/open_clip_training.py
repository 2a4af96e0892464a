"""fastlora in open_clip's own training loop, and the result as a plain open_clip checkpoint.

    python examples/open_clip_training.py [--epochs 2] [--out tiny_adapted.safetensors]

`fastlora.inject` is all that open_clip's code has to know of: `train_one_epoch` is the function of open_clip_train that
`python -m open_clip_train.main` runs. The kappa schedule rides on its scheduler. Model and pictures are those that ship
with fastlora, so that nothing is downloaded; for your own run write e.g. "ViT-B-16" and "openai" in the place of NAME and
WEIGHTS, and take the data from `open_clip_train.data.get_data(args, (preprocess_train, preprocess_val))`.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip_train.distributed import init_distributed_device
from open_clip_train.params import parse_args
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from safetensors.torch import save_file

import fastlora
from fastlora.continual.demo.captions import caption
from fastlora.continual.demo.model import CONFIG, WEIGHTS, normalise
from fastlora.continual.demo.tokenizer import WordTokenizer
from fastlora.continual.demo.world import Look, render, sample_scene

NAME = "fastlora-tiny"


@dataclass
class Data:
    """What open_clip's loop asks of its data (open_clip_train.data.DataInfo)."""

    dataloader: torch.utils.data.DataLoader

    def set_epoch(self, epoch: int) -> None:
        """The order of the pictures is the DataLoader's business."""


def register_model() -> None:
    """Makes the tiny model known to open_clip under NAME."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{NAME}.json"
        path.write_text(json.dumps(CONFIG))
        open_clip.add_model_config(path)


def captioned_pictures(count: int, batch_size: int, seed: int = 0) -> Data:
    """Scenes that the model knows, in a light that it does not."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    images = normalise(render(scenes, rng, Look(inverted=True)))
    texts = WordTokenizer()([caption(scene, rng) for scene in scenes])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, texts), batch_size, shuffle=True)
    loader.num_samples, loader.num_batches = count, len(loader)
    return Data(loader)


def train(model: torch.nn.Module, data: Data, args: argparse.Namespace) -> None:
    """What open_clip_train.main does between the building of the model and the saving of checkpoints."""
    total = args.epochs * data.dataloader.num_batches // args.accum_freq
    optimizer = fastlora.optim.ProxAdamW(model, lr=args.lr)
    cosine = cosine_lr(optimizer, args.lr, args.warmup, total)
    kappa = fastlora.optim.KappaSchedule.for_shrink(0.65, total=total)

    def scheduler(step: int) -> None:
        cosine(step)
        optimizer.kappa = kappa.kappa(step)

    loss = open_clip.ClipLoss()
    for epoch in range(args.epochs):
        train_one_epoch(model, {"train": data}, loss, epoch, optimizer, None, scheduler, None, args)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("tiny_adapted.safetensors"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    # open_clip's own arguments, with its defaults
    args = parse_args(["--device", "cpu", "--precision", "fp32", "--lr", "1e-3", "--warmup", "0", "--batch-size", "64"])
    args.epochs, args.distill, args.wandb = options.epochs, False, False
    init_distributed_device(args)

    register_model()
    model = open_clip.create_model(NAME, pretrained=str(WEIGHTS), output_dict=True)
    data = captioned_pictures(options.pictures, args.batch_size)
    images, texts = next(iter(data.dataloader))

    print(fastlora.inject(model, rank=16))
    train(model, data, args)
    print(f"mean active rank {fastlora.rank_report(model.eval()).mean_active:.1f} of 16")
    with torch.no_grad():
        adapted = model(images, texts)["image_features"]

    fastlora.prune(model)
    fastlora.merge(model)
    save_file(fastlora.remove(model).state_dict(), options.out)
    plain = open_clip.create_model(NAME, pretrained=str(options.out), output_dict=True).eval()
    with torch.no_grad():
        difference = (plain(images, texts)["image_features"] - adapted).abs().max()
    print(
        f"{options.out}: a plain open_clip checkpoint; its features differ from the adapted model's by {difference:.1e}"
    )


if __name__ == "__main__":
    main()
