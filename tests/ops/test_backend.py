import pytest
import torch
from helpers import make_operands

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.ops import backend, rank_lora_linear
from fastlora.ops.backend import choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "gate_shape", "variant"),
    [
        (CPU, torch.float32, (4,), "library"),
        (CUDA, torch.bfloat16, (4,), "triton"),
        (CUDA, torch.float64, (4,), "library"),
        (CUDA, torch.float32, (2, 4), "triton"),
        (CUDA, torch.float32, (257,), "library"),
    ],
)
def test_the_rule_of_auto(device, dtype, gate_shape, variant):
    assert choose("auto", device, dtype, gate_shape).variant == variant


@pytest.mark.parametrize(
    ("name", "backend", "variant"),
    [
        ("torch", "torch", "library"),
        ("library", "torch", "library"),
        ("merged", "torch", "merged"),
        ("triton", "triton", "triton"),
        ("split", "triton", "split"),
        ("one_pass", "triton", "one_pass"),
        ("leader", "triton", "leader"),
        ("leader_tma", "triton", "leader_tma"),
    ],
)
def test_names_of_backends_and_variants(name, backend, variant):
    choice = choose(name, CPU, torch.float32, (4,))  # the tests run Triton's interpreter
    assert (choice.backend, choice.variant, choice.reason[:8]) == (backend, variant, "asked fo")


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "gate_shape", "message"),
    [
        ("triton", CPU, torch.float64, (4,), '"triton" was asked for but its kernels take float16'),
        ("split", CPU, torch.float32, (257,), "ranks up to 256, and this one is 257"),
        ("triton", torch.device("meta"), torch.float32, (4,), "the tensors are on meta"),
        ("one_pass", CPU, torch.float32, (65,), "all ranks in registers, up to 64, and this one has 65"),
        ("leader", CPU, torch.float32, (7, 65), "all ranks in registers, up to 64, and this one has 65"),
        ("leader_tma", CPU, torch.float16, (65,), "all ranks in registers, up to 64, and this one has 65"),
        ("merged", CPU, torch.float32, (2, 4), "one merged weight cannot hold a gate of one row a sample"),
    ],
)
def test_what_is_asked_for_by_name_runs_or_raises(backend, device, dtype, gate_shape, message):
    with pytest.raises(RuntimeError, match=message):
        choose(backend, device, dtype, gate_shape)


def test_the_op_refuses_with_the_same_reason():
    with pytest.raises(RuntimeError, match="up to 64, and this one has 70"):
        rank_lora_linear(*make_operands((3,), 8, 8, 70).tensors(), backend="one_pass")


def test_explain_of_a_layer():
    layer = FusedRankLoRALinear(4, 4, rank=2)
    assert fastlora.explain(layer).backend == "torch"
    assert "tensors are on cpu" in str(fastlora.explain(layer))
    assert str(fastlora.explain(layer, backend="merged")).startswith("torch (merged): asked for by name; rounds")
    layer = FusedRankLoRALinear(4, 4, rank=2, dropout=0.1)
    assert "dropout" in fastlora.explain(layer).reason
    assert fastlora.explain(layer.eval()).variant == "library"


def test_explain_of_a_call_names_variant_tile_and_what_was_not_measured():
    operands = make_operands((3,), 4, 4, 2)
    choice = fastlora.explain(*operands.tensors(), backend="triton")
    assert choice.backend == "triton" and choice.variant == "split" and choice.tile
    assert "not measured on this device" in str(choice)
    layer = FusedRankLoRALinear(4, 4, rank=2, backend="one_pass")
    choice = fastlora.explain(layer, operands.x)
    assert (choice.variant, choice.reason) == ("one_pass", "asked for by name") and choice.tile in str(choice)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.nn.Linear(2, 2),), "a Linear has no gate, backend"),
        (("layer",), "a str was given; a layer or the operands"),
        ((torch.ones(2, 2), torch.ones(2, 2)), "2 operands were given; explain takes all six"),
        ((torch.ones(2, 2), None, None, None, None, None), "weight or gate is None; only bias may be"),
    ],
)
def test_explain_refuses(arguments, message):
    with pytest.raises(TypeError, match=message):
        fastlora.explain(*arguments)


def test_limits_are_those_of_the_kernels():
    """ops/backend.py writes them down again, since it must not import Triton."""
    pytest.importorskip("triton")
    from fastlora.triton_kernels import common, tiles

    assert (backend.TRITON_MAX_RANK, backend.ONE_PASS_MAX_RANK) == (common.MAX_RANK, tiles.ONE_PASS_MAX_RANK)
