"""Builds of the extension for the tests: a copy of the tree, programs planted in place of compilers, and a build there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_missing = [name for name in ("setuptools", "pybind11", "cmake", "ninja") if find_spec(name) is None]
needs_tools = pytest.mark.skipif(
    bool(_missing), reason=f"not installed: {', '.join(_missing)}; pip install 'fastlora[dev]'"
)
FAILING_NVCC = "echo 'nvcc: error: planted' >&2; exit 1"


def planted(folder, name, script):
    """A program of this name that runs this shell script."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


def compiler_without(folder, *options):
    """A C++ compiler that knows none of these options (patterns of the shell)."""
    refused = f"""for option in "$@"; do case "$option" in {"|".join(options)})
        echo "error: unrecognized command-line option '$option'" >&2; exit 1;; esac; done"""
    return planted(folder, "c++-that-refuses", f'{refused}\nexec {shutil.which("c++")} "$@"')


def copy_of_the_tree(folder):
    """What a build reads, without what an earlier one left."""
    ignored = shutil.ignore_patterns(
        *(".*", "build", "dist", "runs", "tests", "bench", "docs", "__pycache__", "*.so", "_build_info.json")
    )
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def clean_environment(**changes):
    """This environment without the switches of the build and what makes Python look elsewhere."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FASTLORA_", "PYTHON"))}
    return {**kept, **changes}


def run(command, cwd, **environment):
    """Run with a clean path; the output is in the assertion when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def build_ext(folder, **environment):
    """setup.py build_ext in this folder; the finished process and the record, where one was written."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    done = subprocess.run(
        command, cwd=folder, env=clean_environment(**environment), capture_output=True, text=True, check=False
    )
    record = folder / "out" / "fastlora" / "_build_info.json"
    return done, json.loads(record.read_text()) if record.exists() else None
