import pytest
import torch
from helpers import make_operands

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.ops.backend import choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_rule_of_auto():
    assert choose("auto", CPU, torch.float32, (4,)).backend == "torch"
    assert choose("auto", CUDA, torch.bfloat16, (4,)).backend == "triton"
    assert choose("auto", CUDA, torch.float64, (4,)).backend == "torch"
    assert choose("auto", CUDA, torch.float32, (2, 4)).backend == "torch"
    assert choose("auto", CUDA, torch.float32, (257,)).backend == "torch"


def test_a_backend_asked_for_by_name_runs_or_raises():
    assert choose("triton", CPU, torch.float32, (4,)).backend == "triton"  # the tests run Triton's interpreter
    with pytest.raises(RuntimeError, match='"triton" was asked for but its kernels take float16'):
        choose("triton", CPU, torch.float64, (4,))
    with pytest.raises(RuntimeError, match="one row a sample or token"):
        choose("triton", CPU, torch.float32, (2, 4))
    with pytest.raises(RuntimeError, match="ranks up to 256, and this one is 257"):
        choose("triton", CPU, torch.float32, (257,))
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        choose("triton", torch.device("meta"), torch.float32, (4,))


def test_explain_of_a_layer_and_of_a_call():
    layer = FusedRankLoRALinear(4, 4, rank=2)
    assert fastlora.explain(layer).backend == "torch"
    assert "tensors are on cpu" in str(fastlora.explain(layer))
    assert fastlora.explain(*make_operands((3,), 4, 4, 2).tensors(), backend="triton").backend == "triton"
    layer = FusedRankLoRALinear(4, 4, rank=2, dropout=0.1)
    assert "dropout" in fastlora.explain(layer).reason
    with pytest.raises(TypeError, match="a Linear has no gate, backend"):
        fastlora.explain(torch.nn.Linear(2, 2))
