"""AdamW and the proximal step on the gates, every tensor of an optimizer in one launch.

    m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
    p <- (1 - lr weight_decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)          (arXiv 1711.05101)
    gate <- soft_threshold(gate, kappa);  kept = number of gates != 0                                (arXiv 2412.01004)

Memory-bound: p, m, v are read and written once, g read once, 28 bytes a parameter. Programs find their tensors by
address, in a table; the options of the groups and the steps taken are read from device memory, so that a CUDA graph may
hold the launch.

Numerics: float32 as in torch, whose order of operations is kept. Bias corrections in float64: 1 - 0.9999 in float32 is
off by 2e-4. Deterministic: no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastlora.triton_kernels import common
from fastlora.triton_kernels.aot_cases import CompileCase
from fastlora.triton_kernels.common import soft_threshold
from fastlora.triton_kernels.tiles import TileConfig

# elements of a step of a program: 8 a thread, so two 16-byte loads of each of four tensors are in flight
BLOCK = 1024
TILE = TileConfig(BLOCK, 0, 0, 4, 1)
# columns of the table of addresses and of the options of a group, in the order that fastlora/ops/prox_adamw.py writes
COLUMNS = tl.constexpr(8)
SCALARS = 8
_SCALARS = tl.constexpr(SCALARS)


@triton.jit
def prox_adamw_kernel(
    table_ptr, chunks_ptr, steps_ptr, scalars_ptr, kept_ptr,
    RELEASED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row_ptr = table_ptr + tl.load(chunks_ptr + 3 * pid) * COLUMNS
    first = tl.multiple_of(tl.load(chunks_ptr + 3 * pid + 1), BLOCK)
    last = tl.load(chunks_ptr + 3 * pid + 2)
    grad = tl.load(row_ptr + 1)
    group_ptr = scalars_ptr + tl.load(row_ptr + 6) * _SCALARS
    gate = tl.load(row_ptr + 7)
    param_ptr = _floats(tl.load(row_ptr), ALIGNED)
    if grad != 0:
        step = tl.load(steps_ptr + pid) + 1.0
        # every thread has read the count before one of them writes it
        tl.debug_barrier()
        tl.store(steps_ptr + pid, step)
        _adamw(
            param_ptr, _floats(grad, ALIGNED), _floats(tl.load(row_ptr + 2), ALIGNED),
            _floats(tl.load(row_ptr + 3), ALIGNED), first, last, step.to(tl.float64), group_ptr, BLOCK,
        )  # fmt: skip
    if gate >= 0:
        # a gate tensor has one program, but other threads of it may have written what a thread reads now
        tl.debug_barrier()
        kappa = tl.load(group_ptr + 5).to(tl.float32)
        kept = _threshold_and_count(param_ptr, first, last, kappa, RELEASED, BLOCK)
        tl.store(kept_ptr + gate, kept)


@triton.jit
def _floats(address, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _adamw(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, first, last, step, group_ptr, BLOCK: tl.constexpr):
    lr = tl.load(group_ptr)
    beta1 = tl.load(group_ptr + 1)
    beta2 = tl.load(group_ptr + 2)
    bias1 = 1.0 - tl.exp(step * tl.load(group_ptr + 6))
    bias2 = 1.0 - tl.exp(step * tl.load(group_ptr + 7))
    decay = (1.0 - lr * tl.load(group_ptr + 4)).to(tl.float32)
    eps = tl.load(group_ptr + 3).to(tl.float32)
    minus_step_size = (-(lr / bias1)).to(tl.float32)
    bias2_sqrt = tl.sqrt(bias2).to(tl.float32)
    for start in range(first, last, BLOCK):
        if start + BLOCK <= last:  # without a mask, 16 bytes at a time
            _adamw_block(
                param_ptr + start, grad_ptr + start, exp_avg_ptr + start, exp_avg_sq_ptr + start, BLOCK,
                beta1, beta2, decay, eps, minus_step_size, bias2_sqrt, False, BLOCK,
            )  # fmt: skip
        else:
            _adamw_block(
                param_ptr + start, grad_ptr + start, exp_avg_ptr + start, exp_avg_sq_ptr + start, last - start,
                beta1, beta2, decay, eps, minus_step_size, bias2_sqrt, True, BLOCK,
            )  # fmt: skip


@triton.jit
def _adamw_block(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, count, beta1, beta2, decay, eps, minus_step_size, bias2_sqrt,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.arange(0, BLOCK)
    mask = offs < count if MASKED else None
    g = tl.load(grad_ptr + offs, mask=mask)
    m = tl.load(exp_avg_ptr + offs, mask=mask)
    v = tl.load(exp_avg_sq_ptr + offs, mask=mask)
    p = tl.load(param_ptr + offs, mask=mask) * decay
    weight1 = (1.0 - beta1).to(tl.float32)
    # torch.lerp: from the end that is nearer
    m = tl.where(weight1 < 0.5, m + weight1 * (g - m), g - (1.0 - weight1) * (g - m))
    v = v * beta2.to(tl.float32) + (1.0 - beta2).to(tl.float32) * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), bias2_sqrt) + eps
    tl.store(exp_avg_ptr + offs, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v, mask=mask)
    tl.store(param_ptr + offs, p + tl.div_rn(minus_step_size * m, denominator), mask=mask)


@triton.jit
def _threshold_and_count(gate_ptr, first, last, kappa, RELEASED: tl.constexpr, BLOCK: tl.constexpr):
    kept = tl.zeros((BLOCK,), dtype=tl.int64)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < last
        gate = tl.load(gate_ptr + offs, mask=mask, other=0.0)
        if RELEASED:
            gate = _released_threshold(gate, kappa)
        else:
            gate = soft_threshold(gate, kappa)
        tl.store(gate_ptr + offs, gate, mask=mask)
        kept += tl.where(mask & (gate != 0.0), 1, 0)  # a NaN is no zero
    return tl.sum(kept, axis=0)


@triton.jit
def _released_threshold(gate, kappa):
    shrunk = tl.where(gate > 0, gate - kappa, gate + kappa)
    moved = tl.where(tl.abs(gate) > kappa, shrunk, gate)
    return tl.where(tl.abs(moved) < kappa, 0.0, moved)


def prox_adamw(
    table: torch.Tensor, chunks: torch.Tensor, steps: torch.Tensor, scalars: torch.Tensor, kept: torch.Tensor,
    *, released: bool, aligned: bool,
) -> None:  # fmt: skip
    """Step in place everything that the table points to.

    Args:
        table: [tensors, COLUMNS] int64: addresses of param, grad (0: thresholded alone), exp_avg, exp_avg_sq, step
            (not read), then numel, group, place among the gates or -1. Contiguous float32 behind every address.
        chunks: [programs, 3] int64: row of the table, first and last element. All of a gate tensor is one program's.
        steps: [programs] float32: steps taken; each program counts on.
        scalars: [groups, SCALARS] float64: lr, beta1, beta2, eps, weight_decay, kappa, log beta1, log beta2.
        kept: [gate tensors] int64, written.
        released: the operator.
        aligned: every address is a multiple of 16.
    """
    if len(chunks) == 0:
        return
    with common.on_device(table):
        prox_adamw_kernel[(len(chunks),)](
            table_ptr=table, chunks_ptr=chunks, steps_ptr=steps, scalars_ptr=scalars, kept_ptr=kept, RELEASED=released,
            ALIGNED=aligned, BLOCK=BLOCK, **TILE.launch,
        )  # fmt: skip


def compile_cases(arch: str, compute: str) -> Iterator[CompileCase]:
    """Both operators, for aligned addresses and for others. State is float32 whatever the layers compute in."""
    if compute != "fp32":
        return
    pointers = {"table_ptr": "*i64", "chunks_ptr": "*i64", "steps_ptr": "*fp32", "scalars_ptr": "*fp64"}
    pointers["kept_ptr"] = "*i64"
    for released in (False, True):
        for aligned in (True, False):
            label = f"prox adamw {'released' if released else 'exact'}"
            constants = {"RELEASED": released, "ALIGNED": aligned, "BLOCK": BLOCK}
            odd = () if aligned else ("addresses",)
            yield CompileCase(prox_adamw_kernel, label, compute, 0, pointers, constants, TILE, odd)
