"""What chooses the components: chance level, the draws that are kept apart, and verdicts on methods whose answer is known."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("open_clip")

import fastlora  # noqa: E402
from fastlora.continual import TaskStream, Trainer  # noqa: E402
from fastlora.continual.batches import generator_for  # noqa: E402
from fastlora.continual.benchmarks import BENCHMARKS, Benchmark, Loaded  # noqa: E402
from fastlora.continual.config import LoRAConfig, RunConfig, method_config  # noqa: E402
from fastlora.continual.methods.base import AdapterMethod  # noqa: E402
from fastlora.continual.selection import Start, chance_jaccard, compare, kept_components, measure, starts  # noqa: E402
from fastlora.continual.stream import InMemoryImages  # noqa: E402

SHORT = {"rank": 12, "iterations": 8, "batch_size": 8}


@pytest.fixture(autouse=True)
def tiny_benchmark(monkeypatch, make_clip, make_task, tokenizer):
    """Two tasks; the seed chooses the noise of the training images."""

    def load(config):
        tasks = []
        for number, name in enumerate(("red", "green"), start=1):
            task = make_task(name, 3, seed=number)
            noise = 0.5 * torch.randn(task.train.images.shape, generator=generator_for(config.seed, name))
            tasks.append(dataclasses.replace(task, train=InMemoryImages(task.train.images + noise, task.train.labels)))
        return Loaded(make_clip(), tokenizer, TaskStream("tiny", tasks))

    monkeypatch.setitem(BENCHMARKS, "tiny", Benchmark(load))


def run_of(name, **options):
    own = {"codyra": {"lr": 1e-4, "kappa_max": 0.3}, "path_credit": {"lr": 1e-2}}.get(name, {})
    return RunConfig("tiny", method_config(name, **(SHORT | own | options)), seed=3)


# ---- chance


@pytest.mark.parametrize(("total", "first", "second"), [(16, 8, 9), (16, 2, 15), (5, 5, 3), (12, 1, 1), (16, 0, 4)])
def test_chance_against_random_subsets(total, first, second):
    """40,000 pairs: within 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2, 40_000, total, generator=generator).argsort(-1).argsort(-1)
    one, other = draws[0] < first, draws[1] < second
    overlaps = (one & other).sum(1) / (one | other).sum(1)
    error = 4 * float(overlaps.std()) / 200 + 1e-6  # float32
    assert abs(float(overlaps.mean()) - chance_jaccard(total, first, second)) < error


def test_chance_where_it_is_certain_or_undefined():
    assert chance_jaccard(4, 4, 4) == 1.0 and chance_jaccard(4, 0, 4) == 0.0
    assert chance_jaccard(4, 0, 0) is None


def test_comparison_by_hand():
    first = {"visual.a": frozenset({0, 1}), "visual.b": frozenset(), "c": frozenset({0, 1, 2, 3})}
    second = {"visual.a": frozenset({1, 2}), "visual.b": frozenset(), "c": frozenset({0})}
    found = compare("by hand", first, second, rank=4)
    assert found.per_module == {"visual.a": (1 / 3, pytest.approx(4 / 6 / 3 + 1 / 6)), "c": (0.25, 0.25)}
    assert found.means("vision")[0] == 1 / 3 and found.means("text") == (0.25, 0.25)
    assert found.means()[0] == pytest.approx((1 / 3 + 1 / 4) / 2)
    # (2, 0, 4) and (2, 0, 1) less their means: 0, -2, 2 and 1, -1, 0
    assert found.rank_correlation == pytest.approx(0.5)
    with pytest.raises(ValueError, match="empty: no component survived in any module. Lower the threshold"):
        compare("empty", {"a": frozenset()}, {"a": frozenset()}, 4)
    assert compare("constant", first, {name: frozenset({0}) for name in first}, 4).rank_correlation is None


# ---- starts


def test_each_start_differs_in_one_thing():
    (_, first), *others = starts(5, tasks=2, draws="gates")
    differing = [
        (name, [key for key, value in dataclasses.asdict(start).items() if value != getattr(first, key)])
        for name, start in others
    ]
    assert differing == [
        ("same gates, other data", ["data"]),
        ("same gates, other task", ["task"]),
        ("other gates, same data", ["gates"]),
        ("same gates, other lora_a", ["lora_a"]),
    ]
    assert len(starts(5, tasks=1, draws="")) == 3


@pytest.fixture
def drawn(monkeypatch):
    """What the adapters of each training start with: a list of {module: (lora_a, gate)}."""
    found, optimizer = [], AdapterMethod.optimizer

    def note(self, model):
        adapters = fastlora.adapters(model)
        found.append({name: (a.lora_a.detach().clone(), a.gate.detach().clone()) for name, a in adapters})
        return optimizer(self, model)

    from fastlora.continual.methods.gated import GatedMethod

    gated = GatedMethod.optimizer
    monkeypatch.setattr(GatedMethod, "optimizer", lambda self, model: (note(self, model), gated(self, model))[1])
    return found


def test_gates_and_lora_a_are_drawn_apart(drawn, make_clip, tokenizer):
    run = run_of("codyra", iterations=1)
    stream = BENCHMARKS["tiny"].load(run).stream
    Trainer(make_clip(), tokenizer, stream, run.method, seed=3, progress=False).fit()
    of_the_trainer = drawn.pop(0)
    drawn.clear()
    for start in (Start(3, 3, 3), Start(4, 3, 3), Start(3, 4, 3), Start(3, 3, 4), Start(3, 3, 3, task=1)):
        kept_components(run, start)
    first, other_data, other_gates, other_a, other_task = drawn
    for name, (lora_a, gate) in of_the_trainer.items():
        for same in (first, other_data, other_task):
            assert torch.equal(same[name][0], lora_a) and torch.equal(same[name][1], gate)
        assert torch.equal(other_gates[name][0], lora_a) and not torch.equal(other_gates[name][1], gate)
        assert not torch.equal(other_a[name][0], lora_a) and torch.equal(other_a[name][1], gate)


@pytest.mark.parametrize(
    ("start", "seed", "index"), [(Start(3, 9, 9), 3, 0), (Start(4, 3, 3), 4, 0), (Start(3, 3, 3, 1), 3, 1)]
)
def test_images_are_those_of_the_task_and_of_the_data_seed(monkeypatch, start, seed, index):
    class Seen(Exception):
        pass

    def look(model, tokenizer, stream, *, config, **options):
        raise Seen(stream.tasks[0].name, stream.open_task(0).images, config.seed)

    monkeypatch.setattr("fastlora.continual.selection.Trainer", look)
    run = run_of("codyra")
    with pytest.raises(Seen) as seen:
        kept_components(run, start)
    name, images, order_seed = seen.value.args
    stream = BENCHMARKS["tiny"].load(dataclasses.replace(run, seed=seed)).stream
    assert (name, order_seed) == (stream.tasks[index].name, seed)
    assert torch.equal(images, stream.open_task(index).images)


@pytest.mark.parametrize("name", ["codyra", "path_credit", "contribution_prox"])
def test_survivors_are_those_of_a_run(name, make_clip, tokenizer):
    """Observed without early removal, and counted as drawn: as many in each module as the trainer keeps."""
    run = run_of(name)
    stream = BENCHMARKS["tiny"].load(run).stream
    trainer = Trainer(make_clip(), tokenizer, stream, run.method, seed=3, progress=False)
    record = trainer.fit()
    kept = kept_components(run, Start(3, 3, 3))
    expected = {entry.module: entry.active_rank for entry in record.ranks if entry.task == 1}
    assert {module: len(components) for module, components in kept.items()} == expected
    assert any(components != frozenset(range(len(components))) for components in kept.values())


# ---- verdicts


def verdicts(selection):
    return {each.name: each for each in selection.comparisons}


def test_gates_choose_where_they_hardly_learn():
    """codyra at a tiny learning rate: the same survivors on any data, chance with other gates."""
    found = verdicts(measure(run_of("codyra")))
    assert list(found) == [name for name, _ in starts(3, 2, "gates")[1:]]
    for name in ("same gates, other data", "same gates, other task", "same gates, other lora_a"):
        assert found[name].means()[0] > 0.97 and found[name].rank_correlation > 0.95
    overlap, chance = found["other gates, same data"].means()
    assert abs(overlap - chance) < 0.12 and chance < 0.6


def test_luck_chooses_in_random_selection():
    found = verdicts(measure(run_of("random_selection")))
    assert found["same gates, other task"].means()[0] == 1.0
    overlap, chance = found["other choice, same data"].means()
    assert abs(overlap - chance) < 0.12


def test_data_choose_in_path_credit():
    """Nothing is drawn but lora_a; other images leave less than the whole, and more of the same than another task."""
    found = verdicts(measure(run_of("path_credit")))
    assert list(found) == ["same gates, other data", "same gates, other task", "same gates, other lora_a"]
    assert found["same gates, other task"].means()[0] < found["same gates, other data"].means()[0] < 1.0


def test_a_method_that_selects_nothing():
    with pytest.raises(ValueError, match="method lora selects no components; those that do: codyra, .*path_credit"):
        measure(RunConfig("tiny", LoRAConfig(rank=2)))


def test_files_and_lines(tmp_path):
    lines = []
    selection = measure(run_of("codyra", iterations=2), say=lines.append)
    assert [line.split(":")[0] for line in lines] == [f"codyra, training {i} of 5" for i in (1, 2, 3, 4, 5)]
    saved = json.loads(selection.write(tmp_path).read_text())
    assert saved["method"] == "codyra" and saved["tasks"] == ["red", "green"] and saved["config"]["seed"] == 3
    for comparison, mine in zip(saved["comparisons"], selection.comparisons):
        assert [comparison["jaccard"], comparison["chance"]] == list(mine.means())
        assert comparison["towers"]["vision"] == list(mine.means("vision"))
        assert len(comparison["per_module"]) == 12 and comparison["name"] == mine.name
    text = str(selection)
    assert text.startswith("codyra on tiny, seed 3, task red, other task green:")
    assert text.count("\n") == 5 and "same gates, other lora_a" in text
