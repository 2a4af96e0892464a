"""Build of fastlora: the packages, listed by hand, and the extension fastlora._C through CMake.

Switches, read from the environment of the build:

    FASTLORA_BUILD_EXT   auto  build the extension; if that fails, say so and install without it (default)
                         on    a failed build fails the installation
                         off   install without it; PyTorch does its work
    FASTLORA_CUDA        auto  compile the CUDA kernels where nvcc is found and works (default)
                         on    fail without them
                         off   host code alone
    FASTLORA_CUDA_ARCHS  CMake's list of architectures, "80-real;90-real;100-real;120" unless told (of these, the ones
                         that the nvcc at hand knows)

What was built, and why, is written to fastlora/_build_info.json; `fastlora.build_info()` and `fastlora doctor` read it.
A wheel takes it along, so no path of this machine stands in it; the output of the build has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PACKAGES = [
    "fastlora",
    "fastlora.continual",
    "fastlora.continual.configs",
    "fastlora.continual.datasets",
    "fastlora.continual.demo",
    "fastlora.continual.methods",
    "fastlora.interop",
    "fastlora.modules",
    "fastlora.ops",
    "fastlora.triton_kernels",
    "fastlora.tune",
]
CUDA_ARCHS = ("80", "90", "100", "120")
# What CMake says -> what to do about it; with anything else its own first lines that say error are passed on.
KNOWN = {
    "No CMAKE_CXX_COMPILER could be found": "no C++ compiler was found. Install one (apt install g++, dnf install gcc-c++, "
    "conda install cxx-compiler), or name it: CXX=/path/to/g++",
    "environment variable CXX:": "CXX names a compiler that is not there: {CXX!r}. Set it to one that is, or unset it",
    "does not compile C++17": "the C++ compiler does not compile C++17. Install a newer one, or name one: CXX=/path/to/g++",
    "CMAKE_MAKE_PROGRAM is not set": "neither ninja nor make was found; pip install ninja",
    "Development.Module": "the headers of Python {python} are missing. Install them (apt install python{python}-dev, "
    "dnf install python{python}-devel), or use a Python that has them",
}


if int(setuptools.__version__.partition(".")[0]) < 77:
    # else setuptools stumbles over the SPDX licence in pyproject.toml, and blames that
    raise SystemExit(
        f"setuptools {setuptools.__version__} is too old; pip install 'setuptools>=77', or build in isolation"
    )


def switch(name: str) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{name} is {value!r}; it must be auto, on or off. Set it to one of these, or unset it.")
    return value


def find_nvcc() -> str | None:
    """nvcc from CUDACXX, CUDA_HOME, PATH, or the toolkit's usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("CUDACXX"),
        home and os.path.join(home, "bin", "nvcc"),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((path for path in map(shutil.which, filter(None, candidates)) if path), None)


def nvcc_facts(nvcc: str) -> tuple[str, str]:
    """Release of this nvcc, and those of CUDA_ARCHS it knows: machine code for all, and PTX of the newest."""
    release = re.search(r"release ([\d.]+)", run([nvcc, "--version"]))
    known = re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    listed = ";".join([f"{arch}-real" for arch in archs[:-1]] + archs[-1:])
    return release.group(1) if release else "of unknown release", os.environ.get("FASTLORA_CUDA_ARCHS") or listed


def run(command: list[str]) -> str:
    """Run, echo the output, and turn a failure into a CompileError that says what to do, or what went wrong first."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise CompileError(f"{command[0]} could not be started: {error}") from error
    print(done.stdout, flush=True)
    if done.returncode:
        raise CompileError(
            cause(done.stdout) or f"`{Path(command[0]).name}` exited with {done.returncode}: {first_error(done.stdout)}"
        )
    return done.stdout


def cause(output: str) -> str:
    """What to do about a failure that is known, or ""."""
    facts = {"CXX": os.environ.get("CXX", ""), "python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    return next((meaning.format(**facts) for said, meaning in KNOWN.items() if said in output), "")


def first_error(output: str) -> str:
    """The first line that says error, or the last of all, and the two behind it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), len(lines) - 1)
    told = " ".join(lines[max(first, 0) : first + 3])
    return re.sub(r"^CMake Error at \S+ \(message\): ", "", told)


def tool(name: str) -> str | None:
    """The cmake or ninja of this Python's environment (pip installs them there), else the one on PATH."""
    beside = Path(sys.executable).parent / name
    try:
        scripts = Path(getattr(__import__(name), {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name])) / name
    except (ImportError, AttributeError):
        scripts = beside
    return next((found for found in map(shutil.which, (str(scripts), str(beside), name)) if found), None)


def compile_extension(target: Path, version: str, cuda: list[str], toolkit: str = "") -> str:
    """Configure and build, with these arguments for CUDA; returns CMake's version.

    The folder is named after what decides the build, so a cache never answers for another one: a rebuild without nvcc
    in a folder that knew nvcc would go on compiling CUDA. The paths of an isolated environment, new each time, are no
    part of it.
    """
    try:
        import pybind11
    except ImportError as error:
        raise CompileError("pybind11 is missing; pip install 'pybind11>=3.0', or build in isolation") from error
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        raise CompileError("cmake is missing; pip install 'cmake>=3.26' ninja, or build in isolation")
    release = run([cmake, "--version"]).split()[2]
    compilers = [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAHOSTCXX", "CUDAFLAGS")]
    decisive = [release, sys.version, sys.executable, str(bool(ninja)), toolkit, *compilers, *cuda]
    folder = ROOT / "build" / f"cmake-{hashlib.sha256(repr(decisive).encode()).hexdigest()[:12]}"
    generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    arguments = [
        "-DCMAKE_BUILD_TYPE=Release",
        # Without this CMake may take another Python and name the module for it.
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DFASTLORA_VERSION={version}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
    ]
    try:
        run([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *arguments, *cuda])
    except CompileError:
        shutil.rmtree(folder, ignore_errors=True)  # its cache would keep what it found missing
        raise
    run([cmake, "--build", str(folder), "--config", "Release"])
    if not target.is_file():
        # RuntimeError: setuptools lets a CompileError of an optional extension pass, and this one must not.
        raise RuntimeError(
            f"CMake succeeded but {target.name} is not in {target.parent}; it was built for another Python."
        )
    return release


def without_folders(text: str) -> str:
    """The text with every absolute path cut down to its last name."""
    return re.sub(r"(?<![\w.~])(?:/[^\s/:;,'\"()]+)+/(?=[^\s/])", "", text)


def system() -> str:
    """System, processor and C library, which decide where a build runs; of the kernel it says nothing."""
    return " ".join(filter(None, [platform.system(), platform.machine(), *platform.libc_ver()]))


def build(target: Path, version: str) -> dict[str, object]:
    """Build the extension as the switches say; returns what _build_info.json tells."""
    wanted, cuda = switch("FASTLORA_BUILD_EXT"), switch("FASTLORA_CUDA")
    info: dict[str, object] = {
        "version": version,
        "python": platform.python_version(),
        "platform": system(),
        "extension": False,
        "extension_reason": "",
        "cuda": False,
        "cuda_reason": "the extension was not built",
        "cuda_archs": "",
    }
    if wanted == "off":
        return {**info, "extension_reason": "FASTLORA_BUILD_EXT=off"}
    try:
        return {**info, **build_wanted(target, version, cuda)}
    except CompileError as error:
        if wanted == "on" or cuda == "on":
            raise
        return {**info, "extension_reason": without_folders(str(error))}


def build_wanted(target: Path, version: str, cuda: str) -> dict[str, object]:
    """Build with CUDA if that is wanted and works, else without."""
    nvcc, why = None, "FASTLORA_CUDA=off"
    if cuda != "off":
        nvcc, why = find_nvcc(), "no nvcc in CUDACXX, CUDA_HOME, PATH or /usr/local/cuda"
        if nvcc is None and cuda == "on":
            raise CompileError(f"FASTLORA_CUDA=on, but {why}. Put nvcc on PATH, or set FASTLORA_CUDA=auto")
    if nvcc is not None:
        try:
            release, archs = nvcc_facts(nvcc)
            arguments = ["-DFASTLORA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={archs}"]
            cmake = compile_extension(target, version, arguments, toolkit=release)
            return {
                "extension": True,
                "extension_reason": f"built with CMake {cmake}",
                "cuda": True,
                "cuda_reason": f"nvcc {release}",
                "cuda_archs": archs,
            }
        except CompileError as error:
            why = f"the build with {nvcc} failed: {error}"
            if cuda == "on":
                raise CompileError(f"FASTLORA_CUDA=on, but {why}. Mend that, or set FASTLORA_CUDA=off") from error
            print(f"fastlora: {why}. Trying without CUDA.", file=sys.stderr, flush=True)
            why = without_folders(why)
    cmake = compile_extension(target, version, ["-DFASTLORA_CUDA=OFF"])
    return {"extension": True, "extension_reason": f"built with CMake {cmake}", "cuda_reason": why}


# setuptools lets an optional extension fail; what was asked for by name must not.
OPTIONAL = "on" not in (switch("FASTLORA_BUILD_EXT"), switch("FASTLORA_CUDA"))


class BuildExtension(build_ext):
    """build_ext that asks CMake, and puts _build_info.json beside the module whatever came of it."""

    info: dict[str, object]

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # else the module of an earlier build would be packed when this one fails
        self.info = build(target, self.distribution.get_version())
        (target.parent / "_build_info.json").write_text(json.dumps(self.info, indent=1) + "\n")
        self.announce_outcome()

    def copy_extensions_to_source(self) -> None:
        """Editable mode: the module and the record go beside the source."""
        built, source = (Path(path).parent for path in self.record_paths())
        for old in source.glob(f"_C{Path(self.get_ext_filename('_C')).name[len('_C') :]}"):
            old.unlink()
        super().copy_extensions_to_source()
        self.copy_file(str(built / "_build_info.json"), str(source / "_build_info.json"), preserve_times=False)

    def record_paths(self) -> tuple[str, str]:
        """Where _build_info.json is built, and where it lies in an editable installation."""
        source = self.get_finalized_command("build_py").get_package_dir("fastlora")
        return os.path.join(self.build_lib, "fastlora", "_build_info.json"), os.path.join(source, "_build_info.json")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), self.record_paths()[0]]

    def get_output_mapping(self) -> dict[str, str]:
        built, source = self.record_paths()
        return {**super().get_output_mapping(), **({built: source} if self.inplace else {})}

    def announce_outcome(self) -> None:
        told = {what: f"{self.info[what]} ({self.info[f'{what}_reason']})" for what in ("extension", "cuda")}
        text = f"fastlora: extension {told['extension']}, CUDA {told['cuda']}"
        if not self.info["extension"] and switch("FASTLORA_BUILD_EXT") != "off":
            line = "=" * 100
            text = (
                f"{line}\nfastlora is installed WITHOUT its extension: {self.info['extension_reason']}\n"
                "PyTorch does its work, slower. Mend this (usually a C++17 compiler or cmake is missing) and install "
                f"again; FASTLORA_BUILD_EXT=on makes it an error.\n{line}"
            )
        print(text, file=sys.stderr, flush=True)


setup(
    packages=PACKAGES,
    package_dir={"fastlora": "fastlora", "fastlora.triton_kernels": "triton_kernels"},
    package_data={
        "fastlora": ["py.typed", "_C.pyi"],
        "fastlora.continual.demo": ["*.safetensors", "*.json", "*.csv"],
        "fastlora.ops": ["*.json"],
    },
    include_package_data=False,
    ext_modules=[Extension("fastlora._C", sources=[], optional=OPTIONAL)],
    cmdclass={"build_ext": BuildExtension},
    zip_safe=False,
)
