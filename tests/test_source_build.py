"""What a build from source says when it cannot be as wanted: tools that are missing, too old, or only fail."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from builds import FAILING_NVCC, ROOT, SUFFIX, build_ext, compiler_without, copy_of_the_tree, needs_tools, planted, run

setuptools = pytest.importorskip("setuptools")


@pytest.fixture
def build_folder(tmp_path):
    return copy_of_the_tree(tmp_path / "tree")


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, as it is run, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **given: None)
    for switch in ("FASTLORA_BUILD_EXT", "FASTLORA_CUDA", "CXX"):
        monkeypatch.delenv(switch, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def programs(folder, *names):
    """A PATH with these programs of this machine alone."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def pybind11_arguments():
    import pybind11

    return [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]


def cmake():
    return shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@needs_tools
def test_failed_build_is_told_and_passes_unless_asked_for(build_folder):
    (build_folder / "CMakeLists.txt").write_text('message(FATAL_ERROR "planted")\n')
    done, record = build_ext(build_folder, FASTLORA_CUDA="off")
    assert done.returncode == 0 and "WITHOUT its extension" in done.stderr
    assert record["extension"] is False and "planted" in record["extension_reason"]
    done, _ = build_ext(build_folder, FASTLORA_CUDA="off", FASTLORA_BUILD_EXT="on")
    assert done.returncode != 0 and "planted" in done.stderr


@needs_tools
def test_without_a_compiler_it_names_one_to_install(build_folder, tmp_path):
    """With nvcc at hand, too: that it fails for want of a C++ compiler is not told as a fault of nvcc."""
    path = programs(tmp_path / "bin", "sh", "uname")
    done, record = build_ext(build_folder, PATH=path, CXX="", CUDACXX=planted(build_folder, "nvcc", FAILING_NVCC))
    assert done.returncode == 0 and "no C++ compiler was found. Install one (apt install g++" in done.stderr
    assert record["extension_reason"].startswith("no C++ compiler was found")


@needs_tools
def test_a_compiler_that_is_not_there_is_named(build_folder):
    done, record = build_ext(build_folder, FASTLORA_CUDA="off", FASTLORA_BUILD_EXT="on", CXX="/nowhere/g++")
    assert done.returncode != 0 and record is None
    assert "CXX names a compiler that is not there: '/nowhere/g++'. Set it to one that is, or unset it" in done.stderr


@needs_tools
def test_a_compiler_before_cpp17_is_told_and_not_remembered(build_folder):
    """Once another compiler is named, or the same was updated, the build goes on: no cache keeps what was missing."""
    old = compiler_without(build_folder, "-std=c++17", "-std=c++1z")
    done, record = build_ext(build_folder, FASTLORA_CUDA="off", CXX=old)
    assert done.returncode == 0
    assert record["extension_reason"].startswith(
        "the C++ compiler does not compile C++17. Install a newer one, or name"
    )
    assert old in done.stdout
    assert not list((build_folder / "build").glob("cmake-*/CMakeCache.txt"))


@needs_tools
@pytest.mark.skipif("x86_64" not in os.uname().machine, reason="AVX-512 is of x86")
def test_a_compiler_without_avx512_builds_the_rest(build_folder):
    """No object refers to what is left out, so the module links; the one that chooses is compiled to see it."""
    refusing = compiler_without(build_folder, "-mavx512*")
    configure = ["-S", ".", "-B", "objects", "-GNinja", f"-DPython_EXECUTABLE={sys.executable}", *pybind11_arguments()]
    told = run([cmake(), *configure, f"-DCMAKE_CXX_COMPILER={refusing}"], build_folder)
    assert "does not compile AVX-512: merges on a CPU run AVX2 at most" in " ".join(told.stderr.split())
    assert "merge_avx512" not in (build_folder / "objects" / "build.ninja").read_text()
    chooser = "CMakeFiles/_C.dir/csrc/merge_cpu.cpp.o"
    run([cmake(), "--build", "objects", "--target", chooser], build_folder)
    referred = (build_folder / "objects" / chooser).read_bytes()
    assert b"avx2_isa" in referred and b"avx512_isa" not in referred


@needs_tools
def test_cuda_asked_for_by_name_is_built_or_an_error(build_folder):
    nvcc = planted(build_folder, "nvcc", FAILING_NVCC)
    done, record = build_ext(build_folder, CUDACXX=nvcc, FASTLORA_CUDA="on")
    assert done.returncode != 0 and record is None
    assert (
        f"FASTLORA_CUDA=on, but the build with {nvcc} failed: `nvcc` exited with 1: nvcc: error: planted."
        in done.stderr
    )


def test_cuda_asked_for_where_there_is_no_nvcc(setup_py):
    setup_py["build_wanted"].__globals__["find_nvcc"] = lambda: None
    with pytest.raises(
        setuptools.errors.CompileError, match="FASTLORA_CUDA=on, but no nvcc in CUDACXX.*Put nvcc on PATH"
    ):
        setup_py["build_wanted"](Path("_C.so"), "1", "on")


def test_a_setuptools_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(
        SystemExit, match="setuptools 65.5.0 is too old; pip install 'setuptools>=77', or build in isolation"
    ):
        runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    "missing, said",
    [
        ("pybind11", r"pybind11 is missing; pip install 'pybind11>=3.0', or build in isolation"),
        ("cmake", r"cmake is missing; pip install 'cmake>=3.26' ninja, or build in isolation"),
    ],
)
def test_a_build_tool_that_is_missing_without_isolation(setup_py, monkeypatch, missing, said):
    pytest.importorskip("pybind11")
    if missing == "pybind11":
        monkeypatch.setitem(sys.modules, "pybind11", None)
    setup_py["compile_extension"].__globals__["tool"] = lambda name: None
    with pytest.raises(setuptools.errors.CompileError, match=said):
        setup_py["compile_extension"](Path("_C.so"), "1", [])


@pytest.mark.parametrize(
    "output, said",
    [
        (
            'CMake was unable to find a build program corresponding to "Unix Makefiles".  CMAKE_MAKE_PROGRAM is not set.',
            "neither ninja nor make was found; pip install ninja",
        ),
        (
            "Could NOT find Python (missing: Python_INCLUDE_DIRS Development.Module) (found version 3.11.2)",
            f"the headers of Python {sys.version_info[0]}.{sys.version_info[1]} are missing. Install them (apt install",
        ),
        ("everything is well", ""),
    ],
)
def test_what_cmake_says_is_told_with_what_to_do(setup_py, output, said):
    assert setup_py["cause"](output).startswith(said) and bool(setup_py["cause"](output)) == bool(said)


@pytest.mark.parametrize(
    "output, said",
    [
        ("fine\nx.cpp:3: error: no such thing\n here\n  ^\nmore", "x.cpp:3: error: no such thing here ^"),
        ("an_error_handler.cpp\nkilled", "killed"),
        ("CMake Error at CMakeLists.txt:9 (message):\n  planted\n", "planted"),
        ("", ""),
    ],
)
def test_of_an_unknown_failure_the_first_error_is_told(setup_py, output, said):
    assert setup_py["first_error"](output) == said


def test_no_folder_of_the_builder_is_recorded(setup_py):
    cut = setup_py["without_folders"]
    assert cut("the build with /home/me/cuda/bin/nvcc failed: `nvcc` exited with 1: '/tmp/a b/x.cu' at 3/4") == (
        "the build with nvcc failed: `nvcc` exited with 1: 'a b/x.cu' at 3/4"
    )
    assert "/" not in setup_py["system"]() and os.uname().release not in setup_py["system"]()


def test_build_without_the_extension_packs_no_older_one(build_folder):
    older = build_folder / "out" / "fastlora" / f"_C{SUFFIX}"
    older.parent.mkdir(parents=True)
    older.write_bytes(b"an earlier build")
    done, record = build_ext(build_folder, FASTLORA_BUILD_EXT="off")
    assert done.returncode == 0 and not older.exists()
    assert (record["extension"], record["extension_reason"]) == (False, "FASTLORA_BUILD_EXT=off")


def test_unknown_switch_is_refused(build_folder):
    done, _ = build_ext(build_folder, FASTLORA_CUDA="yes")
    assert done.returncode != 0 and "FASTLORA_CUDA is 'yes'; it must be auto, on or off" in done.stderr
