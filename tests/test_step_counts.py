"""What a step costs by count, which no busy machine disturbs, and that the rivals of C5 and G10 compute the same."""

import cost
import pytest
import rivals
import torch
from bench_rank_lora import saved_bytes
from bench_rank_lora import step as layer_step
from rivals import steps
from rivals.clip import make_model
from shapes import Shape


def layer_case(rival):
    shape = Shape("counted", m=12, k=16, n=24, r=4)
    return rivals.build(rival, rivals.make_operands(shape, torch.float32, "cpu"))


def layer_operations(rival):
    call = layer_step(layer_case(rival))
    call()
    return cost.operations(call)


@pytest.fixture(scope="module")
def make():
    """make(rival, classes=6): a step of the demo's model."""
    model, sizes, _ = make_model(True)
    model.requires_grad_(False)

    def build(rival, classes=6):
        s, place = sizes._replace(classes=classes), steps.OnCpu()
        return steps.build(rival, place, model, s, steps.make_batch(place, s), small=True)

    return build


def operations(step):
    step()  # the first makes the optimizer's state
    return cost.operations(step)


def test_a_layer_takes_fewer_operations_than_the_formula_as_written():
    ours, released, plain = (layer_operations(rival) for rival in ("ours module", "as released", "linear"))
    assert plain < ours <= 26 < released


def test_a_layer_saves_its_input_and_the_projected_rows():
    """x [12, 16] and s [12, 4] alone."""
    assert saved_bytes(layer_case("ours module")) == 4 * (12 * 16 + 12 * 4)


def test_a_step_takes_half_of_the_operations_of_the_released_algorithm(make):
    """And fewer than PEFT's, which has no gates."""
    ours, released, peft = (operations(make(rival)) for rival in ("ours", "as released", "peft, short texts"))
    assert ours < 0.5 * released and ours < peft


def test_more_classes_take_no_more_operations(make):
    assert operations(make("ours", 6)) == operations(make("ours", 12))


def test_ours_and_the_released_step_train_alike(make):
    """Equal adapters at the start; cut prompts, packed products and one launch of the optimizer change rounding alone."""
    ours, released = make("ours"), make("as released")
    losses = [(float(ours()), float(released())) for _ in range(5)]
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[4][0], rel=1e-3), "and they train"


@pytest.mark.parametrize("rival", [rival for rival in steps.STEPS if rival not in ("ours", "as released")])
def test_other_steps_start_from_the_same_loss_and_train(make, rival):
    step = make(rival)
    losses = [float(step()) for _ in range(5)]
    assert losses[0] == pytest.approx(float(make("ours")()), rel=1e-5)
    assert losses[4] < losses[0] - 1e-3
