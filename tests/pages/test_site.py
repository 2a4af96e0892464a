"""The documentation site as `make docs` builds it: without a warning, with every public name, and without a network."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

import fastlora

for needed in ("sphinx", "myst_parser", "furo", "open_clip"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parents[2]
DESCRIBED = ("fastlora", *(f"fastlora.{name}" for name in fastlora._SUBMODULES))
# what a page would load from elsewhere when it is read; links that a reader follows are another matter
LOADED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*rel="stylesheet"[^>]*href="(?:https?:)?//"""
)
LOADED_BY_STYLE = re.compile(r"""(?:@import\s*|url\()\s*["']?(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, built by the command of the Makefile."""
    command = re.search(r"\$\(BIN\)/python (-m sphinx .*?) -d \S+ docs \S+$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert "-W" in command.split()
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, *command.split(), "-d", folder / "doctrees", "docs", folder / "html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def public_names(module: ModuleType) -> set[str]:
    listed = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
    ]
    values = {name: getattr(module, name) for name in listed if not name.startswith("_")}
    return {name for name, value in values.items() if inspect.isclass(value) or inspect.isroutine(value)}


@pytest.mark.parametrize("name", DESCRIBED)
def test_every_public_name_is_described(site, name):
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    described = {line.split()[0] for line in inventory.splitlines()}
    found = public_names(importlib.import_module(name))
    assert found
    # what two packages export is described in one of them
    assert {each for each in found if not {f"{name}.{each}", f"fastlora.{each}"} & described} == set()


def test_nothing_is_loaded_from_a_network(site):
    pages, styles = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 15 and styles
    assert [page.name for page in pages if LOADED.search(page.read_text())] == []
    assert [style.name for style in styles if LOADED_BY_STYLE.search(style.read_text())] == []


def test_what_lies_beside_the_pages_is_there(site):
    """Links to files of the repository are downloads of the site; links to its folders and Markdown are their names."""
    downloads = {path.name for path in (site / "_downloads").rglob("*") if path.is_file()}
    assert {"methods.json", "first_run.ipynb"} <= downloads
    performance = (site / "performance.html").read_text()
    assert "bench/README.md" in performance and "../bench" not in performance
