"""Several processes that train one run: time of a step, and bytes that a step exchanges, counted.

    python bench/many_processes.py run --out bench/results/many_processes.json     CPU, quiet, four minutes
    python bench/many_processes.py show --docs docs/distributed.md                 the tables of the page

A step of CoDyRA on the embedded CLIP and random images, one thread a process, the same global batch whatever their number.
With more processes than cores they share them. The time is the wall time of process 0, median over the steps, of the quickest
of five rounds. "apart" are processes that take a share of the batch each and exchange nothing: what these cores can do at best.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from method_runs import markdown, replace_between, write_json

RESULT = Path(__file__).parent / "results" / "many_processes.json"
MODEL, RANK, IMAGES, CLASSES = "ViT-B-16", 16, 64, 100  # of the table of bytes
SIZES = (1, 2, 4)
BATCH, STEPS, WARM_UP, ROUNDS = 64, 20, 3, 5
NAMES = ("circle", "square", "star")
MARKS = ("<!-- volume -->", "<!-- end of volume -->"), ("<!-- steps -->", "<!-- end of steps -->")


@contextlib.contextmanager
def counting(found: dict[str, int]) -> Iterator[None]:
    """Within, `found` grows by the bytes of what collectives leave in every process; those of FSDP are gathers, too."""
    import torch.distributed as dist

    kinds = {"all_reduce": "reduced", "all_gather_into_tensor": "gathered", "all_gather_single": "gathered"}
    originals = {name: getattr(dist, name) for name in kinds if hasattr(dist, name)}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            found[kinds[name]] = found.get(kinds[name], 0) + (*arguments, *options.values())[0].nbytes
            return originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(dist, name, counted(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def step_bytes(parameters: int, width: int, images: int, classes: int) -> dict[str, int]:
    """What a step leaves in every process: the mean of all gradients; features and labels of all rows."""
    return {"reduced": 4 * parameters, "gathered": 4 * width * (images + classes) + 8 * images}


def sizes_of(name: str, rank: int) -> dict[str, int]:
    """Trainable parameters, width of the features and frozen parameters of the blocks, of a model that is not filled."""
    import open_clip
    import torch

    import fastlora

    with torch.device("meta"):
        model = open_clip.create_model(name, device="meta")
    return counts_of(model, fastlora.inject(model, rank).trainable_parameters)


def counts_of(model: Any, parameters: int) -> dict[str, int]:
    frozen = [p for tower in (model.transformer, model.visual.transformer) for p in tower.parameters()]
    blocks = sum(parameter.numel() for parameter in frozen if not parameter.requires_grad)
    return {"parameters": parameters, "width": model.visual.output_dim, "blocks": blocks}


def volume_table() -> str:
    """Markdown: bytes of a step, and what each process sends for them in a ring of W."""
    sizes = sizes_of(MODEL, RANK)
    ddp = step_bytes(sizes["parameters"], sizes["width"], IMAGES, CLASSES)
    rows = {
        "gradients of the adapters, all-reduced": (ddp["reduced"], 2),
        "features and labels, gathered": (ddp["gathered"], 1),
        "fsdp: frozen blocks in float32, gathered forward and backward": (2 * 4 * sizes["blocks"], 1),
    }
    lines = [["What", "Bytes a step", "Each of 2 processes sends", "Each of 8 processes sends"]]
    for what, (size, turns) in rows.items():
        sent = [turns * size * (w - 1) // w for w in (2, 8)]
        lines.append([what, f"{size:,}", *(f"{each:,}" for each in sent)])
    head = f"{MODEL}, rank {RANK} ({sizes['parameters']:,} parameters train), {IMAGES} images and {CLASSES} classes a step:"
    return f"{head}\n\n{markdown(lines)}"


def steps_table(result: dict[str, Any] | None) -> str:
    """Markdown: milliseconds a step by processes and way."""
    if result is None:
        return "Not measured yet: `python bench/many_processes.py run --out bench/results/many_processes.json`."
    facts, lines = result["facts"], [["Processes", "Way", "ms a step", "of one process", "Bytes a step"]]
    alone = result["rows"][0]["seconds"]
    for row in result["rows"]:
        exchanged = sum(row["bytes"].values())
        cells = [f"{row['seconds'] * 1e3:.1f}", f"{row['seconds'] / alone:.2f}", f"{exchanged:,}"]
        lines.append([str(row["processes"]), row["way"], *cells])
    where = f"{facts['device']}, {result['cores']} cores, torch {facts['torch']}, commit {facts['commit']}."
    what = f"CoDyRA on the embedded CLIP, {result['batch']} images a step, one thread a process, float32."
    return f"{where} {what}\n\n{markdown(lines, texts=2)}"


def run(small: bool) -> dict[str, Any]:
    import facts

    sizes = SIZES[: 2 if small else None]
    cases = [(size, way) for size in sizes for way in (("apart", "ddp", "fsdp") if size > 1 else ("alone",))]
    found: dict[tuple[int, str], list[tuple[float, dict[str, int]]]] = {case: [] for case in cases}
    for _ in range(1 if small else ROUNDS):  # in turn: what else the machine does changes from minute to minute
        for case in cases:
            seconds, exchanged = in_processes(*case, 2 if small else STEPS)
            found[case].append((seconds, exchanged))
            print(f"{case[0]} processes, {case[1]}: {seconds * 1e3:.1f} ms a step", flush=True)
    rows = [
        {"processes": size, "way": way, "seconds": times[0][0], "bytes": times[0][1], "rounds": [t[0] for t in times]}
        for (size, way), times in ((case, sorted(rounds, key=lambda each: each[0])) for case, rounds in found.items())
    ]
    conditions = {"cores": os.cpu_count(), "batch": BATCH, "steps": 2 if small else STEPS, "threads a process": 1}
    return {"command": "python bench/many_processes.py run", "facts": facts.facts(), **conditions, "rows": rows}


def in_processes(size: int, way: str, steps: int) -> tuple[float, dict[str, int]]:
    """(median seconds of a step, bytes of one) of process 0 of so many."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip", "fastlora.continual.trainer", "torch.distributed.fsdp"])
    answers = context.Queue()
    share, together = (BATCH // size, 1) if way == "apart" else (BATCH, size)
    processes = []
    for rank in range(size):
        own = str(rank % together)
        environment = place | {"WORLD_SIZE": str(together), "RANK": own, "LOCAL_RANK": own, "OMP_NUM_THREADS": "1"}
        processes.append(context.Process(target=_steps, args=(environment, way, share, steps, answers)))
    for process in processes:
        process.start()
    found = [answers.get() for _ in range(size // together)]
    for process in processes:
        process.join()
    return found[0]


def _steps(environment: dict[str, str], way: str, batch: int, steps: int, answers: Any) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    import fastlora
    from fastlora.continual import CoDyRAConfig, InMemoryImages, Task, TaskStream, Trainer
    from fastlora.continual.distributed import leave
    from fastlora.continual.step import training_step

    pixels = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = InMemoryImages(pixels, torch.arange(batch) % len(NAMES))
    stream = TaskStream("steps", [Task("shapes", NAMES, ("a photo of a {}",), images, images)])
    demo, config = fastlora.open_clip_demo(), CoDyRAConfig(batch_size=batch)
    options = {"device": "cpu", "parallel": "fsdp" if way == "fsdp" else "ddp", "progress": False}
    trainer = Trainer(demo.model, demo.tokenizer, stream, config, **options)
    ctx, source = trainer.begin(1, trainer.stream.tasks[0])
    taken: list[float] = []
    exchanged: dict[str, int] = {}
    with training_step(trainer.method, ctx, trainer.config) as step:
        for iteration in range(WARM_UP + steps):
            start = time.perf_counter()
            step(iteration, source.batch(iteration))
            taken.append(time.perf_counter() - start)
        with counting(exchanged):
            step(iteration + 1, source.batch(iteration + 1))
    if trainer.world.first:
        answers.put((statistics.median(taken[WARM_UP:]), exchanged))
    leave(trainer.world)


def show(page: Path | None, result: dict[str, Any] | None) -> None:
    for (mark, end), text in zip(MARKS, (volume_table(), steps_table(result))):
        print(f"{text}\n")
        if page:
            replace_between(page, mark, end, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--out", type=Path, default=RESULT, help=f"JSON to write, or to show (default: {RESULT.name})")
    parser.add_argument("--docs", type=Path, help="page whose tables are replaced (show)")
    parser.add_argument("--small", action="store_true", help="1 and 2 processes, two steps: shows that it runs")
    options = parser.parse_args()
    if options.what == "run":
        write_json(run(options.small), options.out)
    show(options.docs, json.loads(options.out.read_text()) if options.out.exists() else None)


if __name__ == "__main__":
    main()
