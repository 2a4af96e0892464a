"""Weights that cannot be written, that share memory, or that others write to at the same time."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faults.case import Outcome, group
from faults.judge import content, refused, right, same, short, their_refusal, worst
from faults.models import K, N, module_lists, ours, their_layers, theirs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora.ops import merge_

bad_input = group("bad input")
SIDE = 512  # of a weight that two threads merge into: long enough for one to interrupt the other


def _strange_weights() -> dict[str, Any]:
    fake = FakeTensorMode()
    return {
        "meta device": torch.empty(12, 10, device="meta"),
        "FakeTensor": fake.from_tensor(torch.zeros(12, 10)),
        "torch.int32": torch.zeros(12, 10, dtype=torch.int32),
        "torch.qint8": torch.quantize_per_tensor(torch.zeros(12, 10), 0.1, 0, torch.qint8),
        "not plain strided": torch.zeros(12, 10).to_sparse(),
        "is a float": 3.0,
        "must be [N, K]": torch.zeros(12),
    }


@bad_input("an error that says what it is; the other weights of the call have not changed")
def merge_into_what_is_no_plain_memory() -> Outcome:
    """meta, FakeTensor, integer, quantised and sparse weights, a float, a vector; each beside a good one."""
    outcomes = []
    for told, weight in _strange_weights().items():
        lists = module_lists(2)
        lists[0][1] = weight
        outcomes.append(refused(lambda lists=lists: merge_(*lists), told, keeps=[lists[0][0]]))
    return worst(outcomes)


@bad_input("an error that names DTensor; its local part has not changed")
def merge_into_a_dtensor() -> Outcome:
    """A weight that is distributed over a mesh of one process."""
    weight = _distributed(torch.randn(12, 10))
    lists = module_lists(1)
    lists[0] = [weight]
    return refused(lambda: merge_(*lists), "is a DTensor", "local tensor", keeps=[weight.to_local()])


@merge_into_a_dtensor.peft
def _() -> Outcome:
    model = theirs(where=["0"])
    base = their_layers(model)[0].get_base_layer()
    base.weight = nn.Parameter(_distributed(base.weight.detach()), requires_grad=False)
    local = base.weight.to_local()
    expected = local + their_layers(model)[0].get_delta_weight("default")
    before = local.clone()
    try:
        model.merge_adapter()
    except Exception as error:
        kept = same(base.weight.to_local(), before)
        clear = "DTensor" in str(error)
        return Outcome("survived" if kept and clear else "half done", short(error))
    return right(torch.allclose(base.weight.to_local(), expected), "another sum")


def _distributed(tensor: torch.Tensor) -> Any:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


@bad_input("an error with the strides; nothing has changed")
def merge_into_elements_that_overlap() -> Outcome:
    """Weights in which several elements share memory: stride 0, overlapping rows."""
    outcomes = []
    for weight in (torch.zeros(1, 10).expand(12, 10), torch.zeros(99).as_strided((12, 10), (4, 1))):
        lists = module_lists(1)
        lists[0] = [weight]
        outcomes.append(refused(lambda lists=lists: merge_(*lists), "strides", "its own memory", keeps=[weight]))
    return worst(outcomes)


@merge_into_elements_that_overlap.peft
def _() -> Outcome:
    model = theirs(where=["0"])
    base = their_layers(model)[0].get_base_layer()
    base.weight.data = torch.zeros(1, K).expand(8, K)
    return their_refusal(model.merge_adapter, "memory", keeps=[base.weight], accepted="merged into one row")


@bad_input("an error that names both; nothing has changed")
def two_weights_in_one_memory() -> Outcome:
    """Two adapted layers whose weights are one tensor, and two that share some rows."""
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model[1].weight = model[0].weight
    model = ours(model, where=["0", "1"])
    lists, rows = module_lists(2), torch.randn(20, 10)
    lists[0] = [rows[:12], rows[8:]]
    return worst(
        [
            refused(lambda: fastlora.merge(model), "0", "1", keeps=[model]),
            refused(lambda: merge_(*lists), "weights[0] and weights[1] share memory", keeps=[rows]),
        ]
    )


@two_weights_in_one_memory.peft
def _() -> Outcome:
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model[1].weight = model[0].weight
    x, model = torch.randn(4, K), theirs(model, where=["0", "1"])
    before = model(x)
    model.merge_adapter()
    return right(torch.allclose(model(x), before, atol=1e-5), "both updates went into both layers")


class Tied(nn.Module):
    """An embedding and a head over one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(N, K), nn.Linear(K, N, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


@bad_input("an error that names both places and says how to part them; nothing has changed")
def weight_tied_to_another_layer() -> Outcome:
    """The head is adapted, and its weight is the embedding's too: a merge would change what nobody trained."""
    model = ours(Tied(), where=["head"])
    return refused(lambda: fastlora.merge(model), "head.weight", "embed.weight", "clone", keeps=[model])


@weight_tied_to_another_layer.peft
def _() -> Outcome:
    model, tokens = theirs(Tied(), where=["head"]), torch.arange(N)
    before = model(tokens)
    model.merge_adapter()
    return right(torch.allclose(model(tokens), before, atol=1e-5), "the embedding changed with the head")


@bad_input("an error that says so, before the first write")
def merge_into_read_only_memory(folder: Path) -> Outcome:
    """The weight lies in a file that is mapped read-only: a write would end the process."""
    lists = module_lists(1)
    lists[0] = [_mapped(folder / "weights", "r", (12, 10))]
    return refused(lambda: merge_(*lists), "read-only", "clone", keeps=[folder])


@merge_into_read_only_memory.peft
def _(folder: Path) -> Outcome:
    model = theirs(where=["0"])
    their_layers(model)[0].get_base_layer().weight.data = _mapped(folder / "weights", "r", (8, K))
    return their_refusal(model.merge_adapter, "read-only", keeps=[folder])


@bad_input("an error that names the file, which has not changed")
def merge_into_memory_of_a_file(folder: Path) -> Outcome:
    """The weight lies in a mapping that is shared with its file: a merge would change the file, half-way if killed."""
    lists = module_lists(1)
    lists[0] = [_mapped(folder / "weights", "r+", (12, 10))]
    return refused(lambda: merge_(*lists), "mapped from", "weights", keeps=[folder])


@merge_into_memory_of_a_file.peft
def _(folder: Path) -> Outcome:
    model = theirs(where=["0"])
    their_layers(model)[0].get_base_layer().weight.data = _mapped(folder / "weights", "r+", (8, K))
    before = content(folder)
    model.merge_adapter()
    return right(content(folder) == before, "the file on disk was changed")


def _mapped(path: Path, mode: str, shape: tuple[int, int]) -> torch.Tensor:
    np.zeros(shape, np.float32).tofile(path)
    memory = np.memmap(path, np.float32, mode, shape=shape)
    if mode == "r":
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)
    return torch.from_numpy(memory)


@bad_input("the sum of all updates, in any order", few=12, many=200)
def two_threads_merge_into_one_weight(count: int) -> Outcome:
    """Two threads add 1 to every element of one weight, again and again."""
    bad = []
    for dtype in (torch.float32, torch.float64):
        weight = torch.zeros(SIDE, SIDE, dtype=dtype)

        def work(weight: torch.Tensor = weight) -> None:
            for _ in range(count):
                merge_([weight], [torch.ones(1, SIDE)], [torch.ones(SIDE, 1)], [torch.ones(1)])

        threads = [threading.Thread(target=work) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        if not bool((weight == 2 * count).all()):
            bad.append(f"{int((weight != 2 * count).sum())} elements lack an update in {dtype}")
    return right(not bad, "; ".join(bad), merges=4 * count)
