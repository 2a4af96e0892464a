import json
import statistics

import pytest

from fastlora.continual.compare import comparison_json, comparison_text, group_runs
from fastlora.continual.compare_plot import draw_comparison
from fastlora.continual.config import CoDyRAConfig, LoRAConfig, ZeroShotConfig
from fastlora.continual.saved_run import read_run


@pytest.fixture
def runs(make_run):
    """Two seeds of CoDyRA, one LoRA, one zero-shot."""
    lora = LoRAConfig(rank=4, iterations=20)
    row = (40.0, 10.0)
    return [
        read_run(path)
        for path in (
            make_run("codyra0"),
            make_run("lora", method=lora, own=(row, (95.0, 5.0), (35.0, 95.0)), held_out=(50.0, 20.0, 10.0)),
            make_run("codyra1", seed=1, own=(row, (70.0, 30.0), (60.0, 80.0)), held_out=(50.0, 40.0, 36.0)),
            make_run("zero", method=ZeroShotConfig(), own=(row, row, row), held_out=(50.0, 50.0, 50.0)),
        )
    ]


def test_seeds_of_a_method_are_taken_together(runs):
    codyra, lora, zero = group_runs(runs)
    assert (codyra.label, lora.label, zero.label) == ("codyra r=4", "lora r=4", "zero_shot")
    assert codyra.values("own", "learning") == [85.0, 75.0]
    assert codyra.mean("own", "forgetting") == (20.0 + 10.0) / 2
    assert codyra.deviation("own", "forgetting") == pytest.approx(statistics.stdev([20.0, 10.0]))
    assert codyra.mean("union", "forgetting") == (10.0 + 5.0) / 2
    assert codyra.mean("own", "held_out") == 33.0 and codyra.held_out() == [50.0, 42.5, 33.0]
    assert codyra.accuracies("own")[1] == [75.0, 25.0]
    assert lora.deviation("own", "last") is None and lora.mean("own", "forgetting") == 60.0
    assert zero.mean("own", "mean_rank") is None


def test_text(runs):
    text = comparison_text(group_runs(runs))
    assert "codyra r=4, mean over seeds 0, 1, own label space" in text
    assert "lora r=4, seed 0, union label space" in text
    assert "mean ± s.d. over seeds" in text and "15.0 ± 7.1" in text
    assert text.endswith("Read Learning beside Forgetting: a method that learns nothing forgets nothing.")
    header = next(line for line in text.splitlines() if line.startswith("  method"))
    assert header.index("Learning") < header.index("Forgetting") < header.index("Last") < header.index("Mean rank")
    zero = next(line for line in text.splitlines() if line.startswith("  zero_shot"))
    assert zero.rstrip().endswith("-")  # no rank, not rank 0


def test_one_seed_has_no_spread(runs):
    assert "±" not in comparison_text(group_runs(runs[:2]))


def test_json(runs):
    values = json.loads(json.dumps(comparison_json(group_runs(runs))))
    codyra = values["groups"][0]
    assert values["tasks"] == ["red", "green"] and codyra["seeds"] == [0, 1] and len(codyra["runs"]) == 2
    assert codyra["own"]["learning"] == {"mean": 80.0, "sd": pytest.approx(50**0.5), "values": [85.0, 75.0]}
    assert codyra["union"]["accuracy"][2] == [30.0, 42.5]
    assert codyra["config"]["method"]["rank"] == 4
    assert values["groups"][2]["own"]["mean_rank"] == {"mean": None, "sd": None, "values": [None]}


def test_plot(runs, tmp_path):
    path = draw_comparison(group_runs(runs), tmp_path / "plot.png")
    assert path.read_bytes().startswith(b"\x89PNG") and len(path.read_bytes()) > 10_000


def test_settings_that_differ_are_in_the_label(make_run):
    configs = [CoDyRAConfig(rank=4, iterations=20, kappa_max=kappa) for kappa in (0.01, 0.02)]
    groups = group_runs([read_run(make_run(str(i), method=config)) for i, config in enumerate(configs)])
    assert [group.label for group in groups] == ["codyra r=4 kappa_max=0.01", "codyra r=4 kappa_max=0.02"]
    ranks = [LoRAConfig(rank=rank, iterations=20) for rank in (1, 4)]
    groups = group_runs([read_run(make_run(f"r{i}", method=config)) for i, config in enumerate(ranks)])
    assert [group.label for group in groups] == ["lora rank=1", "lora rank=4"]


def test_unfinished_run(make_run):
    with pytest.raises(ValueError, match="b is interrupted after 1 of 2 tasks; only finished runs can be compared"):
        group_runs(
            [read_run(make_run("a")), read_run(make_run("b", own=((1.0, 2.0), (3.0, 4.0)), status="interrupted"))]
        )


def test_another_benchmark(make_run):
    with pytest.raises(ValueError, match="b ran on other tasks, classes, prompts or test labels than .*a;"):
        group_runs([read_run(make_run("a")), read_run(make_run("b", tasks=("red", "blue")))])


def test_a_seed_twice(make_run):
    with pytest.raises(ValueError, match="repeat a seed with equal settings"):
        group_runs([read_run(make_run("a")), read_run(make_run("b"))])
