"""What a compiled kernel uses, read from its binary: registers, instructions by kind, spills, traps."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton.backends.nvidia

_SASS_MMA = re.compile(r"\b(?:HGMMA|HMMA|QGMMA|UTC\w*MMA)\b")
_SASS_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
_AMD_MMA = re.compile(r"\bv_mfma_")


def read_resources(asm: Mapping[str, Any]) -> dict[str, int]:
    """Resources of a compiled kernel, by the names of `aot.Record`; `asm` as Triton's compiler gives it."""
    return _read_amdgcn(asm["amdgcn"]) if "amdgcn" in asm else _read_cubin(asm["cubin"], asm["ptx"])


def _read_cubin(cubin: bytes, ptx: str) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, sass = (_cuobjdump(flag, path) for flag in ("-res-usage", "-sass"))
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return {
        "registers": int(found["REG"]),
        "mmas": len(_SASS_MMA.findall(sass)),
        "loop_mmas": _sass_loop_mmas(sass),
        "async_copies": count(r"\b(?:LDGSTS|UTMALDG)\b"),
        "bulk_copies": count(r"\bUTMALDG\b"),
        "spills": count(r"\b(?:STL|LDL)\b") + int(found["STACK"]) + int(found["LOCAL"]),
        # in the PTX: sm_100 binaries end in trap subroutines of the tensor-memory allocation that nothing is wrong with
        "traps": len(re.findall(r"\btrap;", ptx)),
    }


def _read_amdgcn(text: str) -> dict[str, int]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, f"the listing names no {name}"
        return int(found.group(1))

    return {
        "registers": field("vgpr_count"),  # on this target it includes the accumulation registers
        "mmas": len(_AMD_MMA.findall(text)),
        "loop_mmas": _amd_loop_mmas(text),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "traps": len(re.findall(r"\bs_trap\b", text)),
    }


def _sass_loop_mmas(sass: str) -> int:
    mmas, jumps = [], []
    for address, text in _SASS_INSTRUCTION.findall(sass):
        if _SASS_MMA.search(text):
            mmas.append(int(address, 16))
        target = re.search(r"\bBRA(?:\.\S+)? (?:\S+, )?0x([0-9a-f]+)", text)
        if target:
            jumps.append((int(target.group(1), 16), int(address, 16)))
    return _in_first_loop(mmas, jumps)


def _amd_loop_mmas(text: str) -> int:
    lines = text.splitlines()
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if line.startswith(".LBB")}
    mmas = [number for number, line in enumerate(lines) if _AMD_MMA.search(line)]
    jumps = []
    for number, line in enumerate(lines):
        target = re.match(r"\s+s_c?branch\S*\s+(\.LBB\S+)", line)
        if target and target.group(1) in labels:
            jumps.append((labels[target.group(1)], number))
    return _in_first_loop(mmas, jumps)


def _in_first_loop(mmas: Sequence[int], jumps: Sequence[tuple[int, int]]) -> int:
    """Tensor-core instructions in the first innermost loop that has some: one step of the K loop. A loop jumps back."""
    loops = [(first, last) for first, last in jumps if first < last]
    counts = {loop: sum(loop[0] <= mma <= loop[1] for mma in mmas) for loop in loops}
    busy = [loop for loop in loops if counts[loop]]
    innermost = [
        (first, last)
        for first, last in busy
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in busy)
    ]
    return counts[min(innermost)] if innermost else 0


def _cuobjdump(flag: str, path: Path) -> str:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout
