import json
import re
import statistics

import pytest
from matplotlib.text import Text

from fastlora.continual.compare import comparison_json, comparison_text, group_runs, mean_of, sort_groups
from fastlora.continual.compare_page import write_comparison
from fastlora.continual.compare_plot import draw_comparison
from fastlora.continual.config import CoDyRAConfig, LoRAConfig, RunConfig, UsageError, ZeroShotConfig
from fastlora.continual.frontier import efficient, frontier_groups, frontier_plot, styles
from fastlora.continual.group_labels import labels_of, settings_of
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
    assert [group.label for group in groups] == ["lora r=1", "lora r=4"]


def labels(*methods, **run):
    return labels_of([settings_of(RunConfig(method=method, **run).as_dict()) for method in methods])


def test_labels_show_what_departs_from_the_commonest():
    assert labels(LoRAConfig(rank=1), LoRAConfig(), LoRAConfig(rank=4), LoRAConfig(lr=1e-3), ZeroShotConfig()) == [
        "lora r=1",
        "lora r=16",
        "lora r=4",
        "lora r=16 lr=0.001",
        "zero_shot",
    ]
    assert labels(CoDyRAConfig(), CoDyRAConfig(targets=("q", "v"), drop_dead=False), CoDyRAConfig(prox="released")) == [
        "codyra r=16",
        "codyra r=16 targets=q+v drop_dead=no",
        "codyra r=16 prox=released",
    ]


def test_labels_of_options_that_nobody_has_thought_of():
    """Unknown methods, options within options, an option of one group alone: every label tells its group apart."""
    methods = [
        {"name": "new", "inner": {"name": "lora", "scale": 0.7}, "steps": [1, 2]},
        {"name": "new", "inner": {"name": "lora", "scale": 1.0}, "steps": [1, 2]},
        {"name": "new", "inner": {"name": "lora", "scale": 1.0}, "steps": [], "extra": None},
        {"name": "new", "inner": {"name": "lora", "scale": 1.0}, "steps": [1, 2], "extra": True},
    ]
    found = labels_of([settings_of({"method": method, "benchmark": "tiny"}) for method in methods])
    assert found == ["new inner.scale=0.7", "new", "new steps=none", "new extra=yes"]
    assert len(set(found)) == 4


def test_settings_that_decide_figures():
    """How a run is carried out separates nothing; an option younger than the run has its default."""
    base = RunConfig(method=LoRAConfig()).as_dict()
    assert settings_of(base | {"seed": 3, "device": "cuda", "log_every": 1}) == settings_of(base)
    assert settings_of(base | {"data": base["data"] | {"cache_dir": "c", "workers": 3}}) == settings_of(base)
    younger = {key: value for key, value in base["data"].items() if not key.startswith("cache_")}
    assert settings_of(base | {"data": younger}) == settings_of(base) != settings_of(base | {"data": {"shots": 3}})
    assert settings_of(base | {"benchmark": "other"}) != settings_of(base)
    older = base | {"method": {"name": "lora", "rank": 16}}
    assert settings_of(older) == settings_of(base)
    assert settings_of(base | {"precision": "half"}) != settings_of(base)


def test_efficient_points():
    points = [(0.0, 30.0), (5.0, 50.0), (6.0, 50.0), (7.0, 49.0), (20.0, 70.0), (20.0, 70.0)]
    assert efficient(points, more_is_better=False) == [0, 1, 4, 5]  # 2 forgets more at equal learning
    assert efficient(points, more_is_better=True) == [4, 5]
    assert efficient([], more_is_better=True) == []


def test_frontier(runs):
    groups = group_runs(runs)
    assert [group.label for group in frontier_groups(groups, "own", "forgetting")] == [
        "zero_shot",
        "codyra r=4",
        "lora r=4",
    ]
    assert [group.label for group in frontier_groups(groups, "own", "held_out")] == [
        "lora r=4",
        "codyra r=4",
        "zero_shot",
    ]


def test_frontier_without_forgetting_or_held_out_set(make_run):
    """One task: no forgetting, so no point and no failure."""
    groups = group_runs([read_run(make_run(own=((40.0,), (80.0,)), held_out=None, tasks=("red",)))])
    assert frontier_groups(groups, "own", "forgetting") == frontier_groups(groups, "own", "held_out") == []
    assert not frontier_plot(groups, "own").axes[0].texts


def test_order(runs):
    groups = group_runs(runs)

    def order(key):
        return [group.method for group in sort_groups(groups, key)]

    assert order("given") == ["codyra", "lora", "zero_shot"]
    assert order("learning") == ["lora", "codyra", "zero_shot"]
    assert order("forgetting") == ["zero_shot", "codyra", "lora"]
    assert order("held_out") == ["zero_shot", "codyra", "lora"]
    assert order("mean_rank")[-1] == "zero_shot"  # has none
    with pytest.raises(UsageError, match="sort is 'learned'; accepted: given, label, .* Did you mean 'learning'"):
        sort_groups(groups, "learned")


def test_drift_and_size_of_updates(runs):
    codyra, _, zero = group_runs(runs)
    codyra.runs[0].record.drift[:] = [0.0, 1.0, 3.0]
    assert codyra.drifts() == [3.0, None] and mean_of(codyra.drifts()) is None  # one run did not measure it
    assert codyra.delta_norms() == [pytest.approx(0.14**0.5)] * 2 and zero.delta_norms() == [None]
    assert codyra.ranks(lambda entry: entry.module.endswith("attn.q")) == [2.5, 2.5]


def test_page(runs, tmp_path):
    groups = group_runs(runs)
    path = write_comparison(groups, tmp_path / "out")
    assert path == tmp_path / "out" / "compare.html"
    names = ["bars_own.png", "bars_union.png", "frontier_own.png", "frontier_union.png", "held_out.png"]
    assert sorted(file.name for file in path.parent.iterdir()) == sorted(["compare.html", *names])
    source = path.read_text()
    assert source.count('src="data:image/png;base64,') == source.count("<img") == 5
    assert not re.search(r'https?://|url\(|@import|<script|<link|src="(?!data:)', source)
    for words in (
        "3 settings on tiny",
        "15.0 ± 7.1",
        "a method that learns nothing forgets nothing",
        "codyra r=4, 2 seeds",
    ):
        assert words in source
    assert "on the frontier of learning and forgetting: zero_shot, codyra r=4, lora r=4" in source
    alone = write_comparison(groups, tmp_path / "page.html")
    assert alone.read_text() == source and sorted(tmp_path.glob("page*")) == [alone]
    with pytest.raises(UsageError, match=r"--out is .*plot.svg; accepted: FILE.png, FILE.html, or a directory"):
        write_comparison(groups, tmp_path / "plot.svg")


def test_many_groups(make_run, tmp_path):
    """Twenty settings: no bars, one colour a method, no marker twice, and no two labels on each other."""
    own = [((40.0, 10.0), (60.0 + i, 20.0), (58.0 + i - i**1.2, 70.0 + i)) for i in range(20)]
    methods = [LoRAConfig(rank=1 + i, iterations=20) for i in range(8)]
    methods += [CoDyRAConfig(rank=1 + i, iterations=20) for i in range(8)]
    methods += [LoRAConfig(rank=16, iterations=20, lr=10.0**-i) for i in range(1, 5)]
    groups = group_runs(
        [read_run(make_run(str(i), method=m, own=rows)) for i, (m, rows) in enumerate(zip(methods, own))]
    )
    assert len(groups) == len({group.label for group in groups}) == 20
    assert len(comparison_text(groups).splitlines()) < 60  # the figures of all, the accuracy tables of none
    names = sorted(file.name for file in write_comparison(groups, tmp_path / "out").parent.glob("*.png"))
    assert names == ["frontier_own.png", "frontier_union.png", "held_out.png"]
    figure = frontier_plot(groups, "own")
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [Text.get_window_extent(text) for text in axes.texts]
        assert len(boxes) == 20 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert len({style for style in styles(groups[:16])}) == 16


def test_a_control_is_never_called_by_the_bare_name(make_run):
    """Also where the method itself is not beside it."""
    control = CoDyRAConfig(rank=4, iterations=20, gates="null_control")
    paths = [make_run("control", method=control), make_run("lora", method=LoRAConfig(rank=4))]
    runs = [read_run(path) for path in paths]
    assert [run.label for run in runs] == ["codyra gates=null_control", "lora r=4"]
    assert [group.label for group in group_runs(runs)] == ["codyra r=4 gates=null_control", "lora r=4"]
    groups = group_runs([runs[0], read_run(make_run("codyra"))])
    assert [group.label for group in groups] == ["codyra r=4 gates=null_control", "codyra r=4 gates=trained"]


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
