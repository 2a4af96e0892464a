import copy
import io
import pickle

import pytest
import torch
from helpers import (
    Operands,
    assert_as_exact_as_torch,
    make_operands,
    outputs_and_gradients,
    reference_in,
    relative_error,
)
from torch import nn

import fastlora
from fastlora.modules import FusedRankLoRAConv1D

pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
Conv1D = pytorch_utils.Conv1D


def conv1d(k=12, n=20, dtype=torch.float32):
    plain = Conv1D(n, k)
    plain.weight.data.normal_(std=k**-0.5)
    plain.bias.data.normal_()
    return plain.to(dtype)


def trained(rank=4, k=12, n=20, dtype=torch.float32, **options):
    layer = FusedRankLoRAConv1D(conv1d(k, n, dtype), rank, **options)
    layer.lora_b.data.normal_()
    return layer


def test_it_takes_over_the_storage_and_gives_it_back():
    plain, x = conv1d(), torch.randn(3, 5, 12)
    weight, bias, before = plain.weight, plain.bias, plain(x)
    layer = FusedRankLoRAConv1D(plain, 4)
    assert list(layer.state_dict()) == ["weight", "bias", "lora_a", "lora_b", "gate"]
    assert layer.state_dict()["weight"].shape == (12, 20)  # as it was
    assert layer.weight.shape == (20, 12) and layer.weight.data_ptr() == weight.data_ptr()
    assert layer.lora_a.shape == (4, 12) and layer.lora_b.shape == (20, 4)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_a", "lora_b", "gate"}
    torch.testing.assert_close(layer(x), before)
    again = layer.eval().to_plain()
    assert again is plain and not again.training and again.weight is weight and again.bias is bias
    assert torch.equal(again(x), before) and list(again.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("backend", ["torch", "split", "one_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_through_the_transposed_view(backend, dtype):
    operands, dy = make_operands((7,), 24, 40, 3, dtype), torch.randn(7, 40).to(dtype)
    stored = operands.weight.t().contiguous()
    ours = Operands(operands.x, stored.t(), *operands.tensors()[2:])
    outputs = outputs_and_gradients(fastlora.ops.rank_lora_linear, ours, dy, 0.2, 0.5, backend=backend)
    truth = reference_in(torch.float64, operands, dy, 0.2, 0.5)
    assert_as_exact_as_torch(outputs, reference_in(dtype, operands, dy, 0.2, 0.5), truth, dtype)


def test_merge_writes_the_stored_weight_in_place_and_unmerge_takes_it_out_again():
    layer, x = trained(kappa=0.1, scaling=0.5, dtype=torch.bfloat16), torch.randn(9, 12)
    stored, before = layer.state_dict()["weight"], layer.state_dict()["weight"].clone()
    adapters = [layer.lora_a.clone(), layer.lora_b.clone(), layer.gate.clone()]
    expected = before.float() + layer.delta_weight().t()
    residuals = {}
    model = nn.Sequential(layer)
    fastlora.merge(model, residuals=residuals)
    assert torch.equal(stored, expected.to(torch.bfloat16)) and layer.active_rank() <= 4
    for parameter, value in zip((layer.lora_a, layer.lora_b, layer.gate), adapters):
        parameter.data.copy_(value)
    fastlora.unmerge(model, residuals=residuals)
    assert torch.equal(stored, before)
    for parameter, value in zip((layer.lora_a, layer.lora_b, layer.gate), adapters):
        parameter.data.copy_(value)
    layer.merge_()
    plain = fastlora.remove(model)[0]
    assert type(plain) is Conv1D and torch.equal(plain.weight, expected.to(torch.bfloat16))
    assert relative_error(plain(x.bfloat16()), x @ expected + plain.bias.float()) < 0.01


def test_it_follows_to_and_copies_and_pickles():
    layer, x = trained(), torch.randn(4, 12)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y) and twin.weight.data_ptr() != layer.weight.data_ptr()
        assert twin.to_plain().weight.shape == (12, 20)
    half = copy.deepcopy(layer).half()
    assert half.weight.dtype == half.bias.dtype == torch.float16 and half.gate.dtype == torch.float32
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    for assign in (False, True):
        other = FusedRankLoRAConv1D(conv1d(), 2)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
        assert torch.equal(other(x), y)


def test_inject_compile_and_explain():
    torch.compiler.reset()
    model, x = nn.Sequential(conv1d(), nn.ReLU(), conv1d(20, 12)), torch.randn(4, 12)
    assert fastlora.inject(model, rank=4, where=["*"]).names == ("0", "2")
    model[0].lora_b.data.normal_()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert relative_error(compiled(x), model(x)) < 1e-6
    assert str(fastlora.explain(model[0], x)).startswith("torch (library)")
    with pytest.raises(ValueError, match="0 is adapted already"):
        fastlora.inject(model, rank=4, where=["0"])


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    class Doubled(Conv1D):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4))
    with pytest.raises(TypeError, match="0 is a Doubled with a forward of its own"):
        fastlora.inject(model, rank=2, where=["0"])
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), conv1d(4, 4)], ids=["linear", "conv1d"])
def test_an_instance_with_a_forward_of_its_own_is_refused(layer):
    layer.forward = lambda x, plain=layer.forward: plain(x.to(layer.weight.device))  # as accelerate's hooks do
    with pytest.raises(
        TypeError, match="0 is a .* with a forward of its own .if from a device_map: load the model on one device"
    ):
        fastlora.inject(nn.Sequential(layer), rank=2, where=["0"])
