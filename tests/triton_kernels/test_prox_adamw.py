"""What the one-launch kernel does to memory: launches, reads and writes, programs, addresses, graphs."""

from __future__ import annotations

import pytest
import torch

from fastlora.ops.prox_adamw import OneLaunch
from fastlora.optim import ProxAdamW
from fastlora.reference import soft_threshold
from fastlora.triton_kernels import is_interpreted
from fastlora.triton_kernels.prox_adamw import BLOCK

if not is_interpreted() and not torch.cuda.is_available():
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.9999), "eps": 1e-8, "weight_decay": 0.0}


def optimizer_of(shapes, gate_shapes, device="cpu", dtype=torch.float32):
    """params, groups, state, launch; every parameter has a gradient."""
    params = [torch.nn.Parameter(torch.randn(s, device=device, dtype=dtype)) for s in (*shapes, *gate_shapes)]
    for p in params:
        p.grad = torch.randn_like(p)
    directions, gates = params[: len(shapes)], params[len(shapes) :]
    groups = [{"params": directions, **OPTIONS}, {"params": gates, "prox": True, "kappa": 0.02, **OPTIONS}]
    return params, groups, {p: {} for p in params}, OneLaunch("exact", "triton")


@pytest.mark.skipif(not is_interpreted(), reason="counts in the interpreter")
def test_one_launch_reads_and_writes_everything_once(reads, writes, launches):
    params, groups, state, launch = optimizer_of([(3, BLOCK), (BLOCK + 1,), (1,)], [(16,)])
    assert launch.step(groups, state)
    assert launches == ["prox_adamw_kernel"]
    for p in params[:3]:
        assert reads(p) == reads(p.grad) == reads(state[p]["exp_avg"]) == reads(state[p]["exp_avg_sq"]) == {1}
        assert writes(p) == writes(state[p]["exp_avg"]) == writes(state[p]["exp_avg_sq"]) == {1}
    assert writes(params[3]) == {2}, "AdamW and the threshold"
    assert writes(launch.kept) == {1}


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 7])
def test_blocks_meet_without_a_gap(size):
    """Directions and gates: a gate tensor of several blocks has one program, which counts all of it."""
    params, groups, state, launch = optimizer_of([(size,)], [(size,)])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    plain = torch.optim.AdamW(twins, **OPTIONS)
    for _ in range(2):
        for p, q in zip(params, twins):
            p.grad, q.grad = (g := torch.randn(p.shape)), g.clone()
        launch.step(groups, state)
        plain.step()
        gate = twins[1].data
        gate.copy_(torch.where(gate.abs() <= 0.02, 0.0, gate - gate.sign() * 0.02))
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert launch.kept.tolist() == [int(torch.count_nonzero(params[1]))]


@pytest.mark.parametrize("first", [1, 4], ids=["not aligned", "aligned"])
@pytest.mark.parametrize("size", [20, BLOCK - 1, BLOCK, BLOCK + BLOCK - 3])
def test_nothing_beside_a_parameter_is_written(first, size):
    params, groups, state, launch = optimizer_of([(size,)], [(4,)])
    buffers = [torch.randn(first + size + 16) for _ in range(4)]
    inside, twin = slice(first, first + size), torch.nn.Parameter(buffers[0][first : first + size].clone())
    params[0].data, twin.grad = buffers[0][inside], buffers[1][inside].clone()
    params[0].grad = buffers[1][inside]
    for buffer in buffers[2:]:
        buffer[inside] = 0.0
    state[params[0]] = {"step": torch.tensor(0.0), "exp_avg": buffers[2][inside], "exp_avg_sq": buffers[3][inside]}
    around = [buffer.clone() for buffer in buffers]
    launch.step(groups, state)
    torch.optim.AdamW([twin], **OPTIONS).step()
    torch.testing.assert_close(params[0], twin, rtol=1e-6, atol=1e-6)
    for buffer, before in zip(buffers, around):
        before[inside] = buffer[inside]
        assert buffer.equal(before)


def test_every_program_counts_its_steps_and_the_state_shows_them():
    params, groups, state, launch = optimizer_of([(3 * BLOCK + 1,), (0,)], [(16,)])
    for step in range(1, 4):
        launch.step(groups, state)
        assert [float(state[p]["step"]) for p in params] == [step] * 3
        assert launch._runner._steps.tolist() == [step] * 6
    # counts survive a new table
    params[0].grad = None
    launch.step(groups, state)
    params[0].grad = torch.ones_like(params[0])
    launch.step(groups, state)
    assert [float(state[p]["step"]) for p in params] == [4, 5, 5]
    assert launch._runner._steps.tolist() == [4] * 4 + [5] * 2


class Capturing:
    """A capture as the runner sees it, without a device."""

    def __init__(self, monkeypatch):
        self.active = False
        monkeypatch.setattr("fastlora.ops.prox_adamw_triton._is_capturing", lambda device: self.active)


@pytest.fixture
def capture(monkeypatch):
    return Capturing(monkeypatch)


def test_a_capture_keeps_its_tables_alive_and_leaves_them_as_they_are(capture):
    params, groups, state, launch = optimizer_of([(30,)], [(8,)])
    launch.step(groups, state)
    capture.active, spare = True, launch._runner._spares[-1]
    held = [p.grad for p in params]
    for p in params:
        p.grad = torch.randn_like(p)  # a capture allocates its gradients in a pool of its own
    launch.step(groups, state)
    runner = launch._runner
    table, bits = runner._table, runner._table.tolist()
    capture.active = False
    for p, g in zip(params, held):
        p.grad = g
    launch.step(groups, state)
    assert runner._table is not table and any(t is table for t in runner._captured)
    assert table.tolist() == bits
    assert any(t is spare for t in runner._captured), "what a replay copies from"
    assert any(t is runner._scalars for t in runner._captured) and any(t is runner._steps for t in runner._captured)


def test_what_a_capture_cannot_hold_is_refused(capture):
    params, groups, state, launch = optimizer_of([(30,)], [(8,)])
    capture.active = True
    with pytest.raises(RuntimeError, match="no table of these tensors.* take a step outside of the capture first"):
        launch.step(groups, state)
    assert all(not entry for entry in state.values()), "state made during a capture would be zeroed at every replay"
    capture.active = False
    launch.step(groups, state)
    capture.active = True
    groups[1]["kappa"] = 0.03
    with pytest.raises(RuntimeError, match=r"changed since its last step.*write_scalars\(\) before the capture"):
        launch.step(groups, state)
    capture.active = False
    launch.write_scalars(groups)
    capture.active = True
    launch.step(groups, state)
    held = []
    with pytest.raises(RuntimeError, match="moved in each of 16 captured steps.* take a step outside of a capture"):
        for _ in range(17):
            held += [p.grad for p in params]
            for p in params:
                p.grad = torch.randn_like(p)
            launch.step(groups, state)
    assert len(held) == 2 * 17


def test_scalars_are_written_only_when_they_change(capture, monkeypatch):
    params, groups, state, launch = optimizer_of([(30,)], [(8,)])
    launch.step(groups, state)
    scalars, copies = launch._runner._scalars, []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other, **_: copies.append(self))
    launch.step(groups, state)
    assert not any(target is scalars for target in copies)
    groups[0]["lr"] = 5e-3
    launch.step(groups, state)
    assert sum(target is scalars for target in copies) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ["exact", "released"])
def test_on_a_device_as_torch_does(operator):
    params, groups, state, _ = optimizer_of([(768, 16), (16, 768), (BLOCK + 3,)], [(16,), (2 * BLOCK,)], "cuda")
    launch = OneLaunch(operator)
    truth = [torch.nn.Parameter(p.detach().double()) for p in params]
    plain = torch.optim.AdamW(truth, **OPTIONS)
    for step in range(100):
        for p, q in zip(params, truth):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.double()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            assert launch.step(groups, state), launch.why_not
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain.step()
        for q in truth[3:]:
            q.data = soft_threshold(q.data, 0.02, operator=operator)
    for p, q in zip(params, truth):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-5)
    assert launch.kept.tolist() == [int(torch.count_nonzero(p)) for p in params[3:]]


@pytest.mark.gpu
def test_a_captured_step_follows_kappa_and_lr():
    def make():
        torch.manual_seed(0)
        params, _, _, _ = optimizer_of([(64, 16)], [(16,)], "cuda")
        return params, ProxAdamW([{"params": params[:1]}, {"params": params[1:], "prox": True}], lr=1e-2)

    (eager, stepped), (captured, replayed) = make(), make()
    for optimizer in (stepped, replayed):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for kappa, lr in ((0.0, 1e-2), (0.1, 1e-2), (0.2, 3e-3)):
        for optimizer in (stepped, replayed):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.kappa = kappa
        stepped.step()
        replayed.write_scalars()
        graph.replay()
        assert all(torch.equal(p, q) for p, q in zip(eager, captured))
        assert torch.equal(stepped.kept_counts(), replayed.kept_counts())
