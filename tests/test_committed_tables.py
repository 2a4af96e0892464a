"""The committed figures of the methods: shown as they are, and such that the benchmark can tell methods apart."""

import json
from pathlib import Path

import methods
import pytest
from method_grid import ADAPTER_LRS, GRID

pytest.importorskip("open_clip")
from fastlora.continual.demo import tasks as demo  # noqa: E402
from fastlora.continual.methods.codyra import CoDyRA  # noqa: E402

ROOT = Path(methods.__file__).parent.parent
RESULT = json.loads((ROOT / "bench/results/methods.json").read_text())
ROWS = {row["label"]: row for row in RESULT["rows"]}


def mean(label, figure, space="own"):
    return ROWS[label][space][figure]["mean"]


def class_counts():
    rendered = (demo.SHAPE_TASK, demo.TEXTURE_TASK, demo.LETTER_TASK, demo.CAST_TASK, demo.COUNT_TASK)
    return [len(demo.DIGITS), *(len(task.classes) for task in rendered)]


def test_the_pages_show_what_was_measured():
    page, readme = ((ROOT / name).read_text() for name in ("docs/methods.md", "README.md"))
    assert methods.table(RESULT, "own") in page and methods.table(RESULT, "union") in page
    assert methods.sweep_table(RESULT) in page and methods.readme_table(RESULT) in readme


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
