"""The commit point of a run: one file, replaced in one step, from which everything else in the directory follows.

A task is finished when this file says so. Beside the record it holds what no other file has: what the method keeps, the
model's buffers, and its weights where the method does not rebuild them from the base model and the journal.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from fastlora.continual.methods.base import Method
from fastlora.continual.record import RankEntry, Record
from fastlora.continual.run_dir import RunDir
from fastlora.files import write_atomically
from fastlora.fingerprint import checksum, fingerprint
from fastlora.tensor_file import read_tensors

FORMAT = "fastlora.state/1"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Args:
        config: RunConfig.as_dict() of the run.
        data: what tells the data apart, as in the manifest.
        base: fingerprint of the model before training.
        record: what was measured.
        trained: number of the last task that was trained; its row may be missing in the record still.
        journal: number of adapter files that belong to the trained tasks.
        log: log.csv up to here.
        steps: iterations so far, of all tasks.
        seconds: wall time of training and evaluation.
        device: type of the device on which the weights were made.
        weights: SHA-256 of the model's state_dict.
        model: tensors of the model's state_dict that no journal rebuilds.
        method: tensors of the method's state_dict.
    """

    config: dict[str, Any]
    data: dict[str, Any]
    base: dict[str, str]
    record: Record
    trained: int
    journal: int
    log: str
    steps: int
    seconds: dict[str, float]
    device: str
    weights: str
    model: dict[str, Tensor]
    method: dict[str, Tensor]


_TENSORS = ("model", "method")


def weights_sha256(model: nn.Module) -> str:
    """Of every bit of the model's state_dict."""
    return checksum({}, fingerprint(model.state_dict()))


def capture(run: RunDir, model: nn.Module, method: Method, **place: Any) -> RunState:
    """The state of a run with this plain model. place: the fields that neither follow from it nor from the directory."""
    # the journal rebuilds every parameter, and no buffer
    rebuilt = {name for name, _ in model.named_parameters(remove_duplicate=False)} if method.journaled else set()
    return RunState(
        journal=len(run.journal),
        log=run.log(),
        model={name: tensor for name, tensor in model.state_dict().items() if name not in rebuilt},
        method=method.state_dict(),
        **place,
    )


def write_state(path: Path, state: RunState) -> None:
    """Write the file in one step, with a checksum of all that is in it.

    Raises:
        OSError: no room, or no permission; what was there before is whole.
    """
    tensors = {
        f"{kind}.{name}": tensor.detach().cpu().contiguous().clone()  # safetensors refuses memory that two names share
        for kind in _TENSORS
        for name, tensor in getattr(state, kind).items()
    }
    fields = [field.name for field in dataclasses.fields(state) if field.name not in _TENSORS]
    values = {name: getattr(state, name) for name in fields} | {"record": dataclasses.asdict(state.record)}
    header = {"format": FORMAT, "state": json.dumps(values)}
    header["sha256"] = checksum(header, fingerprint(tensors))
    write_atomically(path, save(tensors, metadata=header))


def read_state(path: Path) -> RunState:
    """Read and check the file.

    Raises:
        ValueError: another version wrote it, or some bit of it has changed.
        OSError: it cannot be read.
    """
    try:
        header, tensors = read_tensors(path)
    except SafetensorError as error:
        raise ValueError(_damaged(path, str(error))) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {header.get('format')!r}; this version of fastlora reads {FORMAT!r}. Resume with the "
            "version that manifest.json names, or train again with another --out."
        )
    if header.get("sha256") != checksum(header, fingerprint(tensors)):
        raise ValueError(_damaged(path, "its content has another SHA-256 than its header tells"))
    parts: dict[str, Any] = {
        kind: {key.removeprefix(f"{kind}."): tensor for key, tensor in tensors.items() if key.startswith(f"{kind}.")}
        for kind in _TENSORS
    }
    try:
        return RunState(**_values(header["state"]), **parts)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        why = f"it does not tell where the run stands ({type(error).__name__}: {error})"
        raise ValueError(_damaged(path, why)) from error


_KINDS = {"config": dict, "data": dict, "base": dict, "record": dict, "trained": int, "journal": int, "log": str,
          "steps": int, "seconds": dict, "device": str, "weights": str}  # fmt: skip


def _values(text: str) -> dict[str, Any]:
    values = json.loads(text)
    for name, kind in _KINDS.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{name} is {values[name]!r}")
    record = values["record"]
    ranks = [RankEntry(**entry) for entry in record["ranks"]]
    return values | {"record": Record(**record | {"ranks": ranks})}


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged: {why}. Restore it from a copy, or train again with another --out."
