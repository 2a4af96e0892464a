"""Curves instead of points: time and memory of a step against rank, tokens, classes, modules and tasks, ours and rivals.

    python bench/scaling.py run --out bench/results/scaling.json            CPU, quiet, twenty minutes
    python bench/scaling.py run --out FILE --only rank tokens               some curves
    python bench/scaling.py show --out bench/results/scaling.json --plot docs/scaling.png

One thread, float32. Rivals take turns; a point is the fastest of the rounds, in process time, and memory is counted: what
autograd keeps between forward and backward, parameters aside. A slope is the least-squares line through the points.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cost
import facts
import numpy as np
import rivals
import torch
from bench_rank_lora import saved_bytes
from bench_rank_lora import step as layer_step
from method_runs import markdown, write_json
from rivals import clip, steps
from shapes import Shape

SECONDS = 4.0  # that the rivals of a point take turns for
LAYER_RIVALS = ("ours module", "peft", "as released", "unsloth style", "compiled", "linear")
STEP_RIVALS = tuple(steps.STEPS)
# a text tower like that of the released code, which encodes 77 positions whatever the prompts are
MODEL = clip.Sizes(32, 8, 128, 128, 4, (2, 2), 64, 512, 77, 16, 16, 10)


@dataclass(frozen=True)
class Curve:
    """Cost against one quantity.

    Args:
        name, unit: of what varies. what: is measured, in words.
        values: from small to large; the first ones for a small run, too.
        rivals: who takes turns.
        make: (rival, value, small) -> (call, bytes kept by a call).
    """

    name: str
    unit: str
    what: str
    values: tuple[int, ...]
    rivals: tuple[str, ...]
    make: Callable[[str, int, bool], tuple[Callable[[], Any], int]]


def layer(rival: str, shape: Shape, small: bool) -> tuple[Callable[[], Any], int]:
    """Forward and backward of one layer; checked against float64."""
    operands = rivals.make_operands(shape, torch.float32, "cpu")
    case = rivals.build(rival, operands, small=small)
    if case.checked:
        rivals.Check(operands).worst(case)
    return layer_step(case), saved_bytes(case)


def model_step(rival: str, small: bool, **sizes: int) -> tuple[Callable[[], Any], int]:
    """A whole training step of a small CLIP of torch layers."""
    s = MODEL._replace(**sizes)
    torch.manual_seed(0)
    plain = clip.StandIn(s).requires_grad_(False)
    place = steps.OnCpu()
    call = steps.build(rival, place, plain, s, steps.make_batch(place, s), small=small)
    return call, cost.kept_bytes(call)


CURVES = (
    Curve(
        "rank", "rank", "forward and backward of a layer 768 -> 3072, 788 tokens", (1, 4, 16, 64, 128, 256),
        LAYER_RIVALS, lambda rival, rank, small: layer(rival, Shape("rank", 788, 768, 3072, rank), small),
    ),
    Curve(
        "tokens", "tokens", "forward and backward of a layer 768 -> 768, rank 16", (16, 64, 256, 1024, 4096),
        LAYER_RIVALS, lambda rival, rows, small: layer(rival, Shape("tokens", rows, 768, 768, 16), small),
    ),
    Curve(
        "classes", "classes", "training step of a small CLIP, 16 images, 48 adapters", (10, 30, 100, 300, 1000),
        STEP_RIVALS, lambda rival, classes, small: model_step(rival, small, classes=classes),
    ),
    Curve(
        "modules", "adapted matrices", "training step of a small CLIP, 16 images, 10 classes", (12, 24, 48, 96, 192),
        STEP_RIVALS, lambda rival, modules, small: model_step(rival, small, layers=modules // 12),
    ),
)  # fmt: skip


FLAT = ("rank", "tasks")  # curves that hardly rise
TASKS, TASK_METHODS = (1, 10, 20, 30, 40, 50), ("codyra", "sd_lora")


def measure(curve: Curve, small: bool) -> list[dict[str, Any]]:
    """Per value: rival -> seconds, bytes."""
    found = []
    for value in curve.values[: 2 if small else None]:
        made = {rival: curve.make(rival, value, small) for rival in curve.rivals}
        best = cost.fastest({rival: call for rival, (call, _) in made.items()}, 0.0 if small else SECONDS)
        found.append({"value": value} | {rival: {"seconds": best[rival], "bytes": made[rival][1]} for rival in made})
        tell(curve.name, value, best)
    return found


def tell(name: str, value: int, best: dict[str, float]) -> None:
    print(f"{name} {value}: {', '.join(f'{rival} {each * 1e3:.2f} ms' for rival, each in best.items())}", flush=True)


def measure_tasks(small: bool) -> list[dict[str, Any]]:
    """Per task of a long stream: a task's training and merge, and what the method holds beside the weights after it.

    CoDyRA merges every task; SD-LoRA keeps the directions of all of them. The fastest of three tasks counts.
    """
    import fastlora
    from fastlora.continual import Trainer
    from fastlora.continual.config import method_config

    values = (1, 2) if small else TASKS
    seconds: dict[str, list[float]] = {}
    held: dict[str, list[int]] = {}
    for name in TASK_METHODS:
        demo = fastlora.open_clip_demo()
        config = method_config(name, rank=4, iterations=3, batch_size=16)
        trainer = Trainer(demo.model, demo.tokenizer, _stream(values[-1] + 1), config, progress=False)
        seconds[name], held[name] = [], []
        for number, task in enumerate(trainer.stream.tasks, start=1):
            before = time.process_time()
            trainer._train(number, task)
            seconds[name].append(time.process_time() - before)
            held[name].append(sum(tensor.nbytes for tensor in trainer.method.state_dict().values()))
    found = []
    for value in values:
        best = {name: min(times[max(value - 2, 0) : value + 1]) for name, times in seconds.items()}
        found.append(
            {"value": value} | {name: {"seconds": best[name], "bytes": held[name][value - 1]} for name in best}
        )
        tell("tasks", value, best)
    return found


def _stream(tasks: int) -> Any:
    """Tasks of three classes and sixteen random images."""
    from fastlora.continual import Task, TaskStream
    from fastlora.continual.stream import InMemoryImages

    generator = torch.Generator().manual_seed(0)
    images = InMemoryImages(torch.randn(16, 3, 32, 32, generator=generator), torch.arange(16) % 3)
    classes = ("circle", "square", "star")
    made = [Task(f"task {i}", classes, ("a photo of a {}",), images, images) for i in range(1, tasks + 1)]
    return TaskStream("scaling", made)


def run(only: list[str] | None, small: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    curves = []
    for curve in CURVES:
        if not only or curve.name in only:
            about = {"name": curve.name, "unit": curve.unit, "what": curve.what, "rivals": list(curve.rivals)}
            curves.append(about | {"points": measure(curve, small)})
    if not only or "tasks" in only:
        about = {
            "name": "tasks",
            "unit": "tasks",
            "what": "training and merge of a task, 3 iterations, the demo's model",
        }
        curves.append(about | {"rivals": list(TASK_METHODS), "points": measure_tasks(small)})
    return {"command": "python bench/scaling.py run", "facts": facts.facts(), "curves": curves}


def slope(curve: dict[str, Any], rival: str, what: str) -> tuple[float, float]:
    """(cost of one unit more, share of the variance that the line explains)."""
    x = np.array([point["value"] for point in curve["points"]], dtype=float)
    y = np.array([point[rival][what] for point in curve["points"]], dtype=float)
    per_unit, start = np.polyfit(x, y, 1)
    rest, spread = ((y - start - per_unit * x) ** 2).sum(), ((y - y.mean()) ** 2).sum()
    return float(per_unit), float(1 - rest / spread) if spread else 1.0


def table(curve: dict[str, Any]) -> str:
    """Markdown: milliseconds and MiB at each value, and the slopes."""
    values, one = [point["value"] for point in curve["points"]], curve["unit"]
    lines = [["", *(f"{value:,}" for value in values), f"one more of {one}", "R²"]]
    for what, unit, factor, small_unit, small in (
        ("seconds", "ms", 1e3, "µs", 1e3),
        ("bytes", "MiB", 2**-20, "KiB", 2**10),
    ):
        for rival in curve["rivals"]:
            cells = [f"{point[rival][what] * factor:.2f}" for point in curve["points"]]
            per_unit, explained = slope(curve, rival, what)
            cells += [f"{per_unit * factor * small:.1f} {small_unit}", f"{explained:.2f}"]
            lines.append([f"{rival}, {unit}", *cells])
    return markdown(lines)


# one colour and marker a rival in every row; the two methods of the last row have no rival beside them
_PLACES = {"ours": 0, "ours module": 0, "as released": 1, "compiled": 2, "compiled, short texts": 2, "peft": 3}
_PLACES |= {"peft, short texts": 4, "unsloth style": 5, "unsloth style, short texts": 5, "linear": 7}
_PLACES |= {"codyra": 0, "sd_lora": 1}


def _scale(axes: Any, values: list[int], flat: bool) -> None:
    """Plain numbers on both axes; a flat curve on axes that are not logarithmic, from 0 on."""
    from matplotlib.ticker import FormatStrFormatter, NullFormatter

    if flat:
        axes.set_ylim(bottom=0)
    else:
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(values, [f"{value:,}" for value in values])


def draw(result: dict[str, Any], path: Path) -> None:
    """A row for each curve: time on the left, memory on the right."""
    import matplotlib
    from matplotlib.figure import Figure

    from fastlora.continual.drawing import COLOURS, STYLE, save

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.0, 2.6 * len(result["curves"])), layout="constrained")
        rows = figure.subplots(len(result["curves"]), 2, squeeze=False)
        for (left, right), curve in zip(rows, result["curves"]):
            for axes, what, factor in ((left, "seconds", 1e3), (right, "bytes", 2**-20)):
                for rival in curve["rivals"]:
                    place = _PLACES[rival]
                    x = [point["value"] for point in curve["points"]]
                    y = [point[rival][what] * factor for point in curve["points"]]
                    axes.plot(x, y, marker="osD^vPX*"[place], ms=4, lw=1.3, color=COLOURS[place], label=rival)
                axes.set(xlabel=curve["unit"], ylabel="ms" if what == "seconds" else "kept, MiB")
                _scale(axes, x, flat=curve["name"] in FLAT)
                axes.grid(True)
            left.set_title(curve["what"], loc="left")
            right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
        save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    names = [*(curve.name for curve in CURVES), "tasks"]
    parser.add_argument("--only", nargs="+", choices=names, help="curves to measure (run)")
    parser.add_argument("--small", action="store_true", help="two values, three rounds: shows that it runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write, or to show")
    parser.add_argument("--plot", type=Path, help="PNG to draw (show)")
    options = parser.parse_args()
    if options.what == "run":
        write_json(run(options.only, options.small), options.out)
    result = json.loads(options.out.read_text())
    for curve in result["curves"]:
        print(f"\n{curve['what']}\n\n{table(curve)}")
    if options.plot:
        draw(result, options.plot)


if __name__ == "__main__":
    main()
