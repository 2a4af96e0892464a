"""Ahead-of-time compiles: a small part of them for real, in a process without the interpreter, and the gate's logic."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fastlora.triton_kernels import aot, aot_read, aot_report, common, tiles

GOOD = aot.Record(
    target="sm_90", label="split y large", dtype="fp16", rank=16, odd="", tile="128x256x64", num_warps=8, num_stages=3,
    registers=187, shared=147_456, mmas=5, async_copies=36,
)  # fmt: skip


def run(*arguments):
    """Run Python without the interpreter that the tests otherwise use."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def rows(table):
    """Cells of the table's lines by column name; an odd argument's column is never empty, so columns line up."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(header, cells)) for cells in body]


def test_command_compiles_and_reads_resources():
    command = ("-m", "fastlora.triton_kernels.aot", "--jobs", "1", "--markdown")
    done = run(*command, "--targets", "sm_90", "--match", "^(split y small|grad finish) fp16")
    assert done.returncode == 0, done.stdout + done.stderr
    records = rows(done.stdout)
    assert {record["kernel"] for record in records} == {"split y small", "grad finish"}
    for record in records:
        assert record["result"] == "ok" and record["spills"] == "0"
        assert 16 <= int(record["regs"]) <= 255 and int(record["shared"]) > 0
        is_gemm = record["kernel"].startswith("split")
        assert (int(record["mma"]) > 0) == is_gemm and (int(record["async"]) > 0) == is_gemm
    assert f"{len(records)} kernels compiled, 0 break a limit" in done.stdout


# a launch with N = K = R = 1 makes constants of them and of every stride that is 1; nothing else compiles that
SIZE_ONE = """
import re
from dataclasses import replace
from fastlora.triton_kernels import aot
seen = set()
for case in aot.cases("sm_90"):
    if case.compute == "fp16" and case.rank <= 64 and case.kernel not in seen:
        seen.add(case.kernel)
        # a row of one element cannot be described: there only R and its strides can be one
        pattern = "R|stride_(u.|dr)" if case.label.startswith("tma") else "[NKR]|stride_.*"
        ones = {p.name: 1 for p in case.kernel.params if re.fullmatch(pattern, p.name)}
        one = replace(case, constexprs=case.constexprs | ones, odd=tuple(case.kernel.arg_names))
        record = aot.measure("sm_90", one)
        assert not record.error, (case.label, record.error)
broken = aot.measure("sm_90", replace(case, constexprs={}))
print(len(seen), aot.limits_broken(broken))
"""


def test_sizes_of_one_compile_and_what_does_not_compile_is_told():
    done = run("-c", SIZE_ONE)
    assert done.returncode == 0, done.stderr
    kernels, verdict = done.stdout.split(maxsplit=1)
    assert int(kernels) == len({case.kernel for case in aot.cases("sm_90") if case.compute == "fp16"})
    assert verdict.startswith("['does not compile: ")


def test_command_exits_1_when_a_limit_is_broken(monkeypatch, capsys):
    monkeypatch.setattr(common, "is_interpreted", lambda: False)
    monkeypatch.setattr(aot, "measure", lambda target, case: GOOD)
    arguments = ["--targets", "sm_90", "--match", "grad finish bf16", "--jobs", "1"]
    assert aot.main(arguments) == 0
    assert "0 break a limit" in capsys.readouterr().out
    monkeypatch.setattr(aot, "measure", lambda target, case: replace(GOOD, spills=8))
    assert aot.main(arguments) == 1
    assert "8 spills" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, text",
    [
        ({"mmas": 0}, "no tensor-core instruction"),
        ({"mmas": 0, "traps": 1}, "1 trap instruction"),
        ({"spills": 8}, "8 spills"),
        ({"shared": 232_449}, "shared memory 232449 B > 232448 B"),
        ({"target": "sm_80"}, None),
        ({"target": "sm_80", "shared": 166_913}, "shared memory 166913 B > 166912 B"),
        ({"tensor_memory": 1}, "tensor memory 1 columns > 0"),
        ({"target": "sm_100", "tensor_memory": 512}, None),
        ({"target": "sm_100", "tensor_memory": 528}, "tensor memory 528 columns > 512"),
        ({"registers": 257}, "257 registers x 256 > 65536"),
        ({"registers": 256}, None),
        ({"target": "gfx942", "shared": 65_536, "registers": 256}, None),
        ({"target": "gfx942", "shared": 65_536, "registers": 257}, "257 registers x 2 > 512"),
        ({"target": "gfx942"}, "shared memory 147456 B > 65536 B"),
        ({"mmas": 0, "dtype": "fp32"}, None),
        ({"mmas": 0, "dtype": "tf32"}, "no tensor-core instruction"),
        ({"mmas": 0, "label": "grad finish"}, None),
        ({"label": "tma split y large"}, "no bulk copy by descriptor"),
        ({"label": "tma split y large", "bulk_copies": 6}, None),
        ({"mmas": 0, "label": "grad narrow"}, "no tensor-core instruction"),
    ],
)
def test_gate(change, text):
    assert aot.limits_broken(GOOD) == []
    broken = aot.limits_broken(replace(GOOD, **change))
    assert (broken == []) if text is None else any(text in line for line in broken)


def test_a_broken_record_shows_in_the_table():
    records, verdicts = [GOOD, replace(GOOD, spills=8)], [[], ["8 spills"]]
    text = aot_report.table(records, verdicts)
    assert text.splitlines()[1].endswith("ok") and text.splitlines()[2].endswith("8 spills")
    assert len(rows(aot_report.table(records, verdicts, markdown=True))) == 2


def test_csv_and_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "is_interpreted", lambda: False)
    monkeypatch.setattr(aot, "measure", lambda target, case: replace(GOOD, dtype=case.compute, label=case.label))
    page, report = tmp_path / "kernels.md", tmp_path / "aot.csv"
    page.write_text("before\n<!-- resources -->\nold\n<!-- end of resources -->\nafter\n")
    chosen = ["--targets", "sm_90", "--match", "grad finish", "--jobs", "1", "--csv", str(report), "--docs", str(page)]
    assert aot.main(chosen) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert {row["dtype"] for row in rows(text)} == {"bf16"}
    with report.open() as file:
        records = list(csv.DictReader(file))
    assert {record["dtype"] for record in records} == set(common.COMPUTE_TYPES)
    assert {record["result"] for record in records} == {"ok"}
    page.write_text("no markers")
    with pytest.raises(SystemExit):
        aot.main(chosen)
    assert "lacks the markers" in capsys.readouterr().err and page.read_text() == "no markers"


SASS = """
        /*0010*/              HGMMA.64x16x16.F32 R24, gdesc[UR8], R24 ;    /* 0x0 */
        /*0020*/              HGMMA.64x256x16.F32 R24, gdesc[UR8], R24 ;   /* 0x0 */
        /*0030*/              HGMMA.64x256x16.F32 R24, gdesc[UR8], R24 ;   /* 0x0 */
        /*0040*/        @!P6 BRA 0x20 ;                                    /* 0x0 */
        /*0050*/              HMMA.16816.F32 R4, R8, R2, R4 ;              /* 0x0 */
        /*0060*/        @!P0 BRA 0x50 ;                                    /* 0x0 */
        /*0070*/        @!P0 BRA 0x10 ;                                    /* 0x0 */
"""
AMD = """
.LBB0_1:
\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc1 .LBB0_1
\tv_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_branch .LBB0_9
"""


def test_a_step_is_the_first_innermost_loop_with_tensor_core_instructions():
    assert aot_read._sass_loop_mmas(SASS) == 2
    assert aot_read._sass_loop_mmas(SASS.replace("BRA 0x20", "NOP")) == 1
    assert aot_read._amd_loop_mmas(AMD) == 1
    assert aot_read._sass_loop_mmas("") == aot_read._amd_loop_mmas("") == 0


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_shipped_tile_is_compiled(target):
    compiled = {(case.compute, case.tile) for case in aot.cases(target)}
    computes = [compute for compute in common.COMPUTE_TYPES if compute != "tf32" or target != "gfx942"]
    for kernel in ("gemm", "one_pass", "project", "grad", "one_read"):
        for compute in computes:
            for tile in tiles.tile_configs(kernel, compute, target).values():
                assert (compute, tile) in compiled


@pytest.mark.parametrize(
    "arguments, interpreted, text",
    [
        ([], True, "TRITON_INTERPRET is set"),
        (["--match", "nothing"], False, "--match 'nothing' matches no kernel; try --match split"),
        (["--targets", "sm_70"], False, "invalid choice: 'sm_70'"),
    ],
)
def test_command_says_what_is_wrong(arguments, interpreted, text, monkeypatch, capsys):
    monkeypatch.setattr(common, "is_interpreted", lambda: interpreted)
    with pytest.raises(SystemExit) as exit:
        aot.main(arguments)
    assert exit.value.code == 2 and text in capsys.readouterr().err
