"""Adapters over quantised layers of bitsandbytes and torchao: against the same formula over the dequantised weight."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora import FusedRankLoRALinear, MergeError, reference
from fastlora.modules.quantized import QuantizedRankLoRALinear

K, N, R = 64, 32, 4
KINDS = ("nf4", "fp4", "bnb int8", "torchao int8")


def quantized(kind, bias=True):
    torch.manual_seed(0)
    plain = nn.Linear(K, N, bias=bias)
    if kind == "torchao int8":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        holder = nn.Sequential(plain)
        quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
        return holder[0]
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if kind == "bnb int8":
        layer = bnb.nn.Linear8bitLt(K, N, bias=bias, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(K, N, bias=bias, quant_type=kind, compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")


def config_of(layer):
    return config("torchao int8" if "torchao" in layer.format.name else "bitsandbytes")


def config(kind):
    if kind != "torchao int8":
        return True
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def layer(kind):
    made = QuantizedRankLoRALinear(quantized(kind), R, kappa=0.25, scaling=0.7)
    made.gate.data = torch.tensor([1.2, -0.1, 0.25, -0.9])  # one inside the threshold, one at it
    nn.init.normal_(made.lora_b, std=0.5)
    return made


def truth(layer, x, dy):
    """y, and the gradients of x, lora_a, lora_b and gate, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_a, layer.lora_b, layer.gate)]
    bias = None if layer.base.bias is None else layer.base.bias.double()
    operands = leaves[0], layer.dequantize().double(), bias, *leaves[1:]
    y = reference.rank_lora_linear(*operands, layer.kappa, layer.scaling)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


# int8 of bitsandbytes rounds x to int8 as well, row by row
ERRORS = {"nf4": 1e-6, "fp4": 1e-6, "bnb int8": 2e-2, "torchao int8": 1e-6}


def test_outputs_and_gradients(layer, kind):
    x, dy = torch.randn(3, 5, K, requires_grad=True), torch.randn(3, 5, N)
    y = layer(x)
    found = [y, *torch.autograd.grad(y, (x, layer.lora_a, layer.lora_b, layer.gate), dy)]
    for got, expected in zip(found, truth(layer, x, dy)):
        assert (got.double() - expected).norm() <= ERRORS[kind] * expected.norm()
    assert (found[-1][1:3] == 0).all() and (found[-1][[0, 3]] != 0).all()


def test_it_trains_and_the_base_stays(layer):
    before, x = layer.dequantize(), torch.randn(64, K)
    target, losses = torch.randn(64, N), []
    optimizer = fastlora.optim.ProxAdamW(layer, lr=3e-2)
    for _ in range(20):
        loss = nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(layer.dequantize(), before)


def test_autocast(layer):
    x = torch.randn(7, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    expected = truth(layer, x, torch.randn(7, N))[0]
    assert (y.double() - expected).norm() <= 0.02 * expected.norm()


def test_dropout_acts_while_training(kind):
    layer, x = QuantizedRankLoRALinear(quantized(kind), R, dropout=0.5), torch.randn(7, K)
    nn.init.normal_(layer.lora_b)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_evaluation_leaves_the_weight_as_it_was(layer):
    """On CPUs with AVX512-BF16, bitsandbytes packs a 4-bit weight anew for evaluation, its scales rounded to bfloat16."""
    before, x = layer.dequantize(), torch.randn(7, K)
    layer.eval()(x)
    assert (layer.dequantize() - before).abs().max() <= 2**-8 * before.abs().max()
    layer.merge_(requantize=config_of(layer))
    expected = nn.functional.linear(x, layer.dequantize(), layer.base.bias)
    assert (layer(x) - expected).norm() <= 0.02 * expected.norm()


def test_a_merge_is_refused_and_changes_nothing(layer):
    before = layer.dequantize(), layer.gate.detach().clone()
    with pytest.raises(MergeError, match="steps are wider than most updates.*requantize=True"):
        layer.merge_()
    with pytest.raises(MergeError, match="^0 stores its weight as .*No weight has been changed"):
        fastlora.merge(nn.Sequential(layer))
    with pytest.raises(ValueError, match="cannot be taken out again"):
        fastlora.unmerge(nn.Sequential(layer))
    assert torch.equal(layer.dequantize(), before[0]) and torch.equal(layer.gate, before[1])


def test_a_merge_that_requantises_tells_its_error(layer, kind):
    old, delta = layer.dequantize(), layer.delta_weight()
    (row,) = layer.merge_(requantize=config(kind))
    error = layer.dequantize() - (old + delta)
    assert row.error_norm == pytest.approx(float(error.norm()), rel=1e-5)
    assert row.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert 0.001 < row.relative_error < {"nf4": 0.3, "fp4": 0.4}.get(kind, 0.03), "4 bits keep most of a large update"
    assert not torch.equal(layer.dequantize(), old) and not layer.lora_b.any()
    x = torch.randn(5, K)
    expected = nn.functional.linear(x, layer.dequantize(), layer.base.bias)
    assert (layer(x) - expected).norm() <= ERRORS[kind] * expected.norm(), "the layer computes with what it holds"


def test_an_update_that_quantisation_swallows_shows_as_lost(kind):
    layer = QuantizedRankLoRALinear(quantized(kind), R)
    nn.init.normal_(layer.lora_b, std=1e-6)
    (row,) = layer.merge_(requantize=config(kind))
    assert row.relative_error > 0.9


def test_nothing_is_replaced_when_one_of_several_cannot_be_merged(kind):
    model = nn.Sequential(quantized(kind), nn.ReLU(), nn.Linear(N, 8), nn.Linear(8, N))
    fastlora.inject(model, rank=R, where=["*"])
    for _, adapter in fastlora.adapters(model):
        nn.init.normal_(adapter.lora_b)
    model[3].lora_b.data[0, 0] = float("nan")
    before = model[0].dequantize(), model[2].weight.clone()
    with pytest.raises(MergeError, match="lora_b holds 1 non-finite"):
        fastlora.merge(model, requantize=config(kind))
    assert torch.equal(model[0].dequantize(), before[0]) and torch.equal(model[2].weight, before[1])
    model[3].reset_adapter_()
    model[0].lora_b.data[0, 0] = float("inf")
    with pytest.raises(MergeError, match="not finite; no weight has been changed"):
        fastlora.merge(model, requantize=config(kind))
    assert torch.equal(model[0].dequantize(), before[0]) and torch.equal(model[2].weight, before[1])


def test_a_model_of_both_kinds(kind, tmp_path):
    model = nn.Sequential(quantized(kind), nn.ReLU(), nn.Linear(N, 8))
    plain, x = copy.deepcopy(model), torch.randn(5, K)
    assert fastlora.inject(model, rank=R, where=["*"]).names == ("0", "2")
    assert type(model[0]) is QuantizedRankLoRALinear and type(model[2]) is FusedRankLoRALinear
    assert not any(p.requires_grad for name, p in model.named_parameters() if "base" in name)
    with pytest.raises(ValueError, match="adapted already"):
        fastlora.inject(model, rank=R, where=["0.base"])
    for _, adapter in fastlora.adapters(model):
        nn.init.normal_(adapter.lora_b, std=0.1)
    expected = model(x)
    fastlora.save_adapter(model, tmp_path / "adapter.safetensors")
    other = copy.deepcopy(plain)
    fastlora.inject(other, rank=R, where=["*"])
    fastlora.load_adapter(other, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(other(x), expected)
    report = fastlora.merge(model, requantize=config(kind))
    assert {row.name for row in report} == {"0", "2"} and report.backend.endswith("+requantize")
    fastlora.remove(model)
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert (model(x) - expected).norm() < 0.3 * expected.norm()
    torch.testing.assert_close(fastlora.remove(other)(x), plain(x), rtol=0, atol=0)


def test_wrong_input(kind):
    with pytest.raises(TypeError, match="a Linear was given; .*FusedRankLoRALinear.from_linear"):
        QuantizedRankLoRALinear(nn.Linear(K, N))
    with pytest.raises(ValueError, match="backend='triton', recompute=False were given for a quantised layer"):
        QuantizedRankLoRALinear(quantized(kind), backend="triton")
    if kind == "torchao int8":
        layer = QuantizedRankLoRALinear(quantized(kind))
        with pytest.raises(MergeError, match="Int8WeightOnlyConfig"):
            layer.merge_(requantize=True)


def test_a_layer_of_bitsandbytes_that_was_never_quantised():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with pytest.raises(TypeError, match="was never quantised.*Move the model first"):
        QuantizedRankLoRALinear(bnb.nn.Linear4bit(K, N))
