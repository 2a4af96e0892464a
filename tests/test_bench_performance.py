"""The curves and the page of performance: measured small, fitted by hand, and committed as generated."""

import json
import sys

import estimate_error
import facts
import performance
import pytest
import scaling


def curve(values, seconds):
    points = [{"value": v, "ours": {"seconds": s, "bytes": 2**20 * v}} for v, s in zip(values, seconds)]
    return {"name": "rank", "unit": "rank", "what": "a layer", "rivals": ["ours"], "points": points}


def test_the_page_shows_what_was_measured():
    assert performance.PAGE.read_text() == performance.page()


def test_curves_run_small(tmp_path, monkeypatch, capsys):
    out, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    options = ["--small", "--only", "modules", "tasks", "--out", str(out), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["scaling.py", "run", *options])
    scaling.main()
    assert plot.read_bytes().startswith(b"\x89PNG") and "one more of adapted matrices" in capsys.readouterr().out
    modules, tasks = json.loads(out.read_text())["curves"]
    for point in modules["points"]:
        assert 0 < point["ours"]["bytes"] < point["as released"]["bytes"], "77 positions against the longest prompt"
    one, two = (point["codyra"]["bytes"] for point in tasks["points"])
    assert one == two == 0, "nothing is kept beside the weights"
    assert tasks["points"][0]["sd_lora"]["bytes"] < tasks["points"][1]["sd_lora"]["bytes"]


def test_estimates_are_compared_with_what_is(tmp_path, monkeypatch, capsys):
    """Memory to the byte but for what is beside the towers; time within the order of a busy machine's."""
    out = tmp_path / "estimate_error.json"
    monkeypatch.setattr(sys, "argv", ["estimate_error.py", "--small", "--out", str(out)])
    estimate_error.main()
    (row,) = json.loads(out.read_text())["steps"]
    assert row["estimated"]["kept"] == pytest.approx(row["measured"]["kept"], rel=0.01)
    assert 0.02 < row["estimated"]["seconds"] / row["measured"]["seconds"] < 3
    assert "| ViT-S-32-alt, 1 images, 2 classes |" in capsys.readouterr().out


def test_slopes_are_those_of_the_line_through_the_points():
    fitted = scaling.slope(curve((1, 2, 4), (0.003, 0.005, 0.009)), "ours", "seconds")
    assert fitted == pytest.approx((0.002, 1.0))
    bent = scaling.slope(curve((1, 2, 3), (0.001, 0.001, 0.004)), "ours", "seconds")
    assert bent == pytest.approx((0.0015, 0.75))
    assert "| ours, ms | 3.00 | 5.00 | 9.00 | 2000.0 µs | 1.00 |" in scaling.table(
        curve((1, 2, 4), (0.003, 0.005, 0.009))
    )


def test_goals_of_several_runs_share_a_file(tmp_path, monkeypatch):
    path = tmp_path / "goals.json"
    facts.save_goals(path, [("C1 a layer", 0.9, 0.93), ("the same for linear", 0.8, None)])
    facts.save_goals(path, [("C1 a layer", 0.95, 0.93)])
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    text = performance.goals()
    assert "| C1 a layer | 0.95 | ≤ 0.93 |" in text and "| the same for linear | 0.8 | – |" in text
    assert f"torch {facts.facts()['torch']}" in text


def test_what_is_missing_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(performance, "RESULTS", tmp_path)
    assert performance.page().count("Not measured yet.") == 5
