import base64
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastlora.continual.config import LoRAConfig, ZeroShotConfig
from fastlora.continual.drawing import place_labels, spread
from fastlora.continual.module_plots import place_of, rank_heat_map, short_name
from fastlora.continual.plots import accuracy_heat_maps, forgetting_curves
from fastlora.continual.record import RankEntry
from fastlora.continual.report import write_report
from fastlora.continual.saved_run import SavedRun, read_run

PLOTS = ["accuracy.png", "delta_norm.png", "forgetting.png", "ranks.png", "retention.png", "training.png"]
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """What a browser would fetch, show, and fail to close."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.text, self.alts = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "poster")]
        self.alts += [dict(attributes)["alt"]] if tag == "img" else []
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
    assert all(len(alt) > 40 for alt in page.alts) and len(page.alts) == len(page.fetched)
    return page


def amend(run, file, **changes):
    """Changes of a JSON file of the run."""
    path = run / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    return run


SELECTION = [
    {
        "name": "same gates, other data",
        "jaccard": 0.997,
        "chance": 0.347,
        "per_module": {
            "visual.transformer.resblocks.0.attn.q": [1.0, 0.35],
            "transformer.resblocks.0.attn.q": [0.9, 0.3],
        },
        "towers": {"vision": [0.998, 0.35], "text": [0.99, 0.34]},
    },
    {"name": "other gates, same data", "jaccard": 0.356, "chance": 0.347},
]


def images_of(page):
    return [base64.b64decode(value.partition(",")[2]) for value in page.fetched]


def test_page_has_everything_in_one_file(make_run):
    run = make_run(null_model={"total_shrink": 0.65, "survival": 0.516, "expected_rank": 2.06})
    page = page_of(run)
    files = sorted(run.joinpath("plots").iterdir())
    assert [file.name for file in files] == PLOTS
    assert sorted(images_of(page)) == sorted(file.read_bytes() for file in files)
    assert all(image.startswith(PNG) and len(image) > 3000 for image in images_of(page))
    for words in ("codyra on tiny, seed 0", "finished", "would keep 2.06 of 4 components", "nothing forgets nothing"):
        assert words in page.text
    # learning (80 + 90) / 2, forgetting 80 - 60, and the union's halves
    assert re.search(r"own\s+85.0\s+20.0\s+75.0", page.text)
    assert re.search(r"union\s+42.5\s+10.0\s+37.5", page.text)
    source = run.joinpath("report.html").read_text()
    assert not re.search(r"https?://|url\(|@import|<script|<link", source)
    assert re.findall(r'class="now">([\d.]+)<', source) == [
        "80.0",
        "90.0",
        "40.0",
        "45.0",
    ]  # the newest task's data set
    assert write_report(run).read_text() == source


def test_names_are_escaped(make_run):
    page = page_of(make_run(tasks=("<b>red</b>", 'a&b"'), own=((40.0, 10.0),)))
    assert "<b>red</b>" in page.text and 'a&b"' in page.text


@pytest.mark.parametrize("method", [LoRAConfig(rank=4, iterations=20), ZeroShotConfig()], ids=["lora", "zero_shot"])
def test_other_methods(make_run, method):
    page = page_of(make_run(method=method))
    assert len(images_of(page)) == (6 if method.name == "lora" else 3)
    for words in ("Each gate is shrunk", "Drift", "Jaccard", "evaluation"):  # nothing of what was not measured
        assert words not in page.text


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_unfinished_run(make_run, rows):
    """Interrupted before the first evaluation, before the first task, after it."""
    own = ((40.0, 10.0), (80.0, 20.0))[:rows]
    page = page_of(make_run(own=own, status="interrupted"))
    assert "interrupted" in page.text and f"{max(0, rows - 1)} of 2 tasks" in page.text
    assert "Every figure here is that of the tasks that were finished" in page.text
    assert len(images_of(page)) == {0: 0, 1: 1, 2: 6}[rows]


def test_failed_and_killed_runs_say_so(make_run):
    failed = make_run("failed", status="failed", own=())
    amend(failed, "manifest.json", error="FloatingPointError: the loss is nan")
    assert "Stopped by FloatingPointError: the loss is nan." in page_of(failed).text
    assert "still running, or ended without a word" in page_of(make_run("killed", status="running", own=())).text


def test_drift_selection_and_time_where_they_were_measured(make_run):
    run = make_run()
    amend(run, "metrics.json", drift_curve=[0.0, 1.5, 2.25])
    amend(run, "manifest.json", seconds={"train": 90.0, "evaluate": 30.0})
    amend(run, "selection.json", comparisons=SELECTION, method="codyra")
    page = page_of(run)
    assert sorted(file.name for file in run.joinpath("plots").iterdir()) == sorted(
        [*PLOTS, "drift.png", "selection.png"]
    )
    assert any("after each task: 0, 1.5, 2.25." in alt for alt in page.alts)
    assert any("same gates, other data 1.00 (chance 0.35)" in alt for alt in page.alts)
    assert re.search(r"same gates, other data\s+0.997\s+0.347\s+0.998 \(0.350\)\s+0.990 \(0.340\)", page.text)
    assert re.search(r"other gates, same data\s+0.356\s+0.347\s+-\s+-", page.text)
    assert re.search(r"evaluation\s+30 s \(25% of both\)", page.text) and "1 min 30 s" in page.text
    assert re.search(r"per finished task\s+45 s", page.text)


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


def text_boxes(axes):
    return [Text.get_window_extent(text) for text in axes.texts]  # of an annotation without its line


def overlaps(axes):
    """Pairs of texts beside points that lie on each other."""
    boxes = text_boxes(axes)
    return sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_labels_keep_clear_of_each_other():
    """Forty points in clusters; put right beside their points, they do lie on each other."""
    import numpy as np

    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(centre, 0.05, (10, 2)) for centre in (0.2, 0.4, 0.6, 0.8)])
    texts, figure = [f"lora r={i} lr=0.001" for i in range(40)], Figure(figsize=(9, 7))
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.plot(points[:, 0], points[:, 1], "o")
        axes.margins(0.2)
    for point, text in zip(points, texts):
        left.annotate(text, point, (5, 0), textcoords="offset points", fontsize=8)
    place_labels(right, points.tolist(), texts, ["black"] * 40)
    figure.draw_without_rendering()
    assert overlaps(left) > 20 and overlaps(right) == 0
    frame = right.get_window_extent().padded(0.5)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in text_boxes(right))
    assert all(frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in text_boxes(right))


def test_spread_moves_as_little_as_it_must():
    assert spread([1.0, 5.0, 9.0], 1.0, 0.0, 10.0) == [1.0, 5.0, 9.0]
    assert spread([5.0, 4.9, 5.1], 1.0, 0.0, 10.0) == pytest.approx([5.0, 4.0, 6.0])
    assert spread([9.9, 10.0], 1.0, 0.0, 10.0) == pytest.approx([9.0, 10.0])
    assert spread([0.0, 0.0, 0.0], 9.0, 0.0, 10.0) == pytest.approx([0.0, 5.0, 10.0])  # no room for that gap
    assert spread([3.0], 1.0, 0.0, 10.0) == [3.0]


def test_places_of_modules():
    assert place_of("visual.transformer.resblocks.11.attn.q") == ("vision", "11", "attn.q")
    assert place_of("transformer.h.3.mlp.c_proj") == ("transformer.h", "3", "mlp.c_proj")
    assert place_of("encoder.fc") == ("encoder", "", "fc")


def test_rank_panels_of_a_large_model(make_run):
    """ViT-B/16: a panel per tower and task, a row per layer, a number in every cell; names that collide are whole."""
    run = make_run(tasks=tuple(f"task{i}" for i in range(7)), own=[[50.0] * 7] * 8, held_out=None)
    parts = ("attn.q", "attn.c_proj", "mlp.c_proj")
    names = [
        f"{tower}.resblocks.{i}.{p}"
        for tower in ("visual.transformer", "transformer")
        for i in range(12)
        for p in parts
    ]
    record = read_run(run).record
    record.ranks = [RankEntry(t, name, 16, (t + k) % 17, 0.1) for t in range(1, 8) for k, name in enumerate(names)]
    figure = rank_heat_map(SavedRun(run, {"method": {"name": "codyra"}}, {}, record, []))
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * 7 and all(len(axes.texts) == 12 * 3 for axes in panels)
    assert [text.get_text() for text in panels[0].texts[:4]] == ["1", "2", "3", "4"]  # layer 0, then layer 1
    assert [label.get_text() for label in panels[1].get_xticklabels()] == list(parts)


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
        ("selection.json", '{"comparisons": [{"name": "a", "jaccard": 1}]}'),
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
