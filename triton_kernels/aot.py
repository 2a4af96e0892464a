"""Ahead-of-time compile of every shipped tile config for every target, with its resource report.

    python -m fastlora.triton_kernels.aot [--targets sm_90 gfx942] [--match "split y"] [--jobs 2] [--csv F] [--docs F]

Needs no GPU. Prints registers, shared memory, tensor-core instructions and spills as compiled, and exits 1 when a limit
is broken: no tensor-core instruction where there must be one, a trap, spilled registers, too much shared memory or
tensor memory, more registers than a multiprocessor has.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlora.triton_kernels import common
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.aot_read import read_resources
from fastlora.triton_kernels.aot_report import MARKERS, Record, table, write_csv, write_docs
from fastlora.triton_kernels.prox_adamw import compile_cases as prox_adamw_cases
from fastlora.triton_kernels.rank_lora_fwd import compile_cases as fwd_cases
from fastlora.triton_kernels.rank_lora_grad import compile_cases as grad_cases
from fastlora.triton_kernels.rank_lora_tma import compile_cases as tma_cases
from fastlora.triton_kernels.rank_project import compile_cases as project_cases


@dataclass(frozen=True)
class Target:
    """What one block may use. `registers` counts 32-bit registers of a multiprocessor (NVIDIA) or a SIMD lane (AMD)."""

    gpu: GPUTarget
    shared: int
    registers: int
    tensor_memory: int = 0


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), shared=166_912, registers=65_536),
    "sm_90": Target(GPUTarget("cuda", 90, 32), shared=232_448, registers=65_536),
    "sm_100": Target(GPUTarget("cuda", 100, 32), shared=232_448, registers=65_536, tensor_memory=512),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), shared=65_536, registers=512),
}


def cases(target: str) -> Iterator[CompileCase]:
    """Every compile of a target."""
    for family_cases in (project_cases, fwd_cases, tma_cases, grad_cases, prox_adamw_cases):
        for compute in common.COMPUTE_TYPES:
            if compute == "tf32" and not target.startswith("sm_"):
                continue  # dot_precision never asks for it there
            yield from family_cases(target, compute)


def limits_broken(record: Record) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    if record.error:
        return [f"does not compile: {record.error}"]
    target, broken = TARGETS[record.target], []
    has_dot = not record.label.startswith(("grad finish", "grad gate", "prox adamw"))
    if has_dot and record.dtype != "fp32" and record.mmas == 0:
        broken.append("no tensor-core instruction")
    if record.label.startswith("tma") and record.bulk_copies == 0:
        broken.append("no bulk copy by descriptor")
    if record.traps:
        broken.append(f"{record.traps} trap instruction(s)")
    if record.spills:
        broken.append(f"{record.spills} spills")
    if record.shared > target.shared:
        broken.append(f"shared memory {record.shared} B > {target.shared} B")
    if record.tensor_memory > target.tensor_memory:
        broken.append(f"tensor memory {record.tensor_memory} columns > {target.tensor_memory}")
    # NVIDIA: all threads of a block share one register file; AMD: 4 SIMDs take the warps of a block in turn
    used = -(-record.num_warps // 4) if target.gpu.backend == "hip" else record.num_warps * target.gpu.warp_size
    if record.registers * used > target.registers:
        broken.append(f"{record.registers} registers x {used} > {target.registers}")
    return broken


def measure(target: str, case: CompileCase) -> Record:
    """Compile one case and read its resources."""
    tile = case.tile
    blocks = [
        case.constexprs[name]
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_B", "BLOCK_K", "BLOCK")
        if name in case.constexprs
    ]
    known: dict[str, Any] = dict(
        target=target, label=case.label, dtype=case.compute, rank=case.rank, tile="x".join(map(str, blocks)),
        odd="all" if "K" in case.odd else ",".join(case.odd[:1]), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    try:
        compiled = triton.compile(
            _source(case, TARGETS[target].gpu), target=TARGETS[target].gpu, options=dict(tile.launch)
        )
    except Exception as error:  # any failure of the compiler is a result to report, not the end of the report
        return Record(**known, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
    known |= read_resources(compiled.asm)
    return Record(**known, shared=compiled.metadata.shared, tensor_memory=tensor_memory)


def _source(case: CompileCase, gpu: GPUTarget) -> ASTSource:
    """Signature and run-time attributes as a launch gives them: multiples of 16, but for what is odd in this case."""
    signature, attrs = {}, {}
    # Triton tells AMD kernels which tensors are smaller than 2 GB
    small = [["tt.pointer_range", 32]] if gpu.backend == "hip" else []
    for index, param in enumerate(case.kernel.params):
        if param.is_constexpr or param.name in case.constexprs:
            signature[param.name] = "constexpr"
            continue
        signature[param.name] = case.pointers.get(param.name, "fp32" if param.name == "scaling" else "i32")
        aligned = param.name not in case.odd and param.name != "scaling" and not param.do_not_specialize
        facts = [["tt.divisibility", 16]] * aligned + small * (param.name in case.pointers)
        if facts:
            attrs[(index,)] = facts
    return ASTSource(case.kernel, signature, case.constexprs, attrs)


def _measure_index(target: str, index: int) -> Record:
    """For a worker process: a case holds jit functions, which do not travel, so its place in the list does."""
    return measure(target, list(cases(target))[index])


def _selected(target: str, quick: bool) -> list[tuple[int, CompileCase]]:
    """The compiles of a target by their place in the list; quick: of each tile in each kernel the one with most ranks."""
    numbered = list(enumerate(cases(target)))
    if not quick:
        return numbered
    ordered = sorted(numbered, key=lambda item: item[1].rank)
    kept = {(case.kernel, case.label.split()[0], case.compute, case.tile): index for index, case in ordered}
    return [(index, case) for index, case in numbered if index in kept.values()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastlora.triton_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--match", default="", help="only kernels whose 'name dtype' matches this regular expression")
    parser.add_argument("--quick", action="store_true", help="every tile of every kernel once, with most ranks")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    parser.add_argument("--csv", type=Path, help="write every record to this file as well")
    parser.add_argument("--docs", type=Path, help="replace the table of this page, between its two markers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (default: all cores)")
    options = parser.parse_args(arguments)
    if options.docs and not all(marker in options.docs.read_text() for marker in MARKERS):
        parser.error(
            f"{options.docs} lacks the markers {' and '.join(MARKERS)}; put them around the place of the table"
        )
    if common.is_interpreted():
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")

    work = [
        (target, index)
        for target in options.targets
        for index, case in _selected(target, options.quick)
        if re.search(options.match, f"{case.label} {case.compute}")
    ]
    if not work:
        parser.error(f"--match {options.match!r} matches no kernel; try --match split")
    if options.jobs == 1:
        records = [_measure_index(*item) for item in work]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            records = list(pool.map(_measure_index, *zip(*work)))
    verdicts = [limits_broken(record) for record in records]
    broken = sum(bool(verdict) for verdict in verdicts)
    summary = f"Triton {triton.__version__}: {len(records)} kernels compiled, {broken} break a limit"
    print(f"{table(records, verdicts, options.markdown)}\n\n{summary}")
    if options.csv:
        write_csv(options.csv, records, verdicts)
    if options.docs:
        write_docs(options.docs, records, verdicts, summary)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
