import pytest
import torch

from fastlora.ops import soft_threshold
from fastlora.ops.prox import soft_threshold_


@pytest.mark.parametrize("operator", ["exact", "released"])
@pytest.mark.parametrize("kappa", [0.0, 0.05, 0.25])
def test_in_place_over_many_tensors_equals_each_alone(operator, kappa):
    corners = torch.tensor([0.0, kappa, -kappa, 2 * kappa, -2 * kappa, 1.5 * kappa])
    gates = [torch.randn(16), corners, torch.empty(0), torch.randn(3)]
    expected = [soft_threshold(gate, kappa, operator=operator) for gate in gates]
    soft_threshold_(gates, kappa, operator=operator)
    assert all(torch.equal(gate, each) for gate, each in zip(gates, expected))


@pytest.mark.parametrize("operator", ["exact", "released"])
def test_gradient_is_the_indicator_of_survival(operator):
    gate = torch.tensor([-1.0, -0.25, 0.0, 0.1, 0.25, 0.375, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    out = soft_threshold(gate, 0.25, operator=operator)
    out.sum().backward()
    assert torch.equal(gate.grad, (out != 0).double())


@pytest.mark.parametrize("kappa", [-0.1, float("nan"), float("inf")])
def test_bad_kappa_is_refused(kappa):
    with pytest.raises(ValueError, match="must be finite and >= 0"):
        soft_threshold(torch.zeros(2), kappa)


def test_kappa_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="kappa is a str"):
        soft_threshold(torch.zeros(2), "0.1")
    with pytest.raises(ValueError, match=r"kappa has shape \[2\]"):
        soft_threshold(torch.zeros(2), torch.zeros(2))


def test_kappa_from_a_tensor():
    v = torch.randn(9)
    assert torch.equal(soft_threshold(v, torch.tensor(0.4)), soft_threshold(v, 0.4))
