import pytest
import torch

from fastlora import reference

KAPPA = 0.25


@pytest.mark.parametrize(
    ("v", "exact", "released"),
    [
        (0.0, 0.0, 0.0),
        (0.125, 0.0, 0.0),
        (0.25, 0.0, 0.25),  # exactly kappa: dies by the paper, lives in the released code
        (0.375, 0.125, 0.0),  # between kappa and 2 kappa: the released code's wider dead zone
        (0.5, 0.25, 0.25),  # exactly 2 kappa lives in both
        (1.0, 0.75, 0.75),
    ],
)
def test_soft_threshold_at_its_corners(v, exact, released):
    for sign in (1.0, -1.0):
        given = torch.tensor([sign * v], dtype=torch.float64)
        assert reference.soft_threshold(given, KAPPA).item() == sign * exact
        assert reference.soft_threshold(given, KAPPA, operator="released").item() == sign * released


@pytest.mark.parametrize("operator", reference.OPERATORS)
def test_kappa_zero_is_the_identity_with_derivative_one(operator):
    v = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    out = reference.soft_threshold(v, 0.0, operator=operator)
    assert torch.equal(out, v)
    out.sum().backward()
    assert torch.equal(v.grad, torch.ones(3))


@pytest.mark.parametrize("operator", reference.OPERATORS)
def test_nan_is_not_hidden(operator):
    assert reference.soft_threshold(torch.tensor([float("nan")]), 0.5, operator=operator).isnan().all()


def test_exact_operator_solves_its_proximal_problem():
    # prox(v) = argmin_w (w - v)^2 / 2 + kappa |w|, found on a fine grid
    grid = torch.linspace(-2, 2, 40001, dtype=torch.float64)
    for v in (-1.3, -0.2, 0.0, 0.249, 0.7):
        best = grid[((grid - v) ** 2 / 2 + KAPPA * grid.abs()).argmin()]
        assert abs(best - reference.soft_threshold(torch.tensor(v, dtype=torch.float64), KAPPA)) <= 1e-4


def test_layer_and_merge_are_the_same_update():
    x, weight = torch.randn(5, 7).double(), torch.randn(4, 7).double()
    lora_a, lora_b, gate = torch.randn(3, 7).double(), torch.randn(4, 3).double(), torch.randn(3).double()
    y = reference.rank_lora_linear(x, weight, None, lora_a, lora_b, gate, 0.3, 0.5)
    merged = reference.merge(weight, lora_a, lora_b, reference.soft_threshold(gate, 0.3), scaling=0.5)
    torch.testing.assert_close(y, x @ merged.t())


def test_gate_of_a_sample_is_broadcast_over_its_tokens():
    x, weight = torch.randn(2, 3, 7), torch.randn(4, 7)
    lora_a, lora_b, gate = torch.randn(5, 7), torch.randn(4, 5), torch.randn(2, 5)
    y = reference.rank_lora_linear(x, weight, None, lora_a, lora_b, gate)
    for sample in range(2):
        expected = reference.rank_lora_linear(x[sample], weight, None, lora_a, lora_b, gate[sample])
        torch.testing.assert_close(y[sample], expected)


def test_unknown_operator_is_named():
    with pytest.raises(ValueError, match="'soft' is unknown; accepted: exact, released"):
        reference.soft_threshold(torch.zeros(1), 0.1, operator="soft")
