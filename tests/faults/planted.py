"""Bugs that are planted into the library, and the case that must find each: a suite that finds nothing proves nothing."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from fastlora import adapt, adapter_file, checks, files, journal, merging, reference
from fastlora.continual import batches, distributed, run_dir, run_keeper, trainer
from fastlora.continual.datasets import formats
from fastlora.modules import adapter
from fastlora.ops import merge, merge_checks, merge_memory, merge_native


@dataclass(frozen=True)
class Bug:
    """what: of the library is wrong. case: that must find it. plant: makes it so while it is entered."""

    what: str
    case: str
    plant: Callable[[], AbstractContextManager[Any]]
    count: int | None = None


def no_check(owner: Any, name: str) -> Callable[[], AbstractContextManager[Any]]:
    """Whatever the check is asked, it finds nothing."""
    return lambda: mock.patch.object(owner, name, lambda *given, **options: None)


def instead(owner: Any, name: str, what: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(owner, name, what)


_MERGE_ALL, _CHECK_MERGE = merging._merge_all, merge.check_merge


def _merge_that_keeps_the_adapters(model: nn.Module, *given: Any) -> Any:
    held = {name: [t.detach() for t in (a.lora_a, a.lora_b, a.gate)] for name, a in adapt.adapters(model)}
    report = _MERGE_ALL(model, *given)
    for name, each in adapt.adapters(model):
        each._set(*held[name])
    return report


def _merge_without_residuals(*given: Any) -> Any:
    return _CHECK_MERGE(*given[:-1], None)


def _one_per_cent_more(self: Any) -> torch.Tensor:
    return 1.01 * reference.soft_threshold(self.gate.detach(), self.kappa)


@contextlib.contextmanager
def _no_masks() -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    load = InterpreterBuilder.create_masked_load

    def unmasked(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        mask.data = np.ones_like(mask.data)
        return load(self, ptrs, mask, *rest, **options)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", unmasked):
        yield


@contextlib.contextmanager
def _offsets_of_32_bits() -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    add = InterpreterBuilder.create_addptr

    def cut(self: Any, ptr: Any, offset: Any) -> Any:
        offset.data = offset.data.astype("int32").astype(offset.data.dtype)
        return add(self, ptr, offset)

    with mock.patch.object(InterpreterBuilder, "create_addptr", cut):
        yield


def _strides_of_a_longer_row(matrix: torch.Tensor) -> tuple[int, int]:
    row, col = merge_memory.strides(matrix)
    return (row + 1, col) if col == 1 else (row, col + 1)


def _read_in_two_openings(path: Any) -> Any:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key).clone() for key in file.keys()}


def _written_in_place(path: Any, content: bytes) -> None:
    with open(path, "wb") as file:
        for start in range(0, len(content), 4096):
            file.write(content[start : start + 4096])


def _drawn_from_the_global_generator(seed: int, *purpose: Any) -> torch.Generator:
    return torch.Generator().manual_seed(random.getrandbits(60))


def _at_or_above(gate: torch.Tensor, kappa: float) -> int:
    return int((gate.detach().abs() >= kappa).sum())


BUGS = (
    Bug("NaN and overflow are not looked for", "merge_of_one_bad_adapter", no_check(merge, "raise_bad")),
    Bug("overflow is not looked for", "overflow_in_a_merge", no_check(merge, "raise_bad")),
    Bug("a NaN gate passes", "gate_that_is_not_finite", no_check(merging, "check_finite_gate")),
    Bug("a merged adapter is not reset", "merge_twice", instead(merging, "_merge_all", _merge_that_keeps_the_adapters)),
    Bug("gates become half precision", "gates_through_half", instead(adapter.RankAdapter, "_apply", nn.Module._apply)),
    Bug("a negative kappa passes", "negative_kappa", no_check(adapter, "check_kappa")),
    Bug("shapes are not checked", "input_of_another_width", no_check(checks, "check_rank_lora")),
    Bug("weights may share memory", "two_weights_in_one_memory", no_check(merge_checks, "check_disjoint")),
    Bug("read-only memory passes", "merge_into_read_only_memory", no_check(merge_checks, "check_writable")),
    Bug("tied weights pass", "weight_tied_to_another_layer", no_check(merging, "check_untied")),
    Bug("merges do not wait for each other", "two_threads_merge_into_one_weight",
        instead(merge, "_turn", contextlib.nullcontext()), 40),
    Bug("autograd hears of no merge", "merge_between_forward_and_backward",
        no_check(torch.autograd.graph, "increment_version")),
    Bug("a merge can be cut in two", "interrupted_merge", instead(merging, "uninterrupted", contextlib.nullcontext), 60),
    Bug("no checksum", "flipped_bit_in_an_adapter_file",
        instead(adapter_file, "checksum", lambda header, hashes: header.get("sha256", "")), 20),
    Bug("no fingerprint of the base", "journal_of_another_base", no_check(journal, "check_untouched")),
    Bug("gradients are not averaged", "two_processes_and_three_tasks", no_check(distributed.World, "average_gradients")),
    Bug("nobody compares the processes", "gates_that_differ_between_processes", no_check(distributed.World, "check_same")),
    Bug("files are written in place", "killed_while_an_adapter_is_saved",
        instead(adapter_file, "write_atomically", _written_in_place), 12),
    Bug("a full disk leaves half a file", "disk_full", instead(adapter_file, "write_atomically", _written_in_place)),
    Bug("a file is opened twice to be read", "two_processes_write_one_file",
        instead(adapter_file, "read_tensors", _read_in_two_openings), 500),
    Bug("journals have no lock", "two_processes_write_one_journal", no_check(files, "_lock"), 40),
    Bug("pickles are unpickled", "pickle_with_a_payload",
        instead(formats, "_ArrayUnpickler", pickle.Unpickler)),
    Bug("a resumed run draws other batches", "stopped_at_a_random_step",
        instead(batches, "generator_for", _drawn_from_the_global_generator)),
    Bug("a resumed run may have other options", "run_resumed_with_other_options",
        no_check(run_keeper, "check_same_config")),
    Bug("run directories have no lock", "second_process_in_one_run_directory",
        instead(run_dir, "_locked", lambda path: open(path, "ab", buffering=0))),
    Bug("a NaN loss goes on", "loss_that_is_not_finite", instead(trainer.math, "isfinite", lambda value: True)),
    Bug("residuals are dropped", "many_merges_with_residuals", instead(merge, "check_merge", _merge_without_residuals)),
    Bug("one per cent too much", "kappa_exactly_at_gate_values", instead(adapter.RankAdapter, "effective_gate", _one_per_cent_more)),
    Bug("the threshold itself is alive", "kappa_exactly_at_gate_values",
        instead(adapter.RankAdapter, "active_rank", lambda self: _at_or_above(self.gate, self.kappa))),
    Bug("a mask is lost", "kernels_beside_guard_pages", _no_masks, 6),
    Bug("rows one element too long", "merges_beside_guard_pages", instead(merge_native, "strides", _strides_of_a_longer_row), 6),
    Bug("offsets of 32 bits", "more_than_2_31_elements_apart", _offsets_of_32_bits),
)  # fmt: skip
