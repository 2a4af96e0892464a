"""The rules that act on the rank-1 components of sequential LoRA, each against its formula written out."""

import math

import pytest
import torch

pytest.importorskip("open_clip")

from continual.step_log import train  # noqa: E402

from fastlora.continual import TaskStream, Trainer  # noqa: E402
from fastlora.continual.config import CONFIGS, method_config  # noqa: E402
from fastlora.continual.methods import METHODS, build_method  # noqa: E402
from fastlora.continual.methods.path_credit import proportional  # noqa: E402

SHORT = {"rank": 6, "iterations": 10, "batch_size": 8, "lr": 1e-2}
RULES = ("decay_b", "uniform_shrink", "random_selection", "contribution_prox", "path_credit")
OF_COMPONENTS = ("codyra", "sora", *RULES)
SELECTING = tuple(name for name in OF_COMPONENTS if METHODS[name].selects)


def config_of(name, **options):
    own = {"codyra": {"kappa_max": 0.2}, "sora": {"kappa": 0.05}, "decay_b": {"decay": 0.2}}
    known = SHORT | own.get(name, {}) | ({"shrink": 0.5} if hasattr(CONFIGS[name], "shrink") else {})
    return method_config(name, **(known | options))


@pytest.fixture
def run(make_clip, tokenizer, make_task):
    def run_one_task(config, **options):
        return train(make_clip(), tokenizer, TaskStream("one", [make_task("red", 3, seed=1)]), config, **options)

    return run_one_task


def contributions(parts):
    """c_i of one module, in float64, column by column."""
    a, b, w = (parts[key].double() for key in ("lora_a", "lora_b", "gate"))
    norms = [abs(w[i]) * b[:, i].square().sum().sqrt() * a[i].square().sum().sqrt() for i in range(len(w))]
    return torch.stack(norms) if norms else w


def kappa_at(step, strength, iterations=10):
    return 5 * strength * step.lr if step.iteration >= 0.3 * iterations else 0.0


def only_b_changes(step):
    for name, parts in step.after.items():
        assert torch.equal(parts["lora_a"], step.stepped[name]["lora_a"])


@pytest.mark.parametrize("name", RULES)
def test_gates_are_one_and_see_no_gradient(run, name):
    trainer, steps, _ = run(config_of(name))
    assert all((parts["gate"] == 1).all() for parts in steps[0].before.values())
    assert all(grads["gate"] is None for step in steps for grads in step.grads.values())
    assert trainer.method.null_model() is None and trainer.method.kappa(9) == 0.0


def test_decay_of_b(run):
    """B (1 - d f(t)), f the cosine from 1 to 0; nothing else is touched."""
    _, steps, _ = run(config_of("decay_b"))
    for step in steps:
        factor = 1 - 0.2 * 0.5 * (1 + math.cos(math.pi * step.iteration / 10))
        assert step.lr == pytest.approx(1e-2 * (1 - factor) / 0.2)
        only_b_changes(step)
        for name, parts in step.after.items():
            assert torch.allclose(parts["lora_b"], factor * step.stepped[name]["lora_b"], rtol=1e-6, atol=0)


def test_uniform_shrink(run):
    """One factor for all of a module, from 0.3 of the task on; nothing dies that has not shrunk to nothing together."""
    trainer, steps, _ = run(config_of("uniform_shrink"))
    shrunk = []
    for step in steps:
        only_b_changes(step)
        for name, parts in step.after.items():
            factor = max(0.0, 1 - kappa_at(step, 0.5) / float(contributions(step.stepped[name]).mean()))
            assert torch.allclose(parts["lora_b"], factor * step.stepped[name]["lora_b"], rtol=1e-4, atol=1e-9)
            assert (parts["gate"] == 1).all()
            shrunk.append(factor)
    assert set(shrunk[: 3 * 12]) == {1.0} and all(factor < 1 for factor in shrunk[3 * 12 :]) and max(shrunk) > 0
    assert trainer.record.mean_rank() == 6


def test_contribution_prox(run):
    """Each component by its own factor; what reaches 0 gets gate 0, and B and gate stay where they are."""
    trainer, steps, ends = run(config_of("contribution_prox"))
    died = 0
    for step in steps:
        for name, parts in step.after.items():
            stepped = step.stepped[name]
            if parts["gate"].shape != stepped["gate"].shape:  # the dead have left
                stepped = {key: value[..., _alive(step, name)] for key, value in stepped.items() if key != "lora_a"}
                stepped["lora_a"] = step.stepped[name]["lora_a"][_alive(step, name)]
            factors = (1 - kappa_at(step, 0.5) / contributions(stepped)).clamp(min=0)
            factors[stepped["gate"] == 0] = 0
            assert torch.allclose(parts["lora_b"].double(), stepped["lora_b"] * factors, rtol=1e-4, atol=1e-9)
            assert torch.equal(parts["gate"] != 0, factors > 0) and torch.equal(parts["lora_a"], stepped["lora_a"])
            died += int((factors == 0).sum())
    assert died > 0
    assert trainer.record.mean_rank() == sum(int(p["gate"].count_nonzero()) for p in ends[0].values()) / 12
    assert 0 < trainer.record.mean_rank() < 6


def _alive(step, name):
    return contributions(step.stepped[name]) > kappa_at(step, 0.5)


def test_random_selection(run):
    """Exactly the share, at the iteration asked for, by the seed; training goes on with what is left."""
    sizes = []
    for seed, keep, at in ((0, 0.5, 0.5), (0, 0.5, 0.5), (1, 0.5, 0.5), (0, 0.25, 0.8)):
        _, steps, ends = run(config_of("random_selection", keep=keep, at=at), seed=seed)
        kept = [len(parts["gate"]) for parts in steps[-1].after.values()]
        assert sum(kept) == round(keep * 72)
        whole = [all(len(parts["gate"]) == 6 for parts in step.after.values()) for step in steps]
        assert whole == [step.iteration + 1 < at * 10 for step in steps]
        name = max(ends[0], key=lambda module: len(ends[0][module]["gate"]))
        assert not torch.equal(steps[-1].before[name]["lora_b"], steps[-1].stepped[name]["lora_b"])
        sizes.append(kept)
    assert sizes[0] == sizes[1] != sizes[2]


# ---- path credit


def credits_of(steps, until):
    """-sum_t <gradient, step of the optimizer>, for each component of each module, in float64."""
    found = {}
    for step in steps[:until]:
        for name, grads in step.grads.items():
            for key, dim in (("lora_a", 1), ("lora_b", 0)):
                moved = step.stepped[name][key].double() - step.before[name][key].double()
                found[name] = found.get(name, 0) - (grads[key].double() * moved).sum(dim)
    return found


@pytest.mark.parametrize("shrink", [0.0, 0.5])
def test_path_credit_keeps_the_best_of_the_model(run, shrink):
    """By the optimizer's own steps: what the shrink beside them does to B earns no credit."""
    trainer, steps, _ = run(config_of("path_credit", shrink=shrink, at=0.8))
    found = credits_of(steps, until=8)
    for mine, expected in zip(trainer.method._credits, found.values()):
        assert torch.allclose(mine.double(), expected, rtol=1e-3, atol=1e-7)
    everything = torch.cat(list(found.values()))
    limit = everything.sort(descending=True).values[36 - 1]
    for name, parts in steps[8].before.items():  # of the kept, the rows of lora_a in their order
        assert torch.equal(parts["lora_a"], steps[7].stepped[name]["lora_a"][found[name] >= limit])
    if shrink:  # the shrink has done something that would have counted
        assert any(not torch.equal(steps[6].after[n]["lora_b"], steps[6].stepped[n]["lora_b"]) for n in found)


def test_path_credit_is_the_fall_of_the_loss_to_first_order(make_clip, tokenizer, make_task):
    """At a small learning rate, on one batch that never changes."""
    losses = []
    stream = TaskStream("one", [make_task("red", 3, seed=1)])
    config = config_of("path_credit", lr=1e-4, batch_size=24, shrink=0.0, at=1.0, keep=1.0)
    trainer = Trainer(make_clip(), tokenizer, stream, config, progress=False)
    after_step = trainer.method.after_step
    trainer.method.after_step = lambda ctx: (losses.append(float(ctx.step["loss"].detach())), after_step(ctx))
    trainer.fit()
    _, steps, _ = train(make_clip(), tokenizer, TaskStream("one", [make_task("red", 3, seed=1)]), config)
    explained = sum(float(credit.sum()) for credit in credits_of(steps, until=9).values())
    assert losses[0] - losses[-1] > 0
    assert explained == pytest.approx(losses[0] - losses[-1], rel=0.1)


def test_budget_of_the_module(run):
    """As many as its share of all credit, the best of them; at random, as many but others."""
    kept = {}
    for within in ("credit", "random"):
        _, steps, _ = run(config_of("path_credit", budget="module", within=within, shrink=0.0))
        found = credits_of(steps, until=5)
        budgets = proportional([float(c.sum()) for c in found.values()], [6] * 12, 36)
        kept[within] = []
        for (name, parts), budget in zip(steps[5].before.items(), budgets):
            rows = steps[4].stepped[name]["lora_a"]
            chosen = {int((rows == row).all(1).nonzero()) for row in parts["lora_a"]}
            assert len(chosen) == budget
            kept[within].append(chosen)
            if within == "credit":
                assert chosen == set(found[name].argsort(descending=True)[:budget].tolist())
    assert sum(map(len, kept["credit"])) == 36
    assert kept["credit"] != kept["random"]
    assert len(set(map(len, kept["credit"]))) > 1


@pytest.mark.parametrize(
    ("weights", "sizes", "count", "expected"),
    [
        ([3.0, 1.0], [8, 8], 4, [3, 1]),
        ([3.0, 1.0], [2, 8], 4, [2, 2]),  # full at 2
        ([1.0, -5.0, 1.0], [4, 4, 4], 4, [2, 0, 2]),
        ([0.0, 0.0, 0.0], [4, 4, 4], 6, [2, 2, 2]),
        ([5.0, 0.0], [3, 3], 6, [3, 3]),
        ([5.0, 1.0], [0, 3], 2, [0, 2]),
        ([2.0, 2.0], [4, 4], 0, [0, 0]),
        ([60.0, 30.0, 10.0], [99, 99, 99], 10, [6, 3, 1]),
    ],
)
def test_proportional(weights, sizes, count, expected):
    assert proportional(weights, sizes, count) == expected


# ---- all of them


@pytest.mark.parametrize("name", OF_COMPONENTS)
def test_a_task_starts_afresh(make_clip, tokenizer, make_stream, name):
    """A method object that has trained a task does to the next one what a new one does."""
    states = []
    for renewed in (False, True):
        model = make_clip()
        trainer = Trainer(model, tokenizer, make_stream(), config_of(name, iterations=6), progress=False)
        if renewed:
            evaluate = trainer._evaluate
            trainer._evaluate = lambda *arguments: (_renew(trainer), evaluate(*arguments))[1]  # noqa: B023
        trainer.fit()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def _renew(trainer):
    trainer.method = build_method(trainer.config.method)


@pytest.mark.parametrize("name", SELECTING)
def test_the_dead_make_no_difference(run, name):
    """Removed on the way or carried along to the end: the same merged update, the same survivors."""
    ends = []
    for dropped in (True, False):
        method = build_method(config_of(name))
        if not dropped:
            method.drop_dead = lambda ctx: None
        ends.append(run(config_of(name), method=method)[2][0])
    gone = 0
    for name, parts in ends[1].items():
        alive = parts["gate"] != 0
        left = ends[0][name]
        left = {key: value[..., left["gate"] != 0] for key, value in left.items() if key != "lora_a"} | {
            "lora_a": left["lora_a"][left["gate"] != 0]
        }
        assert torch.allclose(parts["lora_a"][alive], left["lora_a"], rtol=1e-3, atol=1e-5)
        assert torch.allclose(parts["lora_b"][:, alive], left["lora_b"], rtol=1e-3, atol=1e-5)
        gone += int((~alive).sum())
    assert gone > 0
    assert sum(len(parts["gate"]) for parts in ends[0].values()) < sum(len(p["gate"]) for p in ends[1].values())


@pytest.mark.parametrize("name", RULES)
def test_merge_scale(make_clip, tokenizer, make_task, name):
    plain, merged = make_clip(), []
    for scale in (1.0, 0.5):
        model = make_clip()
        stream = TaskStream("one", [make_task("red", 3, seed=1)])
        Trainer(model, tokenizer, stream, config_of(name, merge_scale=scale), progress=False).fit()
        weight = "transformer.resblocks.0.mlp.c_fc.weight"
        merged.append(model.state_dict()[weight] - plain.state_dict()[weight])
    assert merged[0].norm() > 0
    assert torch.allclose(merged[1], 0.5 * merged[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("decay_b", {"decay": 1.0}, r"decay is 1.0; it must be a finite number in \[0, 1\)"),
        ("uniform_shrink", {"shrink": -1.0}, "shrink is -1.0; it must be a finite number >= 0"),
        ("random_selection", {"keep": 0.0}, r"keep is 0.0; it must be a finite number in \(0, 1\]"),
        ("random_selection", {"at": 1.5}, "at is 1.5"),
        ("path_credit", {"budget": "modul"}, "budget is 'modul'; accepted: model, module. Did you mean 'mod"),
        ("path_credit", {"within": "luck"}, "within is 'luck'; accepted: credit, random"),
        ("sora", {"alpha": 0.0}, "alpha is 0.0; it must be a finite number > 0"),
        ("sora", {"kappa": -1.0}, "kappa is -1.0"),
        ("sora", {"penalty": -1.0}, "penalty is -1.0"),
        ("codyra", {"gate_lr": 0.0}, "gate_lr is 0.0; it must be a finite number > 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        method_config(name, **options)
