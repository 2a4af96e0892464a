"""Addresses: one element too many beside memory that may not be touched, and offsets that no 32 bits hold."""

from __future__ import annotations

import mmap
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from faults.case import Outcome, group
from faults.judge import right
from faults.models import RANK
from guard_pages import at_a_page
from torch import Tensor

from fastlora import reference
from fastlora.ops import merge_, rank_lora_linear
from fastlora.optim import ProxAdamW

numerics = group("numerics")
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which mmap names from Python 3.13 on
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _shapes(count: int, largest: int, rank: int) -> Iterator[tuple[int, int, int, int, str]]:
    """rows, in, out, rank and the side of the guard page, so many times; sizes around the tiles of the kernels."""
    choose = random.Random(0)
    for place in range(count):
        sizes = [choose.choice([1, 2, 3, choose.randint(1, largest), choose.randint(1, largest)]) for _ in range(3)]
        yield *sizes, choose.randint(0, rank), ("end", "start")[place % 2]


@numerics("no element beyond a tensor is touched; the right sums", few=40, many=1000)
def merges_beside_guard_pages(count: int) -> Outcome:
    """Weight, adapter, gate and residual end, or begin, at a page that may not be touched: checked merges in C++."""
    wrong = 0
    for place, (_, k, n, r, side) in enumerate(_shapes(count, 90, 24)):
        keep: list[mmap.mmap] = []
        dtype = DTYPES[place % 3]
        tensors = [torch.randn(n, k).to(dtype), torch.randn(r, k), torch.randn(n, r), torch.randn(r)]
        weight, a, b, gate = (at_a_page(tensor, keep, side) for tensor in tensors)
        residual = at_a_page(torch.zeros(n, k, dtype=torch.int8 if place % 2 else dtype), keep, side)
        merge_([weight], [a], [b], [gate], residuals=[residual] if place % 4 else None)
        exact = reference.merge(tensors[0].double(), a.double(), b.double(), gate.double())
        wrong += not torch.allclose(weight.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    return right(not wrong, f"{wrong} sums are wrong", shapes=count)


@numerics("no element beyond a tensor is touched; torch's own AdamW beside it", few=40, many=1000)
def optimizer_steps_beside_guard_pages(count: int) -> Outcome:
    """Parameters, gradients and moments beside a page that may not be touched: the step of one launch, in C++."""
    wrong = 0
    for _, k, n, r, side in _shapes(count, 40, 24):
        keep: list[mmap.mmap] = []
        values = [torch.randn(r + 1, k), torch.randn(n, r + 1), torch.randn(r + 1)]
        ours, theirs = [[torch.nn.Parameter(at_a_page(v, keep, side)) for v in values] for _ in range(2)]
        for mine, other in zip(ours, theirs):
            mine.grad = at_a_page(torch.randn_like(mine), keep, side)
            other.grad = mine.grad.clone()
        step = ProxAdamW([{"params": ours[:2]}, {"params": ours[2:], "prox": True}], lr=0.01)
        plain = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.9999), weight_decay=0.0)
        for parameter in ours:
            moments = {key: at_a_page(torch.zeros_like(parameter), keep, side) for key in ("exp_avg", "exp_avg_sq")}
            step.state[parameter] = {"step": torch.tensor(0.0)} | moments
        step.step(), plain.step()
        wrong += not all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(ours, theirs))
    return right(not wrong and not step.why_not, f"{wrong} steps are wrong; {step.why_not}", shapes=count)


@contextmanager
def _guarded_outputs(keep: list[mmap.mmap], side: str) -> Iterator[None]:
    """What the launchers allocate lies beside a guard page as well."""
    empty = torch.empty

    def guarded(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return at_a_page(made, keep, side) if made.device.type == "cpu" else made

    with mock.patch.object(torch, "empty", guarded):
        yield


@numerics("no element beyond a tensor is touched; the float64 reference", few=8, many=1000)
def kernels_beside_guard_pages(count: int) -> Outcome:
    """Operands, results and gradients of the Triton kernels, interpreted, beside a page that may not be touched."""
    wrong = 0
    for place, (m, k, n, r, side) in enumerate(_shapes(count, 40, 20)):
        keep: list[mmap.mmap] = []
        dtype = DTYPES[place % 3]
        sizes = ((m, k), (n, k), (n,), (r, k), (n, r), (r,))
        values = [torch.randn(*size) / size[-1] ** 0.5 if size[-1] else torch.randn(*size) for size in sizes]
        values = [v.to(dtype) if i < 5 else v for i, v in enumerate(values)]
        given = [at_a_page(value, keep, side) for value in values]
        leaves = [given[i].requires_grad_() for i in (0, 3, 4, 5)]
        dy = at_a_page(torch.randn(m, n).to(dtype), keep, side)
        backend = ("split", "one_pass", "leader")[place // 6 % 3]
        with _guarded_outputs(keep, side):
            y = rank_lora_linear(*given, 0.2, 0.5, backend=backend)
            found = torch.autograd.grad(y, leaves, dy)
        exact = [value.double() for value in values]
        targets = [exact[i].requires_grad_() for i in (0, 3, 4, 5)]
        truth = reference.rank_lora_linear(*exact, 0.2, 0.5)
        expected = torch.autograd.grad(truth, targets, dy.double())
        limit = 40 * torch.finfo(dtype).eps
        pairs = zip((y, *found), (truth, *expected))
        wrong += not all(torch.allclose(a.double(), b, rtol=limit, atol=limit * 8) for a, b in pairs)
    return right(not wrong, f"{wrong} results are wrong", shapes=count)


def _spread(tensor: Tensor, pitch: int) -> Tensor:
    """A copy with `pitch` elements from row to row, in memory that is only there where it is touched."""
    elements = (tensor.shape[0] - 1) * pitch + tensor.shape[1]
    assert elements > 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, elements * tensor.element_size(), flags=flags)
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, (pitch, 1)).copy_(tensor)


@numerics("the same bits as beside each other")
def more_than_2_31_elements_apart() -> Outcome:
    """Rows that are 2^31 elements apart: merges in C++ and in PyTorch, forward and gradients in Triton, interpreted."""
    bad = []
    for dtype in (torch.float16, torch.float64):
        lists = [torch.randn(4, 48).to(dtype), torch.randn(RANK, 48), torch.randn(4, RANK), torch.randn(RANK)]
        near, far = lists[0].clone(), _spread(lists[0], 2**30)
        for weight in (near, far):
            merge_([weight], *([tensor] for tensor in lists[1:]))
        bad += [] if torch.equal(near, far) else [f"merge of {dtype}"]
    x, weight, dy = torch.randn(4, 33), torch.randn(20, 33), torch.randn(4, 20)
    adapter = [torch.randn(RANK, 33), torch.randn(20, RANK), torch.randn(RANK)]
    found = [_forward_and_gradients(x_, w, dy_, adapter) for x_, w, dy_ in (
        (x, weight, dy), (_spread(x, 2**30), _spread(weight, 2**27), _spread(dy, 2**30)))]  # fmt: skip
    bad += [f"kernel, result {i}" for i, (a, b) in enumerate(zip(*found)) if not torch.equal(a, b)]
    return right(not bad, f"wrong: {', '.join(bad)}")


def _forward_and_gradients(x: Tensor, weight: Tensor, dy: Tensor, adapter: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *adapter)]
    y = rank_lora_linear(leaves[0], weight, None, *leaves[1:], 0.2, 0.5, backend="split")
    return [y, *torch.autograd.grad(y, leaves, dy)]
