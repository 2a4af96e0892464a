import copy
import io
import pickle

import pytest
import torch
from helpers import relative_error
from torch import nn

from fastlora import FusedRankLoRALinear, MergeError, reference


def trained(rank=4, k=12, n=10, **options):
    """A layer whose adapter does something."""
    layer = FusedRankLoRALinear(k, n, rank, **options)
    layer.lora_b.data.normal_()
    return layer


def test_it_is_a_linear_with_the_agreed_keys_and_only_the_adapter_trains():
    layer = FusedRankLoRALinear(12, 10, rank=4)
    assert isinstance(layer, nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a", "lora_b", "gate"]
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b", "gate"}
    assert layer.lora_a.shape == (4, 12) and layer.lora_b.shape == (10, 4) and layer.gate.shape == (4,)
    assert FusedRankLoRALinear(12, 10, rank=4, bias=False).bias is None


def test_a_fresh_layer_computes_the_frozen_layer():
    linear = nn.Linear(12, 10)
    layer = FusedRankLoRALinear.from_linear(linear, rank=4)
    x = torch.randn(3, 5, 12)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_keeps_its_weights_and_a_float32_adapter(dtype):
    linear = nn.Linear(12, 10, dtype=dtype)
    before = linear.weight.clone()
    layer = FusedRankLoRALinear.from_linear(linear, rank=4)
    layer.lora_b.data.normal_()
    y = layer(torch.randn(3, 12, dtype=dtype))
    y.float().sum().backward()
    assert y.dtype == dtype and torch.equal(layer.weight, before)
    assert layer.lora_a.dtype == layer.lora_b.dtype == layer.gate.dtype == layer.gate.grad.dtype == torch.float32


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_from_linear_makes_the_adapter_on_a_device_that_is_none_by_default(device):
    layer = FusedRankLoRALinear.from_linear(nn.Linear(3, 2), rank=1, device=device)
    assert layer.gate.device.type == layer._kappa.device.type == "cpu"
    assert layer(torch.ones(1, 3)).shape == (1, 2)


def test_forward_and_delta_weight_against_the_reference():
    layer = trained(kappa=0.3, scaling=0.5)
    x = torch.randn(7, 12)
    operands = [t.detach().double() for t in (x, layer.weight, layer.bias, layer.lora_a, layer.lora_b, layer.gate)]
    assert relative_error(layer(x), reference.rank_lora_linear(*operands, 0.3, 0.5)) < 1e-6
    effective = reference.soft_threshold(operands[5], 0.3)
    delta = reference.delta_weight(operands[3], operands[4], effective, scaling=0.5)
    assert layer.delta_weight().dtype == torch.float32
    assert relative_error(layer.delta_weight(), delta) < 1e-6


def test_active_rank_counts_gates_above_kappa():
    layer = trained(rank=5)
    layer.gate.data = torch.tensor([0.0, 0.25, -0.25, 0.5, -1.0])
    assert layer.active_rank() == 4
    layer.kappa = 0.25
    assert layer.active_rank() == 2


@pytest.mark.parametrize("gates", [[0.1, -2.0, 0.0, 1.0], [0.1, 0.2, 0.0, -0.1], [1.0, 2.0, -1.0, 1.5]])
def test_prune_changes_no_output_and_keeps_the_parameters_identity(gates):
    layer = trained(kappa=0.25)
    layer.gate.data = torch.tensor(gates)
    x, parameters = torch.randn(6, 12), [layer.lora_a, layer.lora_b, layer.gate]
    before, active = layer(x), layer.active_rank()
    assert layer.prune_() == active == layer.gate.numel()
    assert layer.lora_a.shape == (active, 12) and layer.lora_b.shape == (10, active)
    torch.testing.assert_close(layer(x), before)
    assert all(a is b for a, b in zip(parameters, (layer.lora_a, layer.lora_b, layer.gate)))
    layer(x).sum().backward()
    layer.reset_adapter_()
    assert layer.lora_a.shape == (4, 12) and layer.lora_b.abs().sum() == 0


def test_prune_refuses_a_nan_gate():
    layer = trained()
    layer.gate.data[1] = float("nan")
    with pytest.raises(ValueError, match="gate holds 1 non-finite of 4 values"):
        layer.prune_()
    assert layer.gate.numel() == 4


def test_merge_adds_the_update_in_place_and_starts_afresh():
    layer = trained(kappa=0.2, scaling=0.5)
    x = torch.randn(6, 12)
    before, storage = layer(x).detach(), layer.weight.data_ptr()
    report = layer.merge_(generator=torch.Generator().manual_seed(3))
    assert layer.weight.data_ptr() == storage and len(report) == 1
    assert relative_error(layer(x), before) < 1e-6
    assert layer.lora_b.abs().sum() == 0 and layer.gate.numel() == layer.rank
    again = trained()
    again.reset_adapter_(torch.Generator().manual_seed(3))
    assert torch.equal(again.lora_a, layer.lora_a) and torch.equal(again.gate, layer.gate)


def test_merge_of_a_bad_adapter_changes_nothing():
    layer = trained()
    layer.lora_b.data[0, 0] = float("inf")
    before, adapter = layer.weight.clone(), layer.lora_b.clone()
    with pytest.raises(MergeError):
        layer.merge_()
    assert torch.equal(layer.weight, before) and torch.equal(layer.lora_b, adapter)
    layer.gate.data[0] = float("nan")
    with pytest.raises(ValueError, match="gate holds 1 non-finite"):
        layer.merge_()


def test_merge_between_forward_and_backward_raises():
    layer = trained()
    x = torch.randn(6, 12, requires_grad=True)
    loss = layer(x).sum()
    layer.merge_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gates_stay_float32_and_exact_through_conversions():
    layer = trained(kappa=0.3)
    gate = layer.gate.detach().clone()
    for convert in (nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16), nn.Module.float):
        convert(layer)
        assert layer.gate.dtype == torch.float32 and torch.equal(layer.gate, gate)
        assert layer._kappa.dtype == torch.float32
    assert layer.half().weight.dtype == torch.float16


def test_copies_pickles_and_state_dicts():
    layer = trained(kappa=0.1)
    layer.gate.data[0] = 0.01
    layer.prune_()
    x = torch.randn(4, 12)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and twin.weight is not layer.weight
    other = FusedRankLoRALinear(12, 10, rank=4, kappa=0.1)
    other.load_state_dict(layer.state_dict())  # saved at rank 3
    assert torch.equal(other(x), layer(x)) and other.gate.numel() == 3
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))


def test_a_state_that_does_not_fit_leaves_the_adapter_as_it_was():
    layer = trained(kappa=0.1)
    before = [parameter.detach().clone() for parameter in (layer.lora_a, layer.lora_b, layer.gate)]
    with pytest.raises(RuntimeError, match=r"size mismatch for lora_a: .*\[3, 13\].*\[4, 12\]"):
        layer.load_state_dict(trained(rank=3, k=13).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, (layer.lora_a, layer.lora_b, layer.gate)))


def test_to_linear_is_plain_and_shares_the_weight():
    layer = trained()
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and plain.weight is layer.weight and list(plain.state_dict()) == ["weight", "bias"]


def test_dropout_acts_on_the_update_alone_and_only_while_training():
    layer = trained(dropout=0.5)
    x = torch.randn(2000, 12)
    full, base = layer.eval()(x), nn.functional.linear(x, layer.weight, layer.bias)
    layer.train()
    mean = torch.stack([layer(x) - base for _ in range(200)]).mean(0)
    assert relative_error(mean, full - base) < 0.15  # unbiased: E[dropout(x)] = x
    assert not torch.equal(layer(x), full)
    layer(x).sum().backward()
    assert layer.gate.grad.abs().sum() > 0


def test_ones_gates_are_plain_lora():
    layer = trained(gate_init="ones")
    x = torch.randn(4, 12)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + x @ layer.lora_a.t() @ layer.lora_b.t()
    torch.testing.assert_close(layer(x), expected)


def test_compile_has_one_graph_and_a_new_kappa_recompiles_nothing():
    torch.compiler.reset()
    layer = trained()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    frames = []
    for rows, kappa in ((5, 0.1), (9, 0.2), (17, 0.3)):
        layer.kappa = kappa
        x = torch.randn(rows, 12)
        torch.testing.assert_close(compiled(x), layer(x))
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[0] == frames[-1], "a new kappa or row count recompiled the layer"
    compiled(torch.randn(5, 12)).sum().backward()
    assert layer.gate.grad is not None


def test_recompute_keeps_the_input_alone():
    layer = trained()
    x = torch.randn(6, 12, requires_grad=True)

    def saved_and_gradients():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
            y = layer(x)
        return saved, torch.autograd.grad(y.sum(), [x, layer.lora_a, layer.lora_b, layer.gate])

    saved, expected = saved_and_gradients()
    assert (6, layer.rank) in saved
    layer.recompute = True
    saved, gradients = saved_and_gradients()
    assert (6, 12) in saved and (6, layer.rank) not in saved
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected))


def test_checkpoint_and_export():
    layer = trained()
    x = torch.randn(5, 12, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), [x])
    (recomputed,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum(), [x])
    assert torch.equal(expected, recomputed)
    exported = torch.export.export(layer.eval(), (x.detach(),)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank is 0; it must be >= 1"),
        ({"rank": 2.5}, TypeError, "rank is a float"),
        ({"kappa": -0.1}, ValueError, "kappa is -0.1; it must be finite and >= 0"),
        ({"kappa": float("nan")}, ValueError, "kappa is nan"),
        ({"scaling": float("inf")}, ValueError, "scaling is inf"),
        ({"dropout": 1.0}, ValueError, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"gate_init": "zeros"}, ValueError, "gate_init 'zeros' is unknown; accepted: 'normal', 'ones'"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        FusedRankLoRALinear(4, 4, **{"rank": 2, **options})


def test_kappa_is_checked_when_set():
    layer = trained()
    for value in (float("inf"), 1e300):  # the second is infinite in float32
        with pytest.raises(ValueError, match="kappa is (inf|1e)"):
            layer.kappa = value
    assert layer.kappa == 0.0


def test_only_a_plain_linear_is_wrapped():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TypeError, match="Odd has a forward of its own"):
        FusedRankLoRALinear.from_linear(Odd(3, 3))
    with pytest.raises(TypeError, match="a Conv1d was given"):
        FusedRankLoRALinear.from_linear(nn.Conv1d(3, 3, 1))
    with pytest.raises(TypeError, match="already has a rank adapter"):
        FusedRankLoRALinear.from_linear(trained())
    with pytest.raises(ValueError, match="has a bias"):
        FusedRankLoRALinear.from_linear(nn.Linear(3, 3), bias=False)


def test_meta_tensors_give_shapes():
    layer = FusedRankLoRALinear(12, 10, rank=4, device="meta")
    assert layer(torch.empty(5, 12, device="meta")).shape == (5, 10)
