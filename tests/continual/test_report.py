import base64
import json
import re
from html.parser import HTMLParser

import pytest

from fastlora.continual.config import LoRAConfig, ZeroShotConfig
from fastlora.continual.plots import accuracy_heat_maps, forgetting_curves, short_name
from fastlora.continual.report import write_report
from fastlora.continual.saved_run import read_run

PLOTS = ["accuracy.png", "delta_norm.png", "forgetting.png", "ranks.png", "training.png"]
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What a browser would fetch, show, and fail to close."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for key, value in attributes if key in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + " "


def page_of(run):
    page = Page(write_report(run).read_text())
    assert not page.open
    assert all(value.startswith("data:image/png;base64,") for value in page.fetched)  # opens without a network
    return page


def images_of(page):
    return [base64.b64decode(value.partition(",")[2]) for value in page.fetched]


def test_page_has_everything_in_one_file(make_run):
    run = make_run(null_model={"total_shrink": 0.65, "survival": 0.516, "expected_rank": 2.06})
    page = page_of(run)
    files = sorted(run.joinpath("plots").iterdir())
    assert [file.name for file in files] == PLOTS
    assert sorted(images_of(page)) == sorted(file.read_bytes() for file in files)
    assert all(image.startswith(PNG) and len(image) > 5000 for image in images_of(page))
    for words in ("codyra on tiny, seed 0", "finished", "would keep 2.06 of 4 components", "nothing forgets nothing"):
        assert words in page.text
    # learning (80 + 90) / 2, forgetting 80 - 60, and the union's halves
    assert re.search(r"own\s+85.0\s+20.0\s+75.0", page.text)
    assert re.search(r"union\s+42.5\s+10.0\s+37.5", page.text)
    source = run.joinpath("report.html").read_text()
    assert not re.search(r"https?://|url\(|@import|<script", source)
    assert re.findall(r'class="now">([\d.]+)<', source) == [
        "80.0",
        "90.0",
        "40.0",
        "45.0",
    ]  # the newest task's data set
    assert write_report(run).read_text() == source


def test_names_are_escaped(make_run):
    page = page_of(make_run(tasks=("<b>red</b>", 'a&b"')))
    assert "<b>red</b>" in page.text and 'a&b"' in page.text


@pytest.mark.parametrize("method", [LoRAConfig(rank=4, iterations=20), ZeroShotConfig()], ids=["lora", "zero_shot"])
def test_other_methods(make_run, method):
    page = page_of(make_run(method=method))
    assert len(images_of(page)) == (5 if method.name == "lora" else 2)
    assert "null model" not in page.text


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_unfinished_run(make_run, rows):
    """Interrupted before the first evaluation, before the first task, after it."""
    own = ((40.0, 10.0), (80.0, 20.0))[:rows]
    page = page_of(make_run(own=own, status="interrupted"))
    assert "interrupted" in page.text and f"{max(0, rows - 1)} of 2 tasks" in page.text
    assert len(images_of(page)) == {0: 0, 1: 1, 2: 5}[rows]


def test_one_task_without_held_out_set(make_run):
    page = page_of(make_run(own=((40.0,), (80.0,)), held_out=None, tasks=("red",)))
    assert "forgetting needs a task that was trained before the last one" in page.text
    assert "the stream has no held-out set" in page.text


def test_twelve_tasks(make_run):
    """One panel per data set, one for the held-out set, and no empty frame."""
    tasks = tuple(f"task number {i}" for i in range(12))
    run = read_run(make_run(tasks=tasks, own=[[50.0] * 12 for _ in range(13)], held_out=[1.0] * 13))
    shown = [axes for axes in forgetting_curves(run).axes if axes.axison]
    assert [axes.get_title() for axes in shown] == [*tasks, "held-out set (never trained)"]
    own, union = accuracy_heat_maps(run).axes[:2]
    assert [label.get_text() for label in own.get_xticklabels()] == list(tasks)
    assert [len(axes.texts) for axes in (own, union)] == [13 * 12] * 2


def test_short_names():
    assert short_name("visual.transformer.resblocks.11.attn.q") == "vision 11 q"
    assert short_name("transformer.resblocks.0.mlp.c_fc") == "text 0 c_fc"
    assert short_name("encoder.layer.fc") == "encoder.layer.fc"


def test_no_run(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="is not a run directory .* Pass a directory that `fastlora train` made"
    ):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", "{"),
        ("config.yaml", "method: ["),
        ("config.yaml", "seed: 0"),
        ("accuracy.csv", "after_task,red,green\n0,1.0\n"),
        ("accuracy_union.csv", "after_task,red,green\n0,1.0,many\n"),
        ("ranks.csv", "task,module\n1,a\n"),
        ("log.csv", "task\nx\n"),
        ("metrics.json", ""),
    ],
)
def test_damaged_file_is_named(make_run, file, content):
    run = make_run()
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file} cannot be read .* Restore it, or train again"):
        read_run(run)


def test_missing_file_is_named(make_run):
    run = make_run()
    (run / "log.csv").unlink()
    with pytest.raises(FileNotFoundError, match="log.csv is missing"):
        read_run(run)


def test_what_is_read_is_what_was_written(make_run):
    run = read_run(make_run(seed=5))
    assert run.record.own == [[40.0, 10.0], [80.0, 20.0], [60.0, 90.0]]
    assert run.record.held_out == [50.0, 45.0, 30.0] and run.manifest["seed"] == run.config["seed"] == 5
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert run.record.metrics() == metrics
