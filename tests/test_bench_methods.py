"""The comparison of methods and the frontiers: one run in earnest, the tables from runs with made-up figures."""

import json
import sys

import frontier
import method_times
import methods
import pytest
import selection
import yaml
from method_grid import GRID, RULES, SELECTING, Entry
from method_runs import Job, run_all, train

pytest.importorskip("open_clip")
from fastlora.continual.methods import METHODS  # noqa: E402

FIGURES = ("learning", "forgetting", "last", "average", "transfer", "held_out", "mean_rank")


def saved(job, runs, status="finished", **figures):
    """A run directory as far as the tables read it; the union has half of each figure."""
    path = job.path(runs)
    path.mkdir(parents=True)
    values = {key: 10.0 for key in FIGURES} | figures
    metrics = values | {"union": {key: value / 2 for key, value in values.items()}, "held_out_curve": [70.0, 60.0]}
    (path / "metrics.json").write_text(json.dumps(metrics))
    (path / "manifest.json").write_text(json.dumps({"status": status, "seconds": {"train": 3.0, "evaluate": 1.0}}))
    (path / "config.yaml").write_text(yaml.safe_dump({"method": job.config().as_dict()}))


@pytest.mark.parametrize("entry", [*GRID, *RULES], ids=lambda entry: entry.label)
def test_every_entry_is_a_method_with_its_options(entry):
    for value in entry.values or (None,):
        Job(entry, "demo", value, 0).config()


def test_labels_name_one_entry_each():
    for entries in (GRID, RULES):
        assert len({entry.label for entry in entries}) == len(entries)


def test_a_run_and_its_figures(tmp_path):
    (entry,) = (entry for entry in GRID if entry.label == "zero-shot")
    job = Job(entry, "demo_validation", None, 100)
    assert job.figures(tmp_path) is None
    run_all([job], tmp_path, processes=1)
    figures = job.figures(tmp_path)
    assert figures["own"]["forgetting"] == 0 and 30 < figures["own"]["last"] < 50 and figures["seconds"]["train"] == 0
    assert train(job, tmp_path).endswith("is there")


def test_table_of_methods(tmp_path, monkeypatch, capsys):
    entry, unfinished = Entry("LoRA", "lora", {"rank": 2}, values=(1e-3, 2e-3)), Entry("CoDyRA", "codyra", values=())
    monkeypatch.setattr(methods, "GRID", (entry, unfinished))
    for value, average in zip(entry.values, (30.0, 40.0)):
        saved(methods.sweep_job(entry, value), tmp_path, average=average, learning=50.0)
    for seed, learning in enumerate((58.0, 60.0, 62.0)):
        saved(Job(entry, "demo", 2e-3, seed), tmp_path, learning=learning)
        saved(Job(unfinished, "demo", None, seed), tmp_path)
    saved(methods.sweep_job(unfinished, None), tmp_path, status="running")

    page, out = tmp_path / "page.md", tmp_path / "methods.json"
    page.write_text("before\n\n<!-- figures -->\n\noutdated\n\n<!-- end of figures -->\n\nafter\n")
    command = ["methods.py", "show", "--runs", str(tmp_path), "--out", str(out), "--docs", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    methods.main()
    text = page.read_text()
    assert "| LoRA | 0.002 | 60.0 ± 2.0 | 10.0 ± 0.0 |" in text and "| LoRA | 0.002 | 30.0 ± 1.0 |" in text
    assert "| LoRA | 0.001 | 50.0 | 10.0 | 30.0 | 10.0 |" in text and "| LoRA | **0.002** |" in text
    assert "CoDyRA" not in text, "a run that goes on still has no figures"
    assert text.startswith("before") and text.endswith("after\n") and "outdated" not in text
    assert json.loads(out.read_text())["rows"][0]["evaluation_share"] == 0.25
    assert "60.0 ± 2.0" in capsys.readouterr().out


def test_a_sweep_ends_when_the_best_rate_has_both_neighbours(tmp_path):
    entry = Entry("LoRA", "lora", {"rank": 2}, values=(1.0, 2.0, 3.0, 4.0, 5.0))
    averages = dict(zip(entry.values, (10.0, 20.0, 40.0, 50.0, 30.0)))
    asked = []
    while values := methods.to_sweep(entry, tmp_path):
        asked.append(values)
        for value in values:
            saved(methods.sweep_job(entry, value), tmp_path, average=averages[value])
    assert asked == [[2.0, 3.0, 4.0], [5.0]]
    assert methods.best_value(methods.swept(entry, tmp_path)) == 4.0


def test_a_sweep_does_not_leave_the_grid(tmp_path):
    entry = Entry("LoRA", "lora", {"rank": 2}, values=(1.0, 2.0, 3.0))
    for value in entry.values:
        saved(methods.sweep_job(entry, value), tmp_path, average=10 * value)
    assert methods.to_sweep(entry, tmp_path) == [] and methods.to_sweep(
        Entry("zero", "zero_shot", values=()), tmp_path
    ) == [None]


def test_frontier(tmp_path, monkeypatch):
    rule = Entry("LoRA x alpha", "lora", {"rank": 2}, "merge_scale", (0.5, 1.0))
    monkeypatch.setattr(frontier, "RULES", (rule,))
    for value, learning, forgetting in ((0.5, 50.0, 2.0), (1.0, 58.0, 6.0)):
        for seed in range(2):
            job = Job(rule, "demo", value, seed)
            saved(job, tmp_path, learning=learning + seed, forgetting=forgetting, held_out=50.0 - forgetting)
    page, plot, out = (tmp_path / name for name in ("page.md", "frontier.png", "frontier.json"))
    page.write_text("text\n")
    command = ["frontier.py", "show", "--runs", str(tmp_path), "--seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out), "--plot", str(plot), "--docs", str(page)])
    frontier.main()
    # one seed learns 50 to 58, the other 51 to 59: at 52 a quarter and an eighth of the way; at 60 neither, at 58 both
    forgotten = "2.8 ± 0.4 | 3.8 ± 0.4 | 4.8 ± 0.4 | 5.8 ± 0.4 | –"
    held_out = "47.2 ± 0.4 | 46.2 ± 0.4 | 45.2 ± 0.4 | 44.2 ± 0.4 | –"
    assert f"| LoRA x alpha | {forgotten} | {held_out} |" in page.read_text()
    assert "| LoRA x alpha | 0.5 | 50.5 ± 0.7 | 2.0 ± 0.0 |" in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG") and len(json.loads(out.read_text())["rules"][0]["points"]) == 2


def test_table_of_selections(tmp_path, monkeypatch):
    """Two seeds of one method; another has one seed alone, and is left out."""
    chosen = SELECTING[:2]
    monkeypatch.setattr(selection, "SELECTING", chosen)
    for entry, seed, overlap, correlation in (
        (chosen[0], 0, 0.8, None),
        (chosen[0], 1, 0.9, 0.5),
        (chosen[1], 0, 0.1, 0.1),
    ):
        towers = {"vision": [overlap, 0.3], "text": [overlap, 0.5]}
        compared = {
            "name": "same gates, other data",
            "jaccard": overlap,
            "chance": 0.4,
            "rank_correlation": correlation,
        }
        found = {
            "config": {"method": {"name": "codyra"}},
            "tasks": ["a", "b"],
            "comparisons": [compared | {"towers": towers}],
        }
        selection.path_of(entry, seed, tmp_path).write_text(json.dumps(found))
    page, out = tmp_path / "page.md", tmp_path / "selection.json"
    page.write_text("text\n")
    command = [
        "selection.py",
        "show",
        "--runs",
        str(tmp_path),
        "--seeds",
        "0",
        "1",
        "--out",
        str(out),
        "--docs",
        str(page),
    ]
    monkeypatch.setattr(sys, "argv", command)
    selection.main()
    row = "| CoDyRA | same gates, other data | 0.850 ± 0.071 | 0.400 | 0.850 (0.300) | 0.850 (0.500) | 0.50 |"
    assert row in page.read_text() and page.read_text().count("same gates") == 1
    assert json.loads(out.read_text())["methods"][0]["comparisons"][0]["jaccard"] == [0.8, 0.9]


@pytest.mark.parametrize("entry", SELECTING, ids=lambda entry: entry.label)
def test_the_selecting_rows_select(entry):
    assert METHODS[entry.method].selects


def test_table_of_times(tmp_path, monkeypatch):
    seconds = {"LoRA r=16": {"train": 10.0, "evaluate": 2.5}, "full": {"train": 15.0, "evaluate": 2.5}}
    path, page = tmp_path / "times.json", tmp_path / "page.md"
    path.write_text(json.dumps({"seconds": seconds}))
    page.write_text("text\n")
    monkeypatch.setattr(sys, "argv", ["method_times.py", "--show", str(path), "--docs", str(page)])
    method_times.main()
    assert "| LoRA r=16 | 1.00 | 10.0 | 20% |\n| full | 1.50 | 15.0 | 14% |" in page.read_text()


def test_every_method_that_trains_a_second_task_is_timed():
    trained = {entry.method for entry in GRID if METHODS[entry.method].trains and not METHODS[entry.method].joint}
    assert {entry.method for entry in method_times.timed()} == trained and trained >= {"lora", "codyra"}
    assert method_times.BASE in [entry.label for entry in method_times.timed()]
