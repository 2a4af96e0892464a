"""merge_ on a CUDA device against the CPU path; tests/csrc/test_merge_kernel.py runs the same kernel without one."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from merge_calls import HALF_OR_SINGLE, assert_refused, bytes_of, make, merged, three_modules

from fastlora.ops.merge import merge_, new_residuals, unmerge_

pytestmark = pytest.mark.gpu
WAYS = ("nearest", "stochastic", "int8", "same dtype")


def run(weight, adapter, way, layout="rows", device="cuda", **options):
    """Merged weight, residual and module report, by the device."""
    weight = weight.to(device)
    weight = weight.t().contiguous().t() if layout == "transposed" else weight.clone()
    residuals = new_residuals([weight], int8=way == "int8") if way in ("int8", "same dtype") else None
    if way == "stochastic":
        options |= {"rounding": "stochastic", "seed": 2**60 + 3}
    report = merge_([weight], *([tensor.to(device)] for tensor in adapter), residuals=residuals, scaling=0.3, **options)
    assert report.backend == ("cuda" if device == "cuda" else "cpp")
    return weight.cpu(), residuals and residuals[0].cpu(), report.modules[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("dtype", HALF_OR_SINGLE)
@pytest.mark.parametrize(("n", "k", "r"), [(1, 1, 1), (33, 17, 3), (768, 768, 16), (100, 300, 24)])
def test_the_same_bits_as_the_cpu_on_the_fp32_cores(n, k, r, dtype, layout, way):
    weight, *adapter = make(n, k, r, dtype)
    ours, residual, report = run(weight, adapter, way, layout)
    expected, expected_residual, expected_report = run(weight, adapter, way, layout, "cpu")
    assert torch.equal(bytes_of(ours), bytes_of(expected))
    if residual is not None:
        assert torch.equal(residual, expected_residual)
    assert (report.kept_rank, report.unchanged) == (expected_report.kept_rank, expected_report.unchanged)
    assert report.delta_norm == pytest.approx(expected_report.delta_norm, rel=1e-5)
    assert report.error_norm == pytest.approx(expected_report.error_norm, rel=1e-5, abs=1e-20)
    assert report.max_relative_error == pytest.approx(expected_report.max_relative_error, rel=1e-6)


@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("rank", [40, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_unit_in_the_last_place_on_the_tensor_cores(dtype, rank, layout):
    weight, *adapter = make(200, 300, rank, dtype)
    ours, _, _ = run(weight, adapter, "nearest", layout)
    expected, _, _ = run(weight, adapter, "nearest", layout, "cpu")
    steps = (ours.contiguous().view(torch.int16).int() - expected.contiguous().view(torch.int16).int()).abs()
    assert ((steps <= 1) | ((ours.float() - expected.float()).abs() < 4e-6)).all()


def test_it_checks_before_it_writes():
    lists = [[tensor.cuda() for tensor in group] for group in three_modules()]
    lists[2][1][3, 0] = float("nan")
    assert_refused(lists, r"weights\[1\]: lora_b holds 1 non-finite", ("weights[1]",))
    lists[2][1][3, 0] = 1e30
    assert_refused(lists, r"weights\[1\]: \d+ of 33280 results are not finite in float16", ("weights[1]",))


def test_operands_on_two_devices_are_refused():
    weight, lora_a, lora_b, gate = make()
    with pytest.raises(ValueError, match="lora_a of .* is on cpu and its weight on cuda:0"):
        merge_([weight.cuda()], [lora_a], [lora_b], [gate])


def test_unmerge_restores_every_bit():
    weight, *adapter = make(96, 128, 8, torch.float16, size=0.02)
    start, residuals = weight.cuda(), new_residuals([weight.cuda()], int8=True)
    ours, lists = start.clone(), [[tensor.cuda()] for tensor in adapter]
    merge_([ours], *lists, residuals=residuals, scaling=0.01)
    unmerge_([ours], *lists, residuals=residuals, scaling=0.01)
    assert torch.equal(ours, start)


def test_it_runs_on_the_stream_of_its_caller():
    weight, *adapter = make(768, 768, 4, torch.float16)
    expected, _ = merged(weight, *adapter)
    ours, lists, stream = (
        torch.empty_like(weight, device="cuda"),
        [[tensor.cuda()] for tensor in adapter],
        torch.cuda.Stream(),
    )
    source = weight.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        ours.copy_(source)  # behind the sleep: another stream would merge into what was there before
        merge_([ours], *lists)
    stream.synchronize()
    assert torch.equal(ours.cpu(), expected)


def test_a_captured_merge_is_replayed_and_its_report_read_later():
    weight, *adapter = make(100, 300, 8, torch.float16)
    ours, lists = weight.cuda(), [[tensor.cuda()] for tensor in adapter]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(ValueError, match="check=True reads what it finds on the host"):
        merge_([ours], *lists)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = merge_([ours], *lists, check=False)
    assert torch.equal(ours.cpu(), weight), "capturing writes nothing"
    expected = weight.clone()
    for _ in range(3):
        graph.replay()
        expected_report = merge_([expected], *([tensor] for tensor in adapter)).modules[0]
    assert torch.equal(ours.cpu(), expected)
    assert report.modules[0].delta_norm == pytest.approx(expected_report.delta_norm, rel=1e-5)
    assert report.modules[0].kept_rank == expected_report.kept_rank


SANITIZED = """
import torch
from fastlora.ops import merge_, new_residuals
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for n, k, r in ((33, 257, 5), (70, 300, 40), (1, 1, 1)):
        weight = torch.randn(n, k, device="cuda").to(dtype)
        lists = [torch.randn(r, k, device="cuda")], [torch.randn(n, r, device="cuda")], [torch.ones(r, device="cuda")]
        merge_([weight], *lists)
        merge_([weight], *lists, rounding="stochastic", seed=1)
        for int8 in (False, True):
            merge_([weight], *lists, residuals=new_residuals([weight], int8=int8))
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("no compute-sanitizer on PATH")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=merge_kernel"]
    done = subprocess.run([*command, sys.executable, "-c", SANITIZED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
