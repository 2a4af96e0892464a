"""Calls of fastlora._C one after the other, for instruction_counts.py to run under Valgrind: no torch, so it starts in a second.

    python -I -S bench/instruction_calls.py EXTENSION CALLS    CALLS: JSON, a list of [function of this file, options]

`os.getpgrp` and `os.getppid` do nothing here but be noticed: Valgrind counts from the one to the other.
"""

from __future__ import annotations

import array
import functools
import gc
import importlib.machinery
import importlib.util
import json
import os
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

POOL = 1021  # different values; a prime, so that neighbouring rows differ
CODES = {"float32": "f", "float16": "H", "bfloat16": "H", "int8": "b"}
FLUSH = bytes(1 << 17)  # more than the cache that Valgrind is told to simulate


def load(path: str) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_C", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(module)
    return module


@functools.cache
def pool(dtype: str, size: float) -> array.array:
    """Normal numbers; int8: in units, as residuals hold them."""
    source = random.Random(0)
    values = [source.gauss(0, size) for _ in range(POOL)]
    if dtype == "int8":
        return array.array("b", [source.randrange(-100, 101) for _ in values])
    if dtype == "float16":
        return array.array("H", struct.pack(f"{POOL}e", *values))
    floats = array.array("f", values)
    return array.array("H", floats.tobytes())[1::2] if dtype == "bfloat16" else floats


def numbers(count: int, dtype: str = "float32", size: float = 0.1) -> array.array:
    return (pool(dtype, size) * (count // POOL + 1))[:count]


def address(values: array.array) -> int:
    return values.buffer_info()[0]


def count(call: Callable[[], Any]) -> None:
    """Tell Valgrind what lies between; no operand is in the cache when it begins."""
    FLUSH.find(b"x")  # reads it all
    os.getpgrp()
    call()
    os.getppid()


def merge(_C: Any, level: str, rounding: str, dtype: str, rank: int, rows: int, cols: int) -> Callable[[], Any]:
    """rounding: nearest, stochastic, residual (of the weight's dtype), int8, or check, which writes nothing."""

    def matrix(values: array.array, dtype: str, rows: int, cols: int) -> Any:
        return _C.Matrix(address(values), getattr(_C.DType, dtype), rows, cols, cols, 1)

    weight, gate = numbers(rows * cols, dtype), array.array("f", [0.5] * rank)
    lora_a, lora_b = numbers(rank * cols), numbers(rows * rank)
    operands = [matrix(weight, dtype, rows, cols), matrix(lora_a, "float32", rank, cols)]
    operands.append(matrix(lora_b, "float32", rows, rank))
    options, kept = {"seed": 7} if rounding == "stochastic" else {}, None
    if rounding in ("residual", "int8"):
        kept_dtype = "int8" if rounding == "int8" else dtype
        kept = numbers(rows * cols, kept_dtype, 1e-4)
        options["residual"] = matrix(kept, kept_dtype, rows, cols)
    items = [_C.MergeItem(*operands, address(gate), 1.0, **options)]
    run = _C.check_cpu if rounding == "check" else _C.merge_cpu
    held = (weight, gate, lora_a, lora_b, kept)  # the items know addresses alone
    return lambda: run(items, 1, level) and held


def adamw(_C: Any, level: str, elements: int, gates: int) -> Callable[[], Any]:
    """One step over a tensor of so many elements and one of so many gates, with decay and a proximal step."""
    tensors, table = [], array.array("q")
    for gate, numel in enumerate((elements, gates), start=-1):
        param, grad, exp_avg = (numbers(numel) for _ in range(3))
        exp_avg_sq, step = array.array("f", [x * x for x in pool("float32", 0.1)]), array.array("f", [3.0])
        tensors.append([param, grad, exp_avg, (exp_avg_sq * (numel // POOL + 1))[:numel], step])
        table.extend([*map(address, tensors[-1]), numel, 0, gate])
    # lr, beta1, beta2, eps, weight_decay, kappa, two logarithms that the GPU reads
    group, kept = array.array("d", [1e-3, 0.9, 0.999, 1e-8, 0.01, 0.05, 0, 0]), array.array("q", [0])
    held = (tensors, group)
    return lambda: _C.prox_adamw_cpu(address(table), 2, address(group), False, address(kept), 1, level) or held


def main() -> None:
    _C, calls = load(sys.argv[1]), json.loads(sys.argv[2])
    gc.disable()
    met = set()
    for name, options in calls:
        call = {"merge": merge, "adamw": adamw}[name](_C, **options)
        if name not in met:
            call()  # the first makes what pybind11 and Python keep
        met.add(name)
        count(call)


if __name__ == "__main__":
    main()
