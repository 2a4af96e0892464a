import math

import pytest
import torch

from fastlora.continual.config import CONFIGS, CoDyRAConfig, LoRAConfig
from fastlora.continual.methods import METHODS, build_method
from fastlora.ops.prox import soft_threshold


def test_every_config_has_its_method():
    assert METHODS.keys() == CONFIGS.keys()
    for name, config in CONFIGS.items():
        assert METHODS[name].config_class is config
        assert isinstance(build_method(config()), METHODS[name])


def test_unknown_method():
    class Stranger(LoRAConfig):
        name = "lorra"

    with pytest.raises(ValueError, match="method is 'lorra'; accepted: codyra, lora, .*. Did you mean 'lora'"):
        build_method(Stranger())


def test_config_of_another_method():
    with pytest.raises(TypeError, match="config is a LoRAConfig; CoDyRA takes a CoDyRAConfig"):
        METHODS["codyra"](LoRAConfig())


@pytest.mark.parametrize("prox", ["exact", "released"])
@pytest.mark.parametrize("iterations", [500, 120])
def test_null_model_against_gates_without_gradient(prox, iterations):
    """100,000 gates through the whole schedule: the kept share within 3 standard errors of the prediction."""
    method = build_method(CoDyRAConfig(iterations=iterations, kappa_max=2.5 / iterations, prox=prox))
    gates = torch.randn(100_000, dtype=torch.float64)
    for iteration in range(iterations):
        gates = soft_threshold(gates, method.kappa(iteration), operator=prox)
    predicted = method.null_model()
    share = float((gates != 0).double().mean())
    assert abs(share - predicted["survival"]) < 3 * math.sqrt(0.25 / len(gates))
    assert predicted["expected_rank"] == 16 * predicted["survival"]


def test_null_model_of_the_published_settings():
    """Total shrink 0.65, 8.25 of 16 components, s.d. 2.0: the figures of the paper's schedule."""
    null = build_method(CoDyRAConfig()).null_model()
    assert null["total_shrink"] == pytest.approx(0.65, abs=5e-4)
    assert null["expected_rank"] == pytest.approx(8.25, abs=0.01)


def test_null_model_of_gates_that_start_at_one():
    assert build_method(CoDyRAConfig(gate_init="ones")).null_model()["survival"] == 1.0
    assert build_method(CoDyRAConfig(gate_init="ones", kappa_max=0.01)).null_model()["survival"] == 0.0
    assert build_method(LoRAConfig()).null_model() is None


def test_when_dead_ranks_are_dropped():
    """With the published settings from iteration 285 on, a few times; never where kappa does not pass Adam's steps."""
    assert sorted(build_method(CoDyRAConfig()).drops) == [285, 328, 371, 414, 457]
    assert not build_method(CoDyRAConfig(drop_dead=False)).drops
    assert not build_method(CoDyRAConfig(kappa_max=0.0)).drops
    assert not build_method(CoDyRAConfig(lr=10.0)).drops - set(range(480, 500))
