"""What a step costs by count, which no busy machine disturbs, and that the rival of C5 and G10 computes the same."""

from types import SimpleNamespace

import compare_set
import pytest
import rivals
import torch
from bench_rank_lora import step as layer_step
from gpu import step
from gpu.clip import make_model
from shapes import Shape


def counted(call):
    call()  # the first makes the optimizer's state
    return compare_set.counts(call)


def layer(rival):
    shape = Shape("counted", m=12, k=16, n=24, r=4)
    return counted(layer_step(rivals.build(rival, rivals.make_operands(shape, torch.float32, "cpu"))))


@pytest.fixture(scope="module")
def steps():
    model, sizes, _ = make_model(True)
    model.requires_grad_(False)
    place = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)

    def build(make, classes):
        s = sizes._replace(classes=classes)
        return make(place, model, s, step.make_batch(place, s), autocast=False)

    return build


def test_a_layer_takes_fewer_operations_than_the_formula_as_written():
    ours, released, plain = (layer(rival)["operations"] for rival in ("ours module", "as released", "linear"))
    assert plain < ours <= 30 < released


def test_a_layer_saves_its_input_and_the_projected_rows():
    """The frozen weight and the adapter, which are there anyway, and x [12, 16] and s [12, 4] alone."""
    parameters = 4 * (24 * 16 + 4 * 16 + 24 * 4 + 4)
    assert layer("ours module")["saved bytes"] <= parameters + 4 * (12 * 16 + 12 * 4)


def test_a_step_takes_half_of_the_operations_of_the_released_algorithm(steps):
    ours, released = counted(steps(step.ours, 6)), counted(steps(step.released, 6))
    assert ours["operations"] < 0.5 * released["operations"]


def test_more_classes_take_no_more_operations(steps):
    assert counted(steps(step.ours, 6))["operations"] == counted(steps(step.ours, 12))["operations"]


def test_both_steps_compute_the_same(steps):
    """Equal adapters at the start; cut prompts, packed products and one launch of the optimizer change rounding alone."""
    ours, released = steps(step.ours, 6), steps(step.released, 6)
    losses = [(float(ours()), float(released())) for _ in range(5)]
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[4][0], rel=1e-3), "and they train"
