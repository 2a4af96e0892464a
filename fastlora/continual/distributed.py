"""Several processes that train one run together: who they are, and what they tell each other.

Each process has a share of the rows of a batch, images and prompts, and computes their features. The features of all
rows go to every process (`World.gather`), which computes the loss of the whole batch, all the same one. So the gradient
with respect to a process's own rows is there without another word, and the mean of the parameters' gradients over the
processes (`World.average_gradients`) is the gradient of that loss: `gather` hands its rows back `size` times what they
are due, and whatever every process computes alike, such as a penalty, counts once.

One process is a world of its own, in which nothing here does anything.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from fastlora.continual.device import find_device

T = TypeVar("T")

_TOLD = "fastlora/error"  # in torchrun's store, which all processes reach
_SECONDS = 5  # to wait for that store when telling of an error


class LostProcess(RuntimeError):
    """Another process of the run is gone."""

    follows = True  # on an error that another process tells of


class FirstFailed(RuntimeError):
    """What process 0 did for all of them failed."""

    follows = True


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Args:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process on its machine, from 0; None where it is alone.
        owner: whether the process group was made here, and goes with the run.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    owner: bool = False

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes files and prints."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """The rows of `total` that belong to this process; shares differ by one row at most, and may be empty."""
        return slice(*self._bounds(total, self.rank))

    def part(self, total: int) -> slice:
        """`share`, or row 0 where that is empty: a row to compute on, so that no process leaves a step out."""
        share = self.share(total)
        return share if share.start < share.stop else slice(0, 1)

    def gather(self, rows: Tensor, total: int) -> Tensor:
        """All `total` rows, of which `rows` [part, ...] are this process's `part`; differentiable.

        The gradient is right where every process computes the same from the result, and the parameters' gradients are
        averaged afterwards.
        """
        if self.size == 1:
            return rows
        return _Gather.apply(rows, self, total)

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """The mean over all processes in place of each gradient that is there, by one all-reduce of them all."""
        if self.size == 1:
            return
        given = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        if not given:
            return
        flat = torch.cat([grad.flatten() for _, grad in given])
        with self.reaching():
            dist.all_reduce(flat)
        flat /= self.size
        for (parameter, _), mean in zip(given, flat.split([grad.numel() for _, grad in given])):
            parameter.grad = mean.view_as(parameter)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, elementwise."""
        if self.size == 1:
            return values
        total = values.clone()
        with self.reaching():
            dist.all_reduce(total)
        return total

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in process 0, where alone it is called; it must be possible to pickle it.

        Raises:
            FirstFailed: in all the others, where it raised in process 0.
        """
        if self.size == 1:
            return make()
        error: BaseException | None = None
        message: list[Any] = [None, ""]
        if self.first:
            try:
                message[0] = make()
            except BaseException as raised:
                error, message = raised, [None, str(raised) or type(raised).__name__]
        with self.reaching():
            dist.broadcast_object_list(message, src=0)
        if error is not None:
            raise error
        if message[1]:
            raise FirstFailed(message[1])
        return message[0]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """The values of process 0 into the same tensors everywhere."""
        if self.size == 1:
            return
        with torch.no_grad(), self.reaching():
            for tensor in tensors:
                dense = tensor.detach().contiguous()
                dist.broadcast(dense, src=0)
                if not tensor.is_contiguous():
                    tensor.copy_(dense)

    def check_equal(self, tensors: Iterable[Tensor], what: str) -> None:
        """Raises RuntimeError, in every process, unless `tensors` have the same bits in all of them."""
        if self.size > 1:
            self.check_same([_checksum(tensor) for tensor in tensors], what)

    def check_same(self, value: Any, what: str) -> None:
        """Raises RuntimeError, in every process, unless `value` is the same in all of them."""
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        with self.reaching():
            dist.all_gather_object(values, value)
        others = [str(rank) for rank in range(self.size) if values[rank] != values[0]]
        if others:
            raise RuntimeError(
                f"{what} of process {', '.join(others)} of {self.size} (from 0) differ from those of process 0. All "
                "need the same code, packages, data and kind of device; `fastlora doctor` on each machine tells. The "
                "same command with --resume then goes on from the last finished task."
            )

    @contextlib.contextmanager
    def reaching(self) -> Iterator[None]:
        """Within, an error of the connection to the other processes says what it means."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise LostProcess(
                "a process that takes part in this run cannot be reached any more: it was killed, failed (then its own "
                "message tells why), or its machine is gone. The same command with --resume goes on from the last "
                "finished task, also with another number of processes."
            ) from error

    def _bounds(self, total: int, rank: int) -> tuple[int, int]:
        return total * rank // self.size, total * (rank + 1) // self.size

    def _all_rows(self, rows: Tensor, total: int) -> Tensor:
        most = -(-total // self.size)
        counts = [stop - start for start, stop in (self._bounds(total, rank) for rank in range(self.size))]
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows  # one that stands in for an empty share is cut off below
        everything = rows.new_empty(self.size * most, *rows.shape[1:])
        with self.reaching():
            dist.all_gather_into_tensor(everything, padded)
        return torch.cat([block[:count] for block, count in zip(everything.split(most), counts)])


ALONE = World()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, total: int) -> Tensor:
        ctx.world, ctx.total, ctx.rows = world, total, len(rows)
        return world._all_rows(rows.detach(), total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        own = grad[ctx.world.share(ctx.total)] * ctx.world.size
        # a row that only stands in for an empty share is due nothing
        return (own if len(own) else grad.new_zeros(ctx.rows, *grad.shape[1:])), None, None


def told_elsewhere(message: str, follows: bool) -> bool:
    """Whether another of the processes that torchrun started has told of this error, or first of another.

    Args:
        follows: on an error elsewhere, whichever.
    """
    if not dist.is_torchelastic_launched():
        return False
    rank, place = os.environ["RANK"], (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    try:
        store = dist.TCPStore(*place, wait_for_workers=False, timeout=datetime.timedelta(seconds=_SECONDS))
        key = f"{_TOLD}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
        teller, _, told = store.compare_set(key, "", f"{rank} {message}").decode().partition(" ")
    except RuntimeError:  # the store went with the machine that had it
        return False
    return teller != rank and (follows or told == message)


def join(device: str = "auto") -> World:
    """The processes of the process group, where there is one; else of those that torchrun started, which form one here,
    over nccl on GPUs and gloo on CPUs; else this process alone.

    Args:
        device: as in RunConfig.
    """
    if not dist.is_available():
        return ALONE
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        return World(rank, size, _local_rank(rank)) if size > 1 else ALONE
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        return ALONE
    local_rank = _local_rank(int(os.environ["RANK"]))
    cuda = find_device(device, local_rank).type == "cuda"
    store, rank, size = next(rendezvous("env://"))
    group = dist.PrefixStore("fastlora/group", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=group, rank=rank, world_size=size)
    return World(rank, size, local_rank, owner=True)


def _local_rank(rank: int) -> int:
    """As torchrun tells; where nobody does, as if every machine had as many processes as this one has GPUs."""
    return int(os.environ.get("LOCAL_RANK", rank % max(1, torch.cuda.device_count())))


def leave(world: World) -> None:
    """Give up the process group that `join` made."""
    if world.owner and dist.is_initialized():
        dist.destroy_process_group()


def _checksum(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Of the bits of a tensor and their places."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().flatten().view(kind).long()
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return int(bits.sum()), int((bits * places).sum()), tuple(tensor.shape)
