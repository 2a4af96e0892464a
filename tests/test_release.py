"""What a release says about itself in several places agrees: version, licence, Pythons, addresses, tools."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

import fastlora

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="pyproject.toml is read by tomllib, Python 3.11, or tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ABOUT = PROJECT["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
# of semver.org, without build metadata, which PyPI does not take
SEMANTIC = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-?(a|b|rc|dev|alpha|beta)\.?\d*)?"


def test_the_version_is_semantic_and_is_named_wherever_it_stands():
    assert re.fullmatch(SEMANTIC, fastlora.__version__)
    assert CITATION["version"] == fastlora.__version__
    assert f"dist/fastlora-{fastlora.__version__}-cp3" in (ROOT / "docs" / "install.md").read_text()


def test_the_changelog_ends_at_this_version():
    """Its newest entry is [Unreleased] or this version; below are releases with their dates, downwards."""
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert len(headings) == len(re.findall(r"^## ", text, re.MULTILINE))
    assert headings[0][0] in ("Unreleased", fastlora.__version__)
    releases = headings[headings[0][0] == "Unreleased" :]
    assert all(date and re.fullmatch(SEMANTIC, version) for version, date in releases)
    numbers = [tuple(map(int, re.findall(r"\d+", version)[:3])) for version, _ in releases]
    assert numbers == sorted(set(numbers), reverse=True)


def test_the_licence_is_one():
    assert ABOUT["license"] == CITATION["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert f"## Licence\n\n{ABOUT['license']}" in (ROOT / "README.md").read_text()
    # beside an SPDX expression a classifier of the licence is refused
    assert not [each for each in ABOUT["classifiers"] if each.startswith("License")]


def test_the_pythons_are_those_that_wheels_are_built_for():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(ABOUT["classifiers"]))
    nox = (ROOT / "noxfile.py").read_text()
    built = re.findall(r'"(3\.\d+)"', re.search(r"^PYTHONS = (.*)$", nox, re.MULTILINE)[1])
    tested = set(re.findall(r'\("(3\.\d+)", "[\d.]*"\)', nox))
    assert named == built and tested == set(built)
    assert ABOUT["requires-python"] == f">={built[0]}"
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{built[0].replace('.', '')}"


def test_the_oldest_torch_is_tested():
    (lowest,) = (each.partition(">=")[2] for each in ABOUT["dependencies"] if each.startswith("torch>"))
    assert f'"{lowest}")' in (ROOT / "noxfile.py").read_text()


def test_addresses_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(address in readme for address in ABOUT["urls"].values())


def test_tests_have_the_tools_that_the_build_requires():
    """tests/test_packaging.py builds without isolation, so the dev extra must bring what isolation would."""
    assert set(PROJECT["build-system"]["requires"]) <= set(ABOUT["optional-dependencies"]["dev"])
    assert not [name for name in PROJECT["build-system"]["requires"] if name.startswith("torch")]
