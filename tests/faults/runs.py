"""Runs of seconds that are killed, starved and resumed; and one that nobody disturbed, to compare with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from continual.resume.cases import CONFIGS, Plain, PlainConfig, assert_same_results, results
from continual.tiny import tiny_clip, tiny_stream, tokenize
from faults.case import Outcome
from faults.judge import harm, right, short

from fastlora.continual import Trainer, methods
from fastlora.continual import config as configs


def trainer(out: Path, kind: str = "codyra", model: Any = None, stream: Any = None, **options: Any) -> Trainer:
    """Nothing trained yet; the same options give the same run, bit for bit. Each in a process of its own."""
    methods.METHODS[PlainConfig.name], configs.CONFIGS[PlainConfig.name] = Plain, PlainConfig
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written, synced or not
    options = {"seed": 1, "progress": False, "log_every": 2, "checkpoints": "all"} | options
    model, stream = tiny_clip() if model is None else model, tiny_stream() if stream is None else stream
    return Trainer(model, tokenize, stream, CONFIGS[kind], out=out, **options)


def finished(out: Path, kind: str = "codyra", **options: Any) -> dict[str, Any]:
    """The results of a run that comes to its end here, from the beginning or from where it was stopped."""
    run = trainer(out, kind, resume=out.exists(), **options)
    run.fit()
    return results(out, run.model)


def resumed(out: Path, expected: dict[str, Any], kind: str = "codyra", **options: Any) -> Outcome:
    """Whether the run in `out` goes on to the results of one that nobody disturbed, bit for bit."""
    try:
        found = finished(out, kind, **options)
        assert_same_results(found, expected)
    except AssertionError as error:
        return harm(f"other results: {short(error)}")
    except Exception as error:
        return Outcome("half done", f"not resumed: {type(error).__name__}: {short(error)}")
    return right(True, "")


class Stopped(BaseException):
    pass


def stopped(out: Path, kind: str = "codyra", **options: Any) -> Path:
    """The directory of a run with one finished task of three."""
    run = trainer(out, kind, **options)
    begin_task = run.method.begin_task

    def stop(ctx: Any) -> None:
        if ctx.number == 2:
            raise Stopped
        begin_task(ctx)

    run.method.begin_task = stop
    try:
        run.fit()
    except Stopped:
        return out
    raise RuntimeError("the run did not stop")
