"""What traces or transforms the op: torch.func, forward-mode AD, fake tensors, opcheck. Right, or refused with a reason."""

from __future__ import annotations

import pytest
import torch
from helpers import make_operands, outputs_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import reference
from fastlora.ops import rank_lora_linear, rank_lora_packed

VARIANTS = ("library", "merged", "split")
NAMES = ("x", "lora_a", "lora_b", "gate")


def make(shape=(6,), gate_shape=None):
    """float32 for all variants: the Triton ones take no float64."""
    return make_operands(shape, 5, 4, 3, gate_shape=gate_shape)


def functional(operands, variant, kappa=0.1):
    """ours and the definition as functions of (x, lora_a, lora_b, gate)."""

    def ours(x, lora_a, lora_b, gate):
        weight, bias = operands.weight, operands.bias
        return rank_lora_linear(x, weight, bias, lora_a, lora_b, gate, kappa, 0.5, backend=variant)

    def definition(x, lora_a, lora_b, gate):
        return reference.rank_lora_linear(x, operands.weight, operands.bias, lora_a, lora_b, gate, kappa, 0.5)

    return ours, definition


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_func_grad(variant):
    operands = make()
    ours, definition = (
        torch.func.grad(lambda *t, f=f: f(*t).pow(2).sum(), argnums=(0, 1, 2, 3)) for f in functional(operands, variant)
    )
    assert_close(ours(*operands.trainable()), definition(*operands.trainable()))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("in_dims", [(0, None, None, None), (1, None, None, None), (0, 0, None, 0), (None, 0, 0, 0)])
def test_vmap(variant, in_dims):
    operands = make()
    batched = [
        t if dim is None else torch.stack([t, 2 * t, t + 1], dim) for t, dim in zip(operands.trainable(), in_dims)
    ]
    ours, definition = (torch.func.vmap(f, in_dims) for f in functional(operands, variant))
    assert_close(ours(*batched), definition(*batched))


@pytest.mark.parametrize("variant", VARIANTS)
def test_vmap_of_grad_gives_gradients_of_each_sample(variant):
    operands = make((7, 2))
    ours, definition = (
        torch.func.vmap(torch.func.grad(lambda a, x, f=f: f(x, a, *operands.trainable()[2:]).pow(2).sum()), (None, 0))
        for f in functional(operands, variant)
    )
    assert_close(ours(operands.lora_a, operands.x), definition(operands.lora_a, operands.x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(variant, name):
    operands = make()
    index = NAMES.index(name)
    tangents = [torch.zeros_like(t) for t in operands.trainable()]
    tangents[index] = torch.randn_like(tangents[index])
    ours, definition = (
        torch.func.jvp(f, operands.trainable(), tuple(tangents))[1] for f in functional(operands, variant)
    )
    assert definition.abs().max() > 0.01
    assert_close(ours, definition)


def test_forward_mode_of_row_gates_and_of_packed_projections():
    operands = make((2, 3), gate_shape=(2, 3))
    tangents = tuple(torch.randn_like(t) for t in operands.trainable())
    ours, definition = (torch.func.jvp(f, operands.trainable(), tangents)[1] for f in functional(operands, "split"))
    assert_close(ours, definition)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_over_reverse(variant):
    """Hessian-vector products of the loss in lora_a."""
    operands = make()
    direction = torch.randn_like(operands.lora_a)

    def product(f):
        rest = operands.trainable()[2:]
        gradient = torch.func.grad(lambda a: f(operands.x, a, *rest).pow(3).sum())
        return torch.func.jvp(gradient, (operands.lora_a,), (direction,))[1]

    ours, definition = (product(f) for f in functional(operands, variant))
    assert_close(ours, definition)


@pytest.mark.parametrize("variant", VARIANTS)
def test_double_backward(variant):
    def second(f, operands):
        y = f(*operands.trainable())
        first = torch.autograd.grad(y.pow(2).sum(), operands.trainable(), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), operands.trainable())

    operands = make().requires_grad_()
    ours, definition = (second(f, operands) for f in functional(operands, variant))
    assert_close(ours, definition)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_backward_passes(variant):
    """jacobian(vectorize=True) runs the backward once, on a batch of output gradients."""
    operands = make((3,))
    ours, definition = (
        torch.autograd.functional.jacobian(f, operands.trainable(), vectorize=True)
        for f in functional(operands, variant)
    )
    assert_close(ours, definition)


def test_a_tangent_of_the_frozen_weight_is_refused():
    operands = make()
    with pytest.raises(RuntimeError, match="a tangent of weight or bias was given"):
        torch.func.jvp(
            lambda w: rank_lora_linear(operands.x, w, None, operands.lora_a, operands.lora_b, operands.gate),
            (operands.weight,),
            (operands.weight,),
        )


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_gradient_of_what_is_frozen_is_refused(name):
    operands = make()
    index = 1 if name == "weight" else 2

    def loss(frozen):
        return rank_lora_linear(*operands.tensors()[:index], frozen, *operands.tensors()[index + 1 :]).sum()

    with pytest.raises(RuntimeError, match=f"^{name} requires a gradient; weight and bias .* are frozen"):
        torch.func.grad(loss)(getattr(operands, name))
    with pytest.raises(RuntimeError, match=f"^{name} requires a gradient"):
        loss(getattr(operands, name).requires_grad_(True)).backward()


@pytest.mark.parametrize("needs", [(True,) * 4, (False, False, True, True), (True, False, False, False)])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_of_the_raw_ops(needs, packed):
    operands = make_operands((5,), 8, 6, 3)
    ranks = [1, 0, 2] if packed else None
    x, weight, bias, lora_a, lora_b, gate = operands.tensors()
    lora_b = lora_b[:2].reshape(-1) if packed else lora_b
    kappa, dy, s = torch.tensor(0.1), torch.randn(5, 6), x @ lora_a.t()
    ops = torch.ops.fastlora
    opcheck(ops.rank_lora_fwd, (x, weight, bias, lora_a, lora_b, gate, kappa, 1.0, ranks, "split"))
    arguments = (dy, x, s, weight, lora_a, lora_b, gate, kappa, 1.0, ranks, list(needs), "split")
    opcheck(ops.rank_lora_bwd, arguments)


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kappa", [0.0, "tensor"])
@pytest.mark.parametrize("variant", ["library", "merged", "split"])
def test_nothing_waits_for_the_device(variant, kappa, packed):
    """Under fake tensors a host read raises; none of the ops that read one element is called."""
    with FakeTensorMode(), _Recorder() as recorder:
        op = make_operands((6,), 8, 6, 3).requires_grad_()
        threshold = torch.tensor(0.1) if kappa == "tensor" else kappa
        if packed:
            lists = ([op.lora_a] * 3, [op.lora_b[:2]] * 3, [op.gate] * 3, [threshold] * 3)
            y = rank_lora_packed(op.x, op.weight, op.bias, *lists, backend=variant)
        else:
            y = rank_lora_linear(*op.tensors(), threshold, backend=variant)
        torch.autograd.grad(y.sum(), op.trainable())
    assert recorder.ops and not [name for name in recorder.ops if "_local_scalar_dense" in name or "item" in name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_path_of_a_tracer_gives_what_eager_gives(variant):
    """A dispatch mode sends the call through the custom ops instead of straight to the launchers."""
    operands, dy = make_operands((19,), 24, 17, 4), torch.randn(19, 17)
    eager = outputs_and_gradients(rank_lora_linear, operands, dy, 0.2, 0.5, backend=variant)
    with _Recorder() as recorder:
        traced = outputs_and_gradients(rank_lora_linear, operands, dy, 0.2, 0.5, backend=variant)
    assert all(torch.equal(eager[name], traced[name]) for name in eager)
    assert any("fastlora.rank_lora_bwd" in name for name in recorder.ops) == (variant == "split")
