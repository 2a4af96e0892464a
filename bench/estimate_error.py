"""How far `fastlora doctor --estimate` is off: time and memory of a training step, estimated and measured on this machine.

python bench/estimate_error.py --out bench/results/estimate_error.json          CPU, quiet, two minutes
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cost
import facts
import open_clip
import torch
from method_runs import markdown, write_json

import fastlora
from fastlora.continual import estimate
from fastlora.continual.features import image_features, text_features
from fastlora.continual.losses import contrastive_loss
from fastlora.optim import ProxAdamW

STEPS = (
    estimate.Wanted("ViT-B-32", images=8, classes=20),
    estimate.Wanted("ViT-B-16", images=8, classes=20),
    estimate.Wanted("ViT-L-14", images=2, classes=10),
)
SMALL = (estimate.Wanted("ViT-S-32-alt", images=1, classes=2),)


def measure(wanted: estimate.Wanted, seconds: float) -> dict[str, float]:
    """Process seconds of the fastest step, and bytes that autograd keeps."""
    torch.manual_seed(0)
    model: Any = open_clip.create_model(wanted.model).requires_grad_(False)
    fastlora.inject(model, rank=wanted.rank)
    optimizer, size = ProxAdamW(model, lr=1e-4), model.visual.image_size
    images = torch.randn(wanted.images, 3, *(size if isinstance(size, tuple) else (size, size)))
    tokens = torch.randint(1, 1000, (wanted.classes, wanted.prompt_tokens))
    labels = torch.arange(wanted.images) % wanted.classes

    def step() -> None:
        features = image_features(model, images), text_features(model, tokens)
        optimizer.zero_grad()
        contrastive_loss(*features, labels, model.logit_scale.detach().exp()).backward()
        optimizer.step()

    return {"seconds": cost.fastest({"step": step}, seconds, rounds=1)["step"], "kept": cost.kept_bytes(step)}


def compare(wanted: estimate.Wanted, seconds: float) -> dict[str, Any]:
    found = estimate.estimate(wanted)
    rate = estimate.rate_here(found.product, torch.float32)
    estimated = {"seconds": found.operations / rate, "kept": found.memory["kept for backward"]}
    told = f"{wanted.model}, {wanted.images} images, {wanted.classes} classes"
    return {"step": told, "estimated": estimated, "measured": measure(wanted, seconds), "rate": rate}


def table(result: dict[str, Any]) -> str:
    """Markdown: estimated, measured, and their ratio, of time and of memory."""
    lines = [["Training step", "estimated, s", "measured, s", "ratio", "estimated, MiB", "measured, MiB", "ratio"]]
    for row in result["steps"]:
        cells = []
        for what, factor, digits in (("seconds", 1.0, 2), ("kept", 2**-20, 0)):
            pair = [row[how][what] * factor for how in ("estimated", "measured")]
            cells += [*(f"{value:,.{digits}f}" for value in pair), f"{pair[0] / pair[1]:.2f}"]
        lines.append([row["step"], *cells])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one small step, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = [compare(wanted, 0.0 if options.small else 10.0) for wanted in (SMALL if options.small else STEPS)]
    result = {"command": "python bench/estimate_error.py", "facts": facts.facts(), "steps": steps}
    write_json(result, options.out)
    print(table(result))


if __name__ == "__main__":
    main()
