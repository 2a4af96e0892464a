"""What a run in work leaves in its directory, and how one that was cut short is taken up from there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.continual.config import RunConfig
from fastlora.continual.distributed import World
from fastlora.continual.manifest import TOLD_APART, describe
from fastlora.continual.methods import Method
from fastlora.continual.record import Record
from fastlora.continual.restore import check_same_data
from fastlora.continual.resume import changed_versions, check_same_config, check_same_model, what_stopped
from fastlora.continual.run_dir import RunDir, check_new_directory, check_run_directory
from fastlora.continual.run_state import RunState, capture, read_state, weights_sha256, write_state
from fastlora.continual.stream import TaskStream
from fastlora.fingerprint import fingerprint
from fastlora.journal import Journal


class RunKeeper:
    """The run directory of a trainer. Without one, nothing is kept and nothing is done.

    Of several processes the first has the directory; the others learn from it where the run stands, and write nothing.

    Args:
        out: the directory; None for none.
        config: of the run.
        resume: take up the run that is in `out`, where there is one.
        world: the processes of the run.
    Raises:
        FileExistsError, OSError: `out` cannot be made, or is no run to resume. FirstFailed: so it is in process 0.
    """

    def __init__(self, out: Path | None, config: RunConfig, resume: bool, world: World) -> None:
        self.out, self.config, self._world = out, config, world
        self._resumes = False
        self._run: RunDir | None = None
        self._hashed = -1, ""  # the last trained task, and the SHA-256 of the weights after it
        if out is not None:
            self._resumes = world.from_first(lambda: _checked(out, resume))

    @property
    def journal(self) -> Journal | None:
        return self._run.journal if self._run else None

    def open(self, model: nn.Module, method: Method, stream: TaskStream, device: torch.device) -> RunState | None:
        """Make the directory; or bring model, method and directory to the commit point of the run that is in it.

        Args:
            model: the one from before training.
        Returns:
            The state at the commit point; None where the run starts from the beginning.
        Raises:
            ValueError: the run was started with another configuration, benchmark or model; the commit point or an
                adapter file is damaged or of another version. RuntimeError: another process has the directory.
                OSError: a file is missing, or cannot be written. What was in the directory has not changed.
        """
        if self.out is None and self._world.size == 1:
            return None
        manifest = describe(model, stream, device)
        data = {key: manifest[key] for key in TOLD_APART}
        self._world.check_same(json.dumps(data), "the classes, prompts or images")
        if self.out is None:
            return None
        manifest |= {"method": method.config.name, "seed": self.config.seed, "null_model": method.null_model()}
        manifest |= {"processes": self._world.size}
        if self._world.first:
            self._known: dict[str, Any] = {"config": self.config.as_dict(), "device": device.type}
            self._known |= {"base": fingerprint(model.state_dict()), "data": data}
        state = self._world.from_first(lambda: self._open(manifest, model, method, stream))
        if state is not None and not self._world.first:
            _load_method(model, method, state)
        self._world.broadcast_(value for _, value in sorted(model.state_dict().items()))
        return state

    def _open(self, manifest: dict[str, Any], model: nn.Module, method: Method, stream: TaskStream) -> RunState | None:
        assert self.out is not None
        if not self._resumes:
            self._run = RunDir.create(self.out, self._known["config"], manifest)
            return None
        run = RunDir(self.out)
        try:
            state = self._take_up(run, manifest, model, method, stream)
        except BaseException:
            run.close()
            raise
        self._run = run
        # the weights are in the model now
        return None if state is None else dataclasses.replace(state, model={})

    def resumed(self) -> dict[str, Any]:
        """after_tasks and stopped: where the run was taken up, and how it had ended."""
        return self._run.manifest["resumes"][-1] if self._run else {}

    def commit(self, model: nn.Module, method: Method, **place: Any) -> None:
        """From here on what is done stays done, whatever becomes of this process.

        Args:
            model: the plain one. place: record, trained, seconds and steps, as in RunState.
        """
        if self._run is None:
            return
        if self._hashed[0] != place["trained"]:  # an evaluation leaves the weights as they are
            self._hashed = place["trained"], weights_sha256(model)
        write_state(
            self._run.state_path, capture(self._run, model, method, weights=self._hashed[1], **self._known, **place)
        )

    def keep_checkpoint(self, task: int, model: nn.Module) -> None:
        if self._run:
            self._run.save_checkpoint(task, model)

    def write_record(self, record: Record, seconds: dict[str, float]) -> None:
        if self._run:
            self._run.write_record(record, seconds=seconds)

    def append_log(self, row: Sequence[Any]) -> None:
        if self._run:
            self._run.append_log([row])

    def finish(self, status: str, error: BaseException | None = None) -> None:
        if self._run:
            self._run.update(status=status, **({"error": f"{type(error).__name__}: {error}"} if error else {}))

    def close(self) -> None:
        if self._run:
            self._run.close()

    def _take_up(
        self, run: RunDir, manifest: dict[str, Any], model: nn.Module, method: Method, stream: TaskStream
    ) -> RunState | None:
        before, config = run.manifest, self._known["config"]
        if not run.state_path.exists():
            if before.get("finished_tasks", 0):
                raise FileNotFoundError(
                    f"{run.state_path} is missing, so the {before['finished_tasks']} finished tasks of {run.path} cannot "
                    "be taken up. Restore it from a copy, or train again with another --out."
                )
            run.begin(config, manifest)
            return None
        state = read_state(run.state_path)
        check_same_config(run.path, state.config, self.config)
        check_same_data(run.path, state.data, stream)
        check_same_model(run.path, state.base, self._known["base"])
        _load_state(model, method, run, state)
        resumed = {"after_tasks": state.record.finished_tasks, "stopped": what_stopped(before)}
        kept = {key: value for key, value in before.items() if key not in ("status", "error")}
        kept["resumes"] = [*before.get("resumes", []), resumed | changed_versions(before, manifest)]
        run.begin(config, {**manifest, **kept}, log=state.log, journal=state.journal)
        # the tables of a task come with its row
        done = [entry for entry in state.record.ranks if entry.task <= state.record.finished_tasks]
        run.write_record(dataclasses.replace(state.record, ranks=done), seconds=state.seconds)
        return state


def _load_state(model: nn.Module, method: Method, run: RunDir, state: RunState) -> None:
    if len(run.journal) < state.journal:
        raise FileNotFoundError(
            f"{run.journal.directory} holds {len(run.journal)} of the {state.journal} adapter files that "
            f"{run.state_path} follows on. Put them back, or train again with another --out."
        )
    if method.journaled:
        run.journal.rebuild(model, after=state.journal)
    unknown = model.load_state_dict(state.model, strict=False).unexpected_keys
    same_device = next(model.parameters()).device.type == state.device  # elsewhere a merge may round in another way
    if unknown or (same_device and weights_sha256(model) != state.weights):
        raise ValueError(
            f"the weights that {run.path} gives are not those that {run.state_path} was written with, so a file in it "
            "is of another run. Restore the directory from a copy, or train again with another --out."
        )
    _load_method(model, method, state)


def _load_method(model: nn.Module, method: Method, state: RunState) -> None:
    method.load_state_dict(state.method)
    if state.trained:
        method.attach(model)


def _checked(out: Path, resume: bool) -> bool:
    """Whether there is a run in `out` to take up; raises where there can neither be one nor is one."""
    resumes = resume and out.exists()
    (check_run_directory if resumes else check_new_directory)(out)
    return resumes
