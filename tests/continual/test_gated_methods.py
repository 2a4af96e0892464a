"""CoDyRA with its controls, and SoRA: what happens to the gates."""

import math

import pytest
import torch

pytest.importorskip("open_clip")

from continual.step_log import train  # noqa: E402

from fastlora.continual import Trainer  # noqa: E402
from fastlora.continual.config import CoDyRAConfig, SoRAConfig  # noqa: E402
from fastlora.continual.methods import build_method  # noqa: E402
from fastlora.continual.restore import restore  # noqa: E402
from fastlora.continual.saved_run import read_run  # noqa: E402
from fastlora.ops.prox import soft_threshold  # noqa: E402

SHORT = {"rank": 8, "iterations": 10, "batch_size": 8, "lr": 1e-2}


def codyra(**options):
    return CoDyRAConfig(**(SHORT | {"kappa_max": 0.2} | options))


def sora(**options):
    return SoRAConfig(**(SHORT | {"kappa": 0.05} | options))


def gates(state):
    return torch.cat([parts["gate"] for parts in state.values()])


@pytest.fixture
def one_task(make_task):
    from fastlora.continual import TaskStream

    return lambda: TaskStream("one", [make_task("red", 3, seed=1)])


@pytest.fixture
def run(make_clip, tokenizer, one_task):
    return lambda config, **options: train(make_clip(), tokenizer, one_task(), config, **options)


# ---- learning rate of the gates


def test_gates_move_in_proportion_to_their_own_learning_rate(run):
    """B is 0 at first, so gates see their first gradient in the second step, the same whatever their rate."""
    moved = []
    for gate_lr in (None, 1e-2, 2e-2):
        _, steps, _ = run(codyra(gate_lr=gate_lr, kappa_max=0.0))
        assert torch.equal(gates(steps[0].before), gates(steps[0].stepped))
        moved.append(gates(steps[1].stepped) - gates(steps[1].before))
        lora_b = next(iter(steps[1].stepped.values()))["lora_b"]
    assert torch.equal(moved[0], moved[1]) and moved[0].abs().min() > 1e-3
    assert torch.allclose(moved[2], 2 * moved[1], rtol=1e-4, atol=1e-7)
    assert lora_b.abs().max() < 2.5e-2  # two steps of lr, not of gate_lr


def test_gate_lr_of_gates_that_do_not_train():
    with pytest.raises(ValueError, match="gate_lr is 0.01 with gates 'random', which do not train. Leave gate_lr out"):
        codyra(gate_lr=0.01, gates="random")


def test_a_higher_gate_lr_lets_gates_come_back_for_longer():
    """At ten times the rate kappa passes Adam's steps later, if at all."""
    published = build_method(CoDyRAConfig())
    assert min(published.drops) < min(build_method(CoDyRAConfig(gate_lr=1e-3)).drops)
    assert min(build_method(CoDyRAConfig(gates="null_control")).drops) == 251  # with the first threshold


# ---- controls


@pytest.mark.parametrize("prox", ["exact", "released"])
def test_null_control_is_the_schedule_and_nothing_else(run, prox):
    """Its gates at the end are the drawn ones under the thresholds, to the bit; the same gates preshrunk at once."""
    config = codyra(gates="null_control", prox=prox, drop_dead=False)
    _, steps, ends = run(config)
    expected = gates(steps[0].before)
    assert expected.std() > 0.5
    method = build_method(config)
    for iteration in range(config.iterations):
        expected = soft_threshold(expected, method.kappa(iteration), operator=prox)
    assert torch.equal(gates(ends[0]), expected)
    assert 0 < expected.count_nonzero() < len(expected)

    _, preshrunk, _ = run(codyra(gates="preshrunk", prox=prox, drop_dead=False))
    for step in preshrunk:
        assert torch.equal(gates(step.before), expected) and torch.equal(gates(step.after), expected)


def test_preshrunk_drops_its_dead_components_before_the_first_step(run):
    _, steps, ends = run(codyra(gates="preshrunk"))
    assert gates(steps[0].before).count_nonzero() == len(gates(steps[0].before)) < 8 * len(ends[0])
    assert torch.equal(gates(steps[0].before), gates(ends[0]))


def test_random_gates_are_drawn_frozen_and_all_kept(run):
    trainer, steps, ends = run(codyra(gates="random"))
    _, trained, trained_ends = run(codyra())
    assert torch.equal(gates(steps[0].before), gates(trained[0].before))  # one draw for all
    assert torch.equal(gates(steps[0].before), gates(ends[0]))
    assert trainer.record.mean_rank() == 8 and trainer.method.null_model() is None
    assert not trainer.method.drops
    assert all(step.grads[name]["gate"] is None for step in steps for name in step.grads)
    assert any(step.grads[name]["gate"] is not None for step in trained for name in step.grads)
    moved = ends[0].values()
    assert all(parts["lora_b"].abs().max() > 0 for parts in moved)
    assert len(gates(trained_ends[0])) < len(gates(ends[0]))


@pytest.mark.parametrize("control", ["null_control", "preshrunk"])
def test_controls_have_the_null_model_of_the_method(control):
    assert build_method(codyra(gates=control)).null_model() == build_method(codyra()).null_model()


def test_controls_that_train_are_told_apart(make_clip, tokenizer, one_task):
    """What merges differs among all four: none is another by accident."""
    weights = []
    for control in ("trained", "null_control", "preshrunk", "random"):
        model = make_clip()
        Trainer(model, tokenizer, one_task(), codyra(gates=control), progress=False).fit()
        weights.append(model.transformer.resblocks[0].mlp.c_fc.weight)
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_unknown_gates():
    with pytest.raises(ValueError, match="gates is 'null'; accepted: trained, null_control, preshrunk, random"):
        codyra(gates="null")


# ---- SoRA


def test_sora_of_the_published_code():
    config = SoRAConfig()
    assert (config.rank, config.alpha, config.kappa, config.gate_init, config.penalty) == (8, 16.0, 3e-4, "normal", 0.0)


@pytest.mark.parametrize("prox", ["exact", "released"])
def test_sora_thresholds_from_the_first_step_on(run, prox):
    """No gate has a gradient at the first step (B is 0): it is thresholded by kappa alone."""
    trainer, steps, _ = run(sora(prox=prox))
    assert torch.equal(gates(steps[0].stepped), soft_threshold(gates(steps[0].before), 0.05, operator=prox))
    assert {trainer.method.kappa(iteration) for iteration in range(10)} == {0.05}
    assert trainer.method.null_model()["total_shrink"] == pytest.approx(0.5)


@pytest.mark.parametrize("prox", ["exact", "released"])
def test_null_model_of_sora(prox):
    """100,000 gates through 500 thresholds: the kept share within 3 standard errors."""
    method = build_method(SoRAConfig(kappa=1e-3, prox=prox))
    values = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for iteration in range(500):
        values = soft_threshold(values, method.kappa(iteration), operator=prox)
    predicted = method.null_model()
    assert abs(float((values != 0).double().mean()) - predicted["survival"]) < 3 * math.sqrt(0.25 / len(values))
    assert predicted["expected_rank"] == 8 * predicted["survival"]


def test_sora_scales_by_alpha_over_rank(make_clip, tokenizer, one_task):
    """One step: twice alpha / rank merges twice the update, since Adam's steps do not depend on the gradient's scale."""
    plain, merged = make_clip(), []
    for alpha in (8.0, 16.0):
        model = make_clip()
        Trainer(model, tokenizer, one_task(), sora(iterations=1, alpha=alpha, kappa=0.0), progress=False).fit()
        merged.append(_weight(model) - _weight(plain))
    assert (merged[1] - 2 * merged[0]).norm() < 1e-3 * merged[1].norm() > 0


def _weight(model):
    return model.visual.transformer.resblocks[0].mlp.c_fc.weight.detach()


def test_penalty_of_the_published_code(run):
    """Its gradient on each gate is penalty sign(g) / gates at the first step, where nothing else has one."""
    _, steps, _ = run(sora(penalty=3.0))
    for name, grads in steps[0].grads.items():
        drawn = steps[0].before[name]["gate"]
        assert torch.allclose(grads["gate"], 3.0 * drawn.sign() / (len(steps[0].grads) * 8))
    _, steps, _ = run(sora())
    assert all(not grads["gate"].any() for grads in steps[0].grads.values())


def test_adapter_files_of_sora_hold_its_scaling(make_clip, tokenizer, one_task, tmp_path):
    """They rebuild the merged weights bit for bit."""
    model, rebuilt = make_clip(), make_clip()
    Trainer(model, tokenizer, one_task(), sora(), out=tmp_path / "run", checkpoints="none", progress=False).fit()
    restore(rebuilt, read_run(tmp_path / "run"), 1)
    state = rebuilt.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
