"""Several seeds of one run, each in a process of its own. Imports torch where it has to count GPUs, and nowhere else."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from fastlora.continual.arguments import TrainArguments, options_of

_SECONDS_TO_STOP = 10.0


def commands(arguments: TrainArguments) -> dict[int, list[str]]:
    """seed -> the command that trains it into OUT/seedN; GPUs are dealt out in turn."""
    devices = _devices(arguments.run.device)
    found = {}
    for turn, seed in enumerate(arguments.seeds):
        run = dataclasses.replace(arguments.run, seed=seed, device=devices[turn % len(devices)])
        options = [*options_of(run), f"--out={arguments.out / f'seed{seed}'}"]
        found[seed] = [sys.executable, "-m", "fastlora.cli", "train", *options]
        found[seed] += ["--resume"] if arguments.resume else []
    return found


def default_processes(device: str) -> int:
    """One for each GPU; on a CPU one for each core, or for each OMP_NUM_THREADS cores where that is set."""
    devices = _devices(device)
    if any(name.startswith("cuda") for name in devices):
        return len(devices)
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return max(1, len(os.sched_getaffinity(0)) // (int(threads) if threads.isdigit() and int(threads) else 1))


def run_all(seeds: Mapping[int, Sequence[str]], processes: int, label: str) -> dict[int, int]:
    """Run one command a seed, `processes` at a time, with one thread each unless OMP_NUM_THREADS says otherwise.

    What they write to stderr is passed on behind "seed N | ", and of stdout the lines of progress, which start with
    `label`. One that fails does not stop the others; an exception here, such as Ctrl-C, stops them all with SIGTERM.

    Returns:
        Exit code by seed.
    """
    family = _Family(label)
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        try:
            codes = {seed: pool.submit(family.run, seed, command) for seed, command in seeds.items()}
            return {seed: code.result() for seed, code in codes.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            family.stop()
            raise


class _Family:
    """Processes that share an output and an end."""

    def __init__(self, label: str) -> None:
        self._label, self._lock, self._stopped = label, threading.Lock(), False
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, seed: int, command: Sequence[str]) -> int:
        with self._lock:
            if self._stopped:
                return 1
            # a session of its own: Ctrl-C in the terminal reaches this process alone, which stops the others in order
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | os.environ,
            )
            self._processes.append(process)
        assert process.stdout is not None and process.stderr is not None
        errors = threading.Thread(target=self._pass_on, args=(seed, process.stderr, sys.stderr, ""))
        errors.start()
        self._pass_on(seed, process.stdout, sys.stdout, self._label)
        errors.join()
        return process.wait()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._processes:
            try:
                process.wait(_SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()

    def _pass_on(self, seed: int, source: IO[str], target: IO[str], start: str) -> None:
        for line in source:
            if line.startswith(start):
                with self._lock:
                    print(f"seed {seed} | {line}", end="", file=target, flush=True)


def _devices(name: str) -> list[str]:
    """The devices to deal out: every GPU where any will do, else the one that was asked for."""
    if name not in ("auto", "cuda"):
        return [name]
    import torch

    if not torch.cuda.is_available():
        return [name]
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def check_directories(arguments: TrainArguments) -> None:
    """Raises OSError unless every seed can have its directory; makes OUT."""
    from fastlora.continual.run_dir import check_new_directory, check_run_directory

    arguments.out.mkdir(exist_ok=True)
    for seed in arguments.seeds:
        path: Path = arguments.out / f"seed{seed}"
        (check_run_directory if arguments.resume and path.exists() else check_new_directory)(path)
