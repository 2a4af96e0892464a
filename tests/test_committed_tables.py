"""The committed figures of the methods: shown as they are, and such that the benchmark can tell methods apart."""

import json
from pathlib import Path

import frontier
import methods
import numpy as np
import pytest
import selection
from method_grid import ADAPTER_LRS, GRID

pytest.importorskip("open_clip")
from fastlora.continual.demo import tasks as demo  # noqa: E402
from fastlora.continual.methods.codyra import CoDyRA  # noqa: E402

ROOT = Path(methods.__file__).parent.parent
RESULT = json.loads((ROOT / "bench/results/methods.json").read_text())
ROWS = {row["label"]: row for row in RESULT["rows"]}
FRONTIER = json.loads((ROOT / "bench/results/frontier.json").read_text())
RULES = {rule["label"].removesuffix(" x alpha"): rule for rule in FRONTIER["rules"]}
RECOMMENDED = "InfLoRA r=8, held by reference images"
RIVALS = ("CoDyRA", "CoDyRA, gates without gradient", "LoRA r=8", "decay of B", "uniform shrink")
SELECTION = json.loads((ROOT / "bench/results/selection.json").read_text())


def mean(label, figure, space="own"):
    return ROWS[label][space][figure]["mean"]


def class_counts():
    rendered = (demo.SHAPE_TASK, demo.TEXTURE_TASK, demo.LETTER_TASK, demo.CAST_TASK, demo.COUNT_TASK)
    return [len(demo.DIGITS), *(len(task.classes) for task in rendered)]


def test_the_pages_show_what_was_measured():
    page, readme = ((ROOT / name).read_text() for name in ("docs/methods.md", "README.md"))
    assert methods.table(RESULT, "own") in page and methods.table(RESULT, "union") in page
    assert methods.sweep_table(RESULT) in page and methods.readme_table(RESULT) in readme


def test_the_page_shows_the_curves_and_what_data_chooses():
    page = (ROOT / "docs/methods.md").read_text()
    assert frontier.table(FRONTIER) in page and frontier.points_table(FRONTIER) in page
    assert selection.table(SELECTION) in page


def test_every_row_is_one_of_the_grid_with_three_seeds():
    labels = {entry.label: entry for entry in GRID}
    for row in RESULT["rows"]:
        entry = labels[row["label"]]
        assert (row["method"], row["options"], row["vary"]) == (entry.method, entry.options, entry.vary)
    assert len(RESULT["seeds"]) >= 3 and set(methods.README_ROWS) <= ROWS.keys() <= labels.keys()


def test_the_learning_rate_is_the_best_of_those_tried():
    for row in RESULT["rows"]:
        tried = {rate: figures["average"] for rate, figures in row["sweep"].items()}
        assert f"{row['value']}" == max(tried, key=tried.get)


def test_zero_shot_lies_between_chance_and_ceiling():
    """Percent, means over the tasks; in the union of all classes chance is lower, and so is what can be known."""
    counts, zero_shot = class_counts(), mean("zero-shot", "last")
    assert 2 * sum(100 / count for count in counts) / len(counts) < zero_shot
    assert 2 * 100 / sum(counts) < mean("zero-shot", "last", "union")
    assert zero_shot + 25 < mean("per task, task known", "last"), "headroom for what is learned"
    assert mean("zero-shot", "held_out") > 60, "headroom for what is forgotten of pretraining"


def test_there_is_something_to_forget():
    """Sequential LoRA ends far below what the same LoRA reaches when nothing is forgotten."""
    assert mean("LoRA r=16", "last") + 15 < mean("per task, task known", "last")
    assert mean("LoRA r=16", "held_out") + 30 < mean("zero-shot", "held_out")
    assert mean("zero-shot", "forgetting") == 0 == mean("per task, task known", "forgetting")


def test_forgetting_grows_with_rank():
    """At one learning rate, below that of the best, where no rank is at its limit; validation sets, one seed."""
    rate = f"{ADAPTER_LRS[1]}"
    forgetting = [ROWS[f"LoRA r={rank}"]["sweep"][rate]["forgetting"] for rank in (1, 4, 16)]
    assert forgetting[0] + 3 < forgetting[1] and forgetting[1] + 3 < forgetting[2]


def test_codyra_forgets_less_and_learns_less_than_lora():
    assert mean("CoDyRA", "forgetting") <= 0.4 * mean("LoRA r=16", "forgetting")
    assert mean("CoDyRA", "held_out") >= mean("LoRA r=16", "held_out") + 5
    assert mean("zero-shot", "learning") < mean("CoDyRA", "learning") < mean("LoRA r=16", "learning")


def test_codyra_keeps_the_ranks_that_its_null_model_predicts():
    """3 seeds x 6 tasks x 42 modules, each kept rank binomial: three standard errors, for gates that see no gradient."""
    from fastlora.continual.benchmarks import benchmark

    config = CoDyRA.config_class
    null = CoDyRA(config(**benchmark("demo").preset(config))).null_model()
    expected = null["expected_rank"]
    error = (expected * (1 - expected / 16) / (3 * 6 * 42)) ** 0.5
    assert abs(mean("CoDyRA, gates without gradient", "mean_rank") - expected) < 3 * error


@pytest.mark.parametrize("rival", RIVALS)
def test_the_recommended_rule_lies_above_the_others(rival):
    """Where both learn as much, it forgets less and keeps more of the held-out set: means of five seeds, ranks of 8."""
    assert len(FRONTIER["seeds"]) >= 5
    shared = 0
    for learned in np.arange(40.0, 70.0):
        pairs = [
            [frontier.at_learning(RULES[label], learned, figure) for label in (RECOMMENDED, rival)]
            for figure in ("forgetting", "held_out")
        ]
        if None in (pairs[0][0], pairs[0][1]):
            continue
        (ours, theirs), (ours_held_out, theirs_held_out) = (np.mean(pair, axis=1) for pair in pairs)
        assert ours < theirs and ours_held_out > theirs_held_out, learned
        shared += 1
    assert shared >= 3
    for label in (RECOMMENDED, rival):
        assert all(point["own"]["mean_rank"]["mean"] < 8.5 for point in RULES[label]["points"])


def test_data_does_not_choose_what_codyra_keeps():
    """Other data and other tasks leave the same gates alive; other gates share no more than chance."""
    (codyra,) = (each for each in SELECTION["methods"] if each["label"] == "CoDyRA")
    found = {each["name"]: (np.mean(each["jaccard"]), np.mean(each["chance"])) for each in codyra["comparisons"]}
    same = [overlap for name, (overlap, _) in found.items() if name.startswith("same gates")]
    assert min(same) > 0.9
    assert all(abs(o - c) < 0.05 for name, (o, c) in found.items() if name.startswith("other gates"))
