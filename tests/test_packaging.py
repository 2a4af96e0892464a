"""The source distribution, the wheel built from it, and both ways to install: what lies in them, and what imports.

The wheel is built once, from the source distribution, without CUDA and without an isolated environment, so that nothing
is downloaded; it is installed into an environment of its own that borrows torch from this one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from builds import FAILING_NVCC, ROOT, SUFFIX, copy_of_the_tree, needs_tools, planted, run

import fastlora
from fastlora.build import build_info

PROBE = """
import json, os, sys
import torch
import fastlora, fastlora.triton_kernels, fastlora.modules, fastlora.ops
from fastlora.build import build_info, extension
from fastlora.ops.merge_native import serves
layer = fastlora.FusedRankLoRALinear.from_linear(torch.nn.Linear(16, 8), rank=2)
torch.nn.init.ones_(layer.lora_b)
x, frozen = torch.ones(1, 16), layer.weight.clone()
expected = layer(x)
fastlora.merge(torch.nn.Sequential(layer))
merged = torch.nn.functional.linear(x, layer.weight, layer.bias)
print(json.dumps({
    "merged_by_extension": serves(layer.weight) and not torch.equal(layer.weight, frozen),
    "error": (merged - expected).abs().max().item(),
    "fastlora": fastlora.__file__,
    "triton_kernels": fastlora.triton_kernels.__file__,
    "extension": getattr(extension(), "__file__", None),
    "info": build_info(),
    "bare": "triton_kernels" in sys.modules,
}))
"""


def python_sources(package, folder):
    """Names inside a wheel of all Python files below a source folder."""
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """Built from a copy of the tree with planted strays, so that this build leaves none here."""
    folder = tmp_path_factory.mktemp("sdist")
    copy_of_the_tree(folder / "tree")
    for stray in ("tests/test_stray.py", "build/lib/fastlora/gone.py", "fastlora/_build_info.json"):
        (folder / "tree" / stray).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / stray).write_text("{}")
    backend = "from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run([sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {backend}", folder], folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel(sdist, tmp_path_factory):
    """With a broken nvcc and FASTLORA_CUDA=auto: the host code is built, and the record says why there is no more."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", sdist, "-w", folder]
    command += ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run(command, folder, FASTLORA_BUILD_EXT="on", CUDACXX=planted(folder, "nvcc", FAILING_NVCC))
    (archive,) = folder.glob("*.whl")
    return archive


@pytest.fixture(scope="session")
def names(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def read(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(entry for entry in archive.namelist() if entry.endswith(name))).decode()


@needs_tools
def test_sdist_holds_what_the_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()}
    kernels = {path.relative_to(ROOT).as_posix() for path in (ROOT / "triton_kernels").glob("*.py")}
    typed = {"fastlora/py.typed", "fastlora/_C.pyi"}
    assert {"setup.py", "pyproject.toml", "CMakeLists.txt"} | typed | sources | kernels <= held
    assert {"MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"} <= held
    assert not [name for name in held if name.endswith((".so", "_build_info.json"))]
    folders = {name.partition("/")[0] for name in held if "/" in name}
    assert folders == {"csrc", "fastlora", "fastlora.egg-info", "recipes", "triton_kernels"}


@needs_tools
def test_wheel_holds_every_source_and_nothing_else(names):
    sources = python_sources("fastlora", ROOT / "fastlora") | python_sources(
        "fastlora/triton_kernels", ROOT / "triton_kernels"
    )
    demo = ROOT / "fastlora" / "continual" / "demo"
    data = {
        f"fastlora/continual/demo/{path.name}"
        for kind in ("safetensors", "json", "csv")
        for path in demo.glob(f"*.{kind}")
    }
    built = {
        "fastlora/py.typed",
        "fastlora/_C.pyi",
        "fastlora/ops/dispatch_table.json",
        "fastlora/_build_info.json",
        f"fastlora/_C{SUFFIX}",
    }
    assert {name for name in names if ".dist-info/" not in name} == sources | data | built
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name} == about


@needs_tools
def test_wheel_metadata(wheel, names):
    assert read(wheel, "top_level.txt").split() == ["fastlora"]
    assert "fastlora = fastlora.cli:main" in read(wheel, "entry_points.txt")
    about = Parser().parsestr(read(wheel, "/METADATA"))
    assert (about["Name"], about["Version"]) == ("fastlora", fastlora.__version__)
    assert (about["License-Expression"], about["Requires-Python"]) == ("Apache-2.0", ">=3.10")
    required = about.get_all("Requires-Dist")
    core = {entry.partition(";")[0].strip() for entry in required if "extra" not in entry}
    assert core == {"torch>=2.11", "triton>=3.6", "numpy", "safetensors"}
    assert [entry for entry in required if entry.startswith("triton")] == ['triton>=3.6; platform_system == "Linux"']
    assert (
        wheel.name.endswith(f"-cp{sys.version_info[0]}{sys.version_info[1]}-linux_x86_64.whl")
        or "linux" not in sys.platform
    )


@needs_tools
def test_wheel_records_what_was_built(wheel):
    record = json.loads(read(wheel, "_build_info.json"))
    assert record["extension"] is True and "CMake" in record["extension_reason"]
    assert (record["cuda"], record["cuda_archs"]) == (False, "")
    assert record["cuda_reason"] == "the build with nvcc failed: `nvcc` exited with 1: nvcc: error: planted"
    assert record["version"] == fastlora.__version__


@needs_tools
def test_wheel_tells_no_path_of_its_builder(wheel):
    assert "/" not in read(wheel, "_build_info.json")
    with zipfile.ZipFile(wheel) as archive:
        module = archive.read(f"fastlora/_C{SUFFIX}")
    assert not [
        path for path in (ROOT, wheel.parent, Path.home()) if str(path).encode() in module and path != Path("/")
    ]


@needs_tools
def test_installed_wheel_works_away_from_the_source_and_without_a_compiler(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).stdout.strip())
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    run(pip, tmp_path, PIP_DISABLE_PIP_VERSION_CHECK="1")
    # torch and the rest are borrowed; a .pth adds the folder behind, and the editable installation there stays inert
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    bare = {"PATH": str(python.parent), "CC": "", "CXX": ""}
    found = json.loads(run([python, "-c", PROBE], tmp_path, **bare).stdout)
    for what in ("fastlora", "triton_kernels", "extension"):
        assert Path(found[what]).is_relative_to(site), f"{what} comes from {found[what]}"
    assert found["info"]["extension"] is True and found["info"]["cuda"] is False
    assert found["merged_by_extension"] and found["error"] < 1e-5
    told = run([python.parent / "fastlora", "doctor"], tmp_path, **bare).stdout
    assert f"{fastlora.__version__} in {site / 'fastlora'}" in told and "built with CMake" in told
    assert found["info"]["compiler"] and not found["bare"]


def test_this_installation_imports_away_from_the_source(tmp_path):
    """Development happens with `pip install -e .`: the modules are those of the tree, triton_kernels among them."""
    editable = json.loads(metadata.distribution("fastlora").read_text("direct_url.json") or "{}")
    if not editable.get("dir_info", {}).get("editable"):
        pytest.skip("fastlora is not installed with `pip install -e .` here")
    found = json.loads(run([sys.executable, "-c", PROBE], tmp_path).stdout)
    assert Path(found["fastlora"]) == ROOT / "fastlora" / "__init__.py"
    assert Path(found["triton_kernels"]) == ROOT / "triton_kernels" / "__init__.py"
    if found["info"]["extension"]:
        assert Path(found["extension"]) == ROOT / "fastlora" / f"_C{SUFFIX}"
    else:
        assert found["info"]["extension_reason"]
    assert not found["bare"]


def test_every_folder_with_python_files_is_a_listed_package():
    """Packages are listed by hand in setup.py; a forgotten one would be missing from the wheel alone."""
    script = "import setuptools, sys; setuptools.setup = lambda **given: print(*given['packages']); "
    script += "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
    listed = set(run([sys.executable, "-c", script], ROOT).stdout.split())
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "fastlora").rglob("*.py")}
    assert listed == folders | {"fastlora.triton_kernels"}


# ---- CUDA code


def cuobjdump():
    """From PATH, or the copy that Triton carries."""
    spec = find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec else None
    return shutil.which("cuobjdump") or (str(carried) if carried and carried.exists() else None)


def test_extension_holds_code_for_every_promised_architecture():
    info = build_info()
    if not info["cuda"]:
        pytest.skip(f"built without CUDA: {info['cuda_reason']}")
    if cuobjdump() is None:
        pytest.skip("no cuobjdump on PATH or in Triton")
    import fastlora._C

    listed = run([cuobjdump(), "--list-elf", fastlora._C.__file__], ROOT).stdout
    for arch in info["cuda_archs"].replace(",", ";").split(";"):
        assert f"sm_{arch.removesuffix('-real')}." in listed
    used = run([cuobjdump(), "-res-usage", fastlora._C.__file__], ROOT).stdout
    kernels = re.findall(r"merge_kernel\S*\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", used)
    assert len(kernels) == 2 * len(info["cuda_archs"].replace(",", ";").split(";"))
    for registers, stack, shared, local in kernels:
        # two blocks of 256 threads an SM; stack and local memory would be spilled registers
        assert int(registers) <= 128 and int(shared) <= 48 * 1024 and (stack, local) == ("0", "0")
    functions = run([cuobjdump(), "-sass", fastlora._C.__file__], ROOT).stdout.split("Function :")[1:]
    assert len(functions) == len(kernels)
    assert all(re.search(r"HMMA\S*TF32", code) for code in functions), "no tensor cores above the rank that needs them"
    if "120" in info["cuda_archs"].replace(",", ";").split(";"):
        assert "sm_120" in run([cuobjdump(), "--list-ptx", fastlora._C.__file__], ROOT).stdout
