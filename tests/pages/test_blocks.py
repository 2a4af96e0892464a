"""Every block of code in README.md and docs/ runs as it is written; the few that cannot say why."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from cli.tiny import tiny
from safetensors.torch import save_file

pytest.importorskip("open_clip")
pytest.importorskip("jsonargparse")
pytest.importorskip("sybil")

from pages.blocks import RUN, Shell, languages, run_page  # noqa: E402

from fastlora import cli  # noqa: E402
from fastlora.continual import benchmarks  # noqa: E402
from fastlora.continual.stream import InMemoryImages, Reference  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
SHOWN = {"text", "{toctree}", "{eval-rst}"}  # languages of blocks that nothing runs
SKIP = re.compile(r"<!--+ *skip: *(\w+)(.*?)--+>")

QUICK = ["--method.iterations=2", "--method.rank=2", "--method.batch_size=8"]
# The pages whose commands name the embedded benchmark and its defaults, minutes of training, get one of seconds for it.
ON_RANDOM_IMAGES = {"README.md", "kappa.md", "methods.md", "speed.md"}
DRAWN = "first_run.md"  # the page whose reports are drawn, which takes longer than such training
NEEDS = {**dict.fromkeys(ON_RANDOM_IMAGES, ["random_images"]), "interop.md": ["released_checkpoint"]}
TRAIN_OPTIONS = {DRAWN: ["--method.iterations=4"], **dict.fromkeys(ON_RANDOM_IMAGES, QUICK)}
WORDS = {
    **{"RUN": "runs/demo-codyra-seed0", "BASE": "base.safetensors", "OUT": "merged.safetensors"},
    **dict.fromkeys(
        ["ViT-B-32", "ViT-L-14"], "one_block_of_pages.json"
    ),  # of an estimate, whose time grows with blocks
}
ONE_BLOCK = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 24, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def random_images(monkeypatch):
    """The benchmark `demo` with its options, on random images of two tasks; seeds one after the other."""

    def load(config=None):
        return tiny(reference=Reference(InMemoryImages(torch.randn(8, 3, 16, 16), torch.zeros(8).long()), ["a b", "c"]))

    demo = benchmarks.BENCHMARKS["demo"]
    monkeypatch.setitem(
        benchmarks.BENCHMARKS, "demo", benchmarks.Benchmark(load, demo.defaults, demo.presets, demo.options)
    )
    monkeypatch.setattr(
        "fastlora.continual.seeds.run_all",
        lambda seeds, processes, label: {seed: cli.main(command[3:]) for seed, command in seeds.items()},
    )
    Path("one_block_of_pages.json").write_text(json.dumps(ONE_BLOCK))
    save_file({key: value.clone() for key, value in tiny().model.state_dict().items()}, "base.safetensors")


@pytest.fixture
def released_checkpoint():
    """What CoDyRA's released code has saved, for the embedded model."""
    from interop.test_released import codyra

    torch.save(codyra()[0], "aircraft.pth")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_runs(page, request, monkeypatch, tmp_path):
    if not set(RUN) & set(languages(page)):
        return
    monkeypatch.chdir(tmp_path)
    for fixture in NEEDS.get(page.name, []):
        request.getfixturevalue(fixture)
    if page.name != DRAWN:
        monkeypatch.setattr("fastlora.continual.report.write_report", lambda path: None)
    shell = Shell(cli.main, TRAIN_OPTIONS.get(page.name, []), WORDS)
    skipped = run_page(page, shell, monkeypatch=monkeypatch)
    assert len(skipped) == len(SKIP.findall(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_run_or_shown_on_purpose(page):
    """A block without a language would be run by nobody, and nobody would know."""
    assert set(languages(page)) <= {*RUN, *SHOWN}


def test_few_blocks_are_not_run_and_each_says_why():
    marks = [(named(page), *mark) for page in PAGES for mark in SKIP.findall(page.read_text())]
    assert all(scope == "next" and re.fullmatch(r' "[^"]{8,}" ', reason) for _, scope, reason in marks), marks
    blocks = sum(language in RUN for page in PAGES for language in languages(page))
    assert len(marks) <= blocks / 5, f"{len(marks)} of {blocks}: {marks}"
