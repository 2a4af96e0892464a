"""What several test files share: operands, the float64 oracle, and limits taken from PyTorch in the same dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora import reference


@dataclass
class Operands:
    """Operands of one call of rank_lora_linear, scaled so that outputs are near 1."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    gate: Tensor

    def double(self) -> Operands:
        return Operands(*(None if t is None else t.detach().double() for t in self.tensors()))

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.x, self.weight, self.bias, self.lora_a, self.lora_b, self.gate)

    def trainable(self) -> tuple[Tensor, ...]:
        return (self.x, self.lora_a, self.lora_b, self.gate)

    def requires_grad_(self) -> Operands:
        for tensor in self.trainable():
            tensor.requires_grad_(True)
        return self


def make_operands(shape, k, n, r, dtype=torch.float32, *, bias=True, gate_shape=None, adapter_dtype=None) -> Operands:
    """`shape` is x's leading shape; values of every operand are exact in `dtype`."""
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(*shape, k).to(dtype)
    weight = (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype)
    lora_a = (torch.randn(r, k) / max(k, 1) ** 0.5).to(adapter_dtype)
    lora_b = (torch.randn(n, r) / max(r, 1) ** 0.5).to(adapter_dtype)
    gate = torch.randn(gate_shape or (r,))
    gate = gate.double() if dtype == torch.float64 else gate
    return Operands(x, weight, torch.randn(n).to(dtype) if bias else None, lora_a, lora_b, gate)


def outputs_and_gradients(
    op, operands: Operands, dy: Tensor, kappa: float, scaling: float, **kwargs
) -> dict[str, Tensor]:
    """y and every gradient of `op`, by name."""
    operands = Operands(*(None if t is None else t.detach().clone() for t in operands.tensors())).requires_grad_()
    y = op(*operands.tensors(), kappa, scaling, **kwargs)
    gradients = torch.autograd.grad(y, operands.trainable(), dy.to(y.dtype))
    return dict(zip(("y", "dx", "dlora_a", "dlora_b", "dgate"), (y.detach(), *gradients)))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """||value - truth|| / ||truth|| in float64; the norm itself where the truth is zero."""
    value, truth = value.detach(), truth.detach()
    difference = float((value.double() - truth.double()).norm())
    norm = float(truth.double().norm())
    return difference / norm if norm else difference


def assert_as_exact_as_torch(ours: dict, plain: dict, truth: dict, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of the same formula in PyTorch in the same dtype.

    The floor matters only where PyTorch happens to hit the truth: an eighth of the dtype's epsilon, plus 4 float32
    roundings for sums in another order; of less than 16 elements, half an epsilon: one rounding of s, that no other
    elements average out.
    """
    for name, exact in truth.items():
        floor = torch.finfo(dtype).eps / (8 if exact.numel() >= 16 else 2) + 4 * torch.finfo(torch.float32).eps
        limit = 2 * relative_error(plain[name], exact) + floor
        error = relative_error(ours[name], exact)
        assert error <= limit, f"{name}: error {error:.3g} is over the limit {limit:.3g}"


def reference_in(dtype: torch.dtype, operands: Operands, dy: Tensor, kappa: float, scaling: float) -> dict[str, Tensor]:
    """The definition run in `dtype` with the same operand values."""
    if dtype == torch.float64:
        operands, dy = operands.double(), dy.double()
    return outputs_and_gradients(reference.rank_lora_linear, operands, dy, kappa, scaling)


def run(capsys, *arguments):
    """A command of `fastlora`: (exit code, stdout, stderr); stderr never holds a traceback."""
    from fastlora import cli

    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err
