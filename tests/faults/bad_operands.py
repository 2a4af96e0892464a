"""Operands of a call that do not fit, that are easily forgotten, or that have no data."""

from __future__ import annotations

import torch
from faults.case import Outcome, group
from faults.judge import content, harm, refused, right, short, their_refusal, worst
from faults.models import RANK, Block, K, N, operands, ours, theirs, trained
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora import FusedRankLoRALinear, reference
from fastlora.ops import rank_lora_linear
from fastlora.optim import ProxAdamW

bad_input = group("bad input")
NAN, INF = float("nan"), float("inf")


# ---- operands that do not fit


@bad_input("an error with the shape that was given and the width that is taken")
def input_of_another_width() -> Outcome:
    """x is one column too wide."""
    layer = trained()
    return refused(lambda: layer(torch.randn(4, K + 1)), "x has shape [4, 7]", "[..., 6]", keeps=[layer])


@input_of_another_width.peft
def _() -> Outcome:
    model = theirs()
    return their_refusal(lambda: model(torch.randn(4, K + 1)), "4x7", keeps=[model])


@bad_input("an error that names the dtype and what to do")
def input_of_integers() -> Outcome:
    """x is int64, plainly and under autocast."""
    layer, x = trained(), torch.ones(4, K, dtype=torch.int64)

    def with_autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(x)

    return worst(refused(work, "x has dtype torch.int64", "x.to(") for work in (lambda: layer(x), with_autocast))


@input_of_integers.peft
def _() -> Outcome:
    model, x = theirs(), torch.ones(4, K, dtype=torch.int64)
    return their_refusal(lambda: model(x), "dtype")


@bad_input("an error with both dtypes")
def half_precision_into_float32() -> Outcome:
    """x is float16, the weight float32."""
    layer = trained()
    return refused(lambda: layer(torch.randn(4, K).half()), "torch.float32 and x has torch.float16", "autocast")


@half_precision_into_float32.peft
def _() -> Outcome:
    return their_refusal(lambda: theirs()(torch.randn(4, K).half()), "dtype")


@bad_input("an error that names both devices")
def operands_on_different_devices() -> Outcome:
    """x, or one operand, is on the meta device and the rest on the CPU."""
    layer = trained()
    names = ("weight", "bias", "lora_a", "lora_b", "gate")
    shapes = dict(zip(names, ((N, K), (N,), (RANK, K), (N, RANK), (RANK,))))
    calls = [lambda: layer(torch.randn(4, K, device="meta"))]
    for name in names:
        call = operands(**{name: torch.empty(shapes[name], device="meta")})
        calls.append(lambda call=call: rank_lora_linear(*call))
    return worst(refused(call, "is on meta", "on cpu") if i else refused(call, "x is on meta")
                 for i, call in enumerate(calls))  # fmt: skip


@operands_on_different_devices.peft
def _() -> Outcome:
    return their_refusal(lambda: theirs()(torch.randn(4, K, device="meta")), "device")


@bad_input("an error that names what was given")
def no_tensor_for_a_tensor() -> Outcome:
    """A list for x, a float for the weight, None for the gate."""
    layer = trained()
    return worst(
        [
            refused(lambda: layer([[1.0] * K]), "x is a list", "torch.Tensor"),
            refused(lambda: rank_lora_linear(*operands(weight=3.0)), "weight is a float", "torch.Tensor"),
            refused(lambda: rank_lora_linear(*operands(gate=None)), "gate is a NoneType", "torch.Tensor"),
        ]
    )


@no_tensor_for_a_tensor.peft
def _() -> Outcome:
    return their_refusal(lambda: theirs()([[1.0] * K]), "list", "Tensor")


@bad_input("an error that names operand, shape and the shape that fits")
def operands_that_do_not_fit_each_other() -> Outcome:
    """weight, bias, lora_a, lora_b or gate of another shape."""
    wrong = {
        "weight": torch.randn(N),
        "bias": torch.randn(N + 1),
        "lora_a": torch.randn(RANK, K + 1),
        "lora_b": torch.randn(N, RANK + 1),
        "gate": torch.randn(RANK + 1),
    }
    return worst(
        refused(lambda name=name, value=value: rank_lora_linear(*operands(**{name: value})), f"{name} has shape", "[")
        for name, value in wrong.items()
    )


@bad_input("an error that says what to pass")
def nested_input() -> Outcome:
    """Samples of different lengths as one nested tensor."""
    layer, parts = trained(), [torch.randn(2, K), torch.randn(3, K)]
    given = [torch.nested.nested_tensor(parts, layout=layout) for layout in (torch.strided, torch.jagged)]
    return worst(refused(lambda x=x: layer(x), "x is a nested tensor", "to_padded_tensor") for x in given)


@nested_input.peft
def _() -> Outcome:
    model, parts = theirs(), [torch.randn(2, K), torch.randn(3, K)]
    try:
        found = model(torch.nested.nested_tensor(parts)).unbind()
    except Exception as error:
        return Outcome("unclear error", short(error))
    return right(all(torch.allclose(y, model(x), atol=1e-5) for y, x in zip(found, parts)), "another result")


# ---- shapes and values that are legal and easily forgotten


def _matches_contiguous(call, x: torch.Tensor) -> bool:
    return torch.allclose(call(x), call(x.contiguous()), atol=1e-6)


def _strange_strides() -> list[torch.Tensor]:
    return [
        torch.randn(K, 4).t(),
        torch.randn(8, 2 * K)[::2, ::2],
        torch.randn(1, K).expand(4, K),
        torch.randn(4, 1).expand(4, K),
        torch.randn(40).as_strided((4, K), (3, 2)),
    ]


@bad_input("the result of the contiguous copy")
def input_of_strange_strides() -> Outcome:
    """Transposed, sliced, broadcast along rows or columns (stride 0), overlapping."""
    layer = trained()
    return worst(right(_matches_contiguous(layer, x), f"strides {x.stride()} change y") for x in _strange_strides())


@input_of_strange_strides.peft
def _() -> Outcome:
    model = theirs()
    return worst(right(_matches_contiguous(model, x), f"strides {x.stride()} change y") for x in _strange_strides())


def _zero_rows(model) -> Outcome:
    x = torch.randn(0, K, requires_grad=True)
    y = model(x)
    y.sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return right(y.shape == (0, N) and not any(g.any() for g in grads), "gradients of nothing are not zero")


@bad_input("an empty result and gradients of zero")
def input_of_zero_rows() -> Outcome:
    """x has no rows; forward and backward."""
    return _zero_rows(ours())


@input_of_zero_rows.peft
def _() -> Outcome:
    return _zero_rows(theirs())


@bad_input("the float64 reference, forward and backward", few=6, many=257)
def one_row_and_any_rank(count: int) -> Outcome:
    """M = 1 and ranks from 1 to 257, spread evenly where fewer are tried."""
    ranks = sorted({1 + i * 256 // max(count - 1, 1) for i in range(count)})
    bad = []
    for rank in ranks:
        given = operands(1, lora_a=torch.randn(rank, K), lora_b=torch.randn(N, rank), gate=torch.randn(rank))
        leaves = [given[i].requires_grad_() for i in (0, 3, 4, 5)]
        found = torch.autograd.grad(rank_lora_linear(*given, 0.2, 0.5).sum(), leaves)
        exact = [tensor.detach().double() for tensor in given]
        leaves = [exact[i].requires_grad_() for i in (0, 3, 4, 5)]
        expected = torch.autograd.grad(reference.rank_lora_linear(*exact, 0.2, 0.5).sum(), leaves)
        if not all(torch.allclose(a.double(), b, atol=1e-3, rtol=1e-4) for a, b in zip(found, expected)):
            bad.append(rank)
    return right(not bad, f"wrong at ranks {bad[:5]}", ranks=len(ranks))


def _spreads(model) -> Outcome:
    x = torch.randn(4, K)
    x[1, 2], x[2, 0] = NAN, INF
    y = model(x)
    return right(y[[0, 3]].isfinite().all() and not y[[1, 2]].isfinite().all(1).any(), "another row is spoilt, or none")


@bad_input("NaN in those rows alone")
def input_that_is_not_finite() -> Outcome:
    """A NaN in one row of x, an infinity in another."""
    return _spreads(trained())


@input_that_is_not_finite.peft
def _() -> Outcome:
    return _spreads(theirs(torch.nn.Sequential(torch.nn.Linear(K, N)), where=["0"]))


# ---- tensors without data, and half precision


@bad_input("the shapes of the outputs")
def tensors_without_data() -> Outcome:
    """A layer on the meta device, and one under FakeTensorMode."""
    layer = FusedRankLoRALinear(K, N, RANK, device="meta")
    shapes = [layer(torch.empty(4, K, device="meta")).shape]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shapes.append(trained()(mode.from_tensor(torch.randn(4, K))).shape)
    return right(all(shape == (4, N) for shape in shapes), f"shapes {shapes}")


@tensors_without_data.peft
def _() -> Outcome:
    model = theirs()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = model(mode.from_tensor(torch.randn(4, K))).shape
    return right(fake == model.to("meta")(torch.empty(4, K, device="meta")).shape == (4, N), "other shapes")


@bad_input("the gates stay float32, bit for bit, and shrink by every step")
def gates_through_half() -> Outcome:
    """model.half(): float16(0.3) - 1e-4 rounds back to float16(0.3), so that a proximal step would never end."""
    model = ours(gate_init="ones")
    for layer in (model[0], model[2]):
        layer.gate.data.fill_(0.3)
    gates = [content(layer.gate) for layer in (model[0], model[2])]
    model.half()
    if [content(layer.gate) for layer in (model[0], model[2])] != gates:
        return harm("gates were rounded")
    optimizer = ProxAdamW(model, lr=0.0)
    optimizer.kappa = 1e-4
    for parameter in fastlora.adapter_parameters(model):
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(10):
        optimizer.step()
    return right(torch.allclose(model[0].gate, torch.full((RANK,), 0.299)), f"gates are {model[0].gate.tolist()}")


@bad_input("the weights of a half-precision model stay as they are, bit for bit")
def forward_in_half_precision() -> Outcome:
    """A forward and a backward of an attention and of linear layers in bfloat16."""
    model = Block().bfloat16()
    fastlora.inject(model, RANK, where=["*attn", "*fc"])
    for _, adapter in fastlora.adapters(model):
        adapter.lora_b.data.normal_(std=0.1)
    return _weights_stay(model)


@forward_in_half_precision.peft
def _() -> Outcome:
    model = theirs(Block().bfloat16(), where=["attn", "fc"], size=0.1)
    return _weights_stay(model)


def _weights_stay(model: torch.nn.Module) -> Outcome:
    before = _frozen(model)
    model(torch.randn(2, 7, 16).to(torch.bfloat16)).float().square().sum().backward()
    after = _frozen(model)
    changed = sum(int((after[name] != old).sum()) for name, old in before.items())
    share = changed / sum(old.numel() for old in before.values())
    return right(changed == 0, f"{share:.1%} of the frozen entries changed", changed=changed)


def _frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
