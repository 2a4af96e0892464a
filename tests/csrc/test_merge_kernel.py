"""The CUDA merge kernel, compiled for the host and run block by block, against the CPU path: what CI proves of the GPU.

Bit for bit on the FP32-core path, in all three ways of rounding; within one unit in the last place on the tensor-core
path. What remains for a GPU: memory that threads share without a barrier, and the hardware's own products.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from guard_pages import at_a_page
from merge_calls import DTYPES, raw

from fastlora.build import build_info, extension

_C = extension()
pytestmark = pytest.mark.skipif(_C is None, reason=f"no extension: {build_info()['extension_reason']}")

ROOT = Path(__file__).resolve().parents[2]
FIGURES = (
    "kept_rank", "delta_square", "lost_square", "updated", "unchanged", "not_finite", "largest", "max_relative",
    "bad_a", "bad_b", "bad_gate", "bad_residual",
)  # fmt: skip
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
TILE = (32, 256)


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "stride_row", "stride_col")),
    ]


class Rounding(ctypes.Structure):
    _fields_ = [("stochastic", ctypes.c_bool), ("seed", ctypes.c_uint64), ("module", ctypes.c_uint32)]


class MergeItem(ctypes.Structure):
    _fields_ = [
        ("weight", Matrix),
        ("lora_a", Matrix),
        ("lora_b", Matrix),
        ("gate", ctypes.c_void_p),
        ("scaling", ctypes.c_double),
        ("residual", Matrix),
        ("rounding", Rounding),
    ]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    """run(write, backward, items) -> figures of each item, from a library that is compiled once."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the kernel for the host")
    library = tmp_path_factory.mktemp("kernel") / "merge_on_host.so"
    sources = [ROOT / "tests/csrc/merge_on_host.cpp", ROOT / "csrc/merge.cpp"]
    fused = ["-mfma"] if platform.machine() in ("x86_64", "AMD64") and len(_C.simd_levels()) > 1 else []
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", *fused, f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, *map(str, sources), "-o", str(library)], check=True, timeout=300)
    call = ctypes.CDLL(str(library)).run_merge_kernel
    call.restype = ctypes.c_int64

    def run(write, backward, items):
        figures = (ctypes.c_double * (12 * len(items)))()
        array = (MergeItem * len(items))(*items)
        tiles = call(array, ctypes.c_int64(len(items)), write, backward, figures)
        return [dict(zip(FIGURES, figures[12 * i : 12 * i + 12])) for i in range(len(items))], tiles

    return run


def matrix(tensor):
    return Matrix(tensor.data_ptr(), NUMBERS[tensor.dtype], *tensor.shape, *tensor.stride())


class Case:
    """One module's operands, for the kernel and for the CPU path."""

    def __init__(self, shape, name, mode="nearest", layout="rows", adapter=torch.float32, module=0, spread=1.0):
        n, k, r = shape
        self.weight = torch.randn(n, k).to(getattr(torch, name))
        self.weight = {
            "rows": self.weight,
            "transposed": self.weight.t().contiguous().t(),
            "slice": torch.zeros(n + 2, k + 3, dtype=self.weight.dtype)[1 : n + 1, 1 : k + 1].copy_(self.weight),
        }[layout]
        self.lora_a, self.lora_b = torch.randn(r, k).to(adapter), (torch.randn(n, r) * 0.1 * spread).to(adapter)
        self.gate, self.mode, self.module = torch.randn(r), mode, module
        self.gate[1::3] = 0
        self.residual = None
        if mode in ("int8", "same dtype"):
            like = self.weight if layout != "slice" else self.weight.contiguous()
            self.residual = torch.zeros_like(like, dtype=torch.int8 if mode == "int8" else None)

    def copy(self):
        """Same values in memory of its own, laid out as before."""
        out = Case.__new__(Case)
        out.__dict__.update(self.__dict__)
        whole = self.weight if self.weight._base is None else self.weight._base
        frame = whole.clone(memory_format=torch.preserve_format)
        out.weight = frame.as_strided(self.weight.shape, self.weight.stride(), self.weight.storage_offset())
        out.residual = None if self.residual is None else self.residual.clone(memory_format=torch.preserve_format)
        return out

    def item(self):
        residual = Matrix() if self.residual is None else matrix(self.residual)
        rounding = Rounding(self.mode == "stochastic", 2**61 + 7, self.module)
        adapters = (matrix(self.lora_a), matrix(self.lora_b))
        return MergeItem(matrix(self.weight), *adapters, self.gate.data_ptr(), 0.7, residual, rounding)

    def cpu_item(self):
        def of(tensor):
            dtype = getattr(_C.DType, str(tensor.dtype).removeprefix("torch."))
            return _C.Matrix(tensor.data_ptr(), dtype, *tensor.shape, *tensor.stride())

        options = {
            "residual": None if self.residual is None else of(self.residual),
            "seed": 2**61 + 7 if self.mode == "stochastic" else None,
            "module": self.module,
        }
        operands = map(of, (self.weight, self.lora_a, self.lora_b))
        return _C.MergeItem(*operands, self.gate.data_ptr(), 0.7, **options)


def run_both(kernel, cases, write=True, backward=False):
    """(case, figures) by the kernel and by the CPU path."""
    ours, theirs = [case.copy() for case in cases], [case.copy() for case in cases]
    figures, tiles = kernel(write, backward, [case.item() for case in ours])
    cpu = (_C.merge_cpu if write else _C.check_cpu)([case.cpu_item() for case in theirs], 1)
    told = [{name: getattr(report, name) for name in FIGURES} for report in cpu]
    return list(zip(ours, figures)), list(zip(theirs, told)), tiles


def assert_same_figures(kernel_figures, cpu_figures):
    for name in FIGURES:
        rel = 1e-5 if name.endswith("square") else 2e-7 if name == "max_relative" else 0
        assert kernel_figures[name] == pytest.approx(cpu_figures[name], rel=rel, abs=1e-30, nan_ok=True), name


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "int8", "same dtype"])
@pytest.mark.parametrize("name", DTYPES)
def test_the_kernel_gives_the_bits_of_the_cpu(kernel, name, mode, backward):
    """Ragged tiles, views and transposed storage, all ranks that the FP32 cores take; float32 takes any rank there."""
    torch.manual_seed(1)
    many = 70 if name == "float32" else 24
    cases = [
        Case((33, 257, 5), name, mode),
        Case((4, 8, many), name, mode, "transposed", module=1),
        Case((70, 300, 17), name, mode, "slice", torch.bfloat16, module=2),
        Case((1, 1, 1), name, mode, module=3),
        Case((64, 264, 0), name, mode, module=4),
        Case((40, 31, 3), name, mode, "transposed", torch.float16, module=5),
    ]
    ours, theirs, _ = run_both(kernel, cases, backward=backward)
    for before, (case, figures), (cpu, cpu_figures) in zip(cases, ours, theirs):
        assert raw(case.weight) == raw(cpu.weight) and raw(case.residual) == raw(cpu.residual)
        assert raw(case.weight) != raw(before.weight) or case.gate.numel() <= 1
        assert_same_figures(figures, cpu_figures)
        if before.weight._base is not None:  # nothing beside the view is written
            frame, old = case.weight._base, before.weight._base
            assert int((frame != old).sum()) == int((case.weight != before.weight).sum())


def test_one_launch_for_modules_of_all_dtypes_and_modes(kernel):
    modes = ["nearest", "stochastic", "int8", "same dtype"]
    cases = [Case((40, 70, 4), name, mode, module=i) for i, (name, mode) in enumerate(zip(DTYPES * 2, modes * 2))]
    ours, theirs, tiles = run_both(kernel, cases)
    assert tiles == len(cases) * 2
    for (case, figures), (cpu, cpu_figures) in zip(ours, theirs):
        assert raw(case.weight) == raw(cpu.weight) and raw(case.residual) == raw(cpu.residual)
        assert_same_figures(figures, cpu_figures)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
@pytest.mark.parametrize("rank", [40, 100])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_tensor_cores_are_within_one_unit_in_the_last_place(kernel, name, rank, layout, backward):
    """Three products of TF32 parts: as near as float32 sums, which differ in their last digits only by the order."""
    torch.manual_seed(2)
    case = Case((45, 290, rank), name, layout=layout)
    assert int((case.gate != 0).sum()) > 24
    ((ours, figures),), ((cpu, cpu_figures),), _ = run_both(kernel, [case], backward=backward)
    steps = (ours.weight.contiguous().view(torch.int16).int() - cpu.weight.contiguous().view(torch.int16).int()).abs()
    apart = (ours.weight.float() - cpu.weight.float()).abs()
    assert ((steps <= 1) | (apart < 2e-6)).all()  # where weight and update cancel, float32's last digit is many units
    assert float((steps > 0).float().mean()) < 2e-3
    assert figures["delta_square"] == pytest.approx(cpu_figures["delta_square"], rel=1e-5)
    assert figures["kept_rank"] == cpu_figures["kept_rank"]


@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_check_reads_only_and_counts_what_the_cpu_counts(kernel, layout):
    torch.manual_seed(3)
    cases = [Case((70, 520, 6), "float16", mode, layout) for mode in ("nearest", "same dtype", "int8", "nearest")]
    cases[0].weight[69, 519] = cases[0].weight[3, 4] = 65504.0
    cases[0].lora_a[0], cases[0].lora_b[:, 0], cases[0].gate[:] = 100.0, 100.0, torch.tensor([1.0, 0, 0, 0, 0, 0])
    cases[1].residual[60, 500] = float("nan")
    cases[2].lora_a[1, 519] = cases[2].lora_b[69, 1] = cases[2].lora_b[0, 4] = float("inf")  # of dead ranks
    cases[3].gate[2] = float("nan")
    ours, theirs, _ = run_both(kernel, cases, write=False)
    for before, (case, figures), (_, cpu_figures) in zip(cases, ours, theirs):
        assert raw(case.weight) == raw(before.weight) and raw(case.residual) == raw(before.residual)
        for name in ("kept_rank", "not_finite", "largest", "bad_a", "bad_b", "bad_gate", "bad_residual"):
            assert figures[name] == cpu_figures[name], name
    assert [sum(figures[name] for name in FIGURES if name.startswith("bad")) for _, figures in ours] == [0, 1, 3, 1]
    assert ours[0][1]["not_finite"] >= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to outlive what it looks for")
@pytest.mark.parametrize("path", ["kernel", "cpu"])
def test_nothing_beyond_an_operand_is_touched(kernel, path):
    """Every operand ends where a page ends and the next may not be touched; a fault would kill the child."""
    torch.manual_seed(4)
    modes = ["nearest", "stochastic", "int8", "same dtype"]
    child = os.fork()
    if child == 0:
        keep = []
        for i in range(40):
            shape = [int(size) for size in torch.randint(1, 70, (2,))] + [int(torch.randint(0, 30, ()))]
            case = Case(shape, DTYPES[i % 3], modes[i % 4])
            for name in ("weight", "lora_a", "lora_b", "gate", "residual"):
                if getattr(case, name) is not None:
                    setattr(case, name, at_a_page(getattr(case, name), keep))
            for write in (False, True):
                if path == "kernel":
                    kernel(write, False, [case.item()])
                else:
                    (_C.merge_cpu if write else _C.check_cpu)([case.cpu_item()], 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_squares_beyond_float32_are_taken_again(kernel):
    cases = [Case((33, 40, 1), "bfloat16", spread=spread) for spread in (1e21, 1e-22)]
    for case in cases:
        case.gate[:] = 1.0
    ours, theirs, _ = run_both(kernel, cases)
    for (_, figures), (_, cpu_figures) in zip(ours, theirs):
        assert 0 < figures["delta_square"] < float("inf")
        assert figures["delta_square"] == pytest.approx(cpu_figures["delta_square"], rel=1e-5)
