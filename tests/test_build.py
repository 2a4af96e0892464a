"""build_info(): the record of the build, the module's own word, and what it says when either is missing."""

from __future__ import annotations

import importlib
import json

import pytest

import fastlora
from fastlora import build


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A function that sets the record, with the extension out of reach."""

    def no_extension(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def write(text):
        path = tmp_path / "_build_info.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        monkeypatch.setattr(build, "_RECORD", path)

    monkeypatch.setattr(build, "_RECORD", tmp_path / "none.json")
    monkeypatch.setattr(importlib, "import_module", no_extension)
    build._load.cache_clear()
    yield write
    build._load.cache_clear()


def test_build_info_of_this_installation():
    info = fastlora.build_info()
    assert info["version"] == fastlora.__version__
    assert info["extension"] is (build.extension() is not None)
    if info["extension"]:
        assert info["compiler"] and info["simd"][0] == "scalar"
        assert info["cuda"] is hasattr(build.extension(), "merge_cuda")


def test_reason_of_the_build_is_passed_on(record):
    record({"extension": False, "extension_reason": "no compiler was found"})
    info = build.build_info()
    assert (info["extension"], info["extension_reason"]) == (False, "no compiler was found")
    assert (info["cuda"], info["cuda_reason"]) == (False, "no extension: no compiler was found")


def test_a_source_tree_says_that_nothing_was_built(record):
    assert "no build has been run" in build.build_info()["extension_reason"]


def test_an_extension_of_another_python_is_told(record):
    record({"extension": True, "extension_reason": "built with CMake", "python": "3.10.1", "cuda": True})
    info = build.build_info()
    assert info["cuda"] is False and "built for Python 3.10.1" in info["extension_reason"]


def test_an_extension_that_does_not_load_is_told(record, monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: planted")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert build.build_info()["extension_reason"] == "fastlora._C cannot be loaded: undefined symbol: planted"


def test_an_unreadable_record_is_an_error(record):
    record("{half")
    with pytest.raises(RuntimeError, match="_build_info.json cannot be read.*Install fastlora again"):
        build.build_info()
