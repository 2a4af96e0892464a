"""The one-launch step on a CPU, by the extension and by the Triton kernel in its interpreter, against torch's AdamW."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import relative_error

from fastlora.build import extension
from fastlora.ops import prox_adamw
from fastlora.ops.backend import interpreting
from fastlora.ops.prox_adamw import OneLaunch
from fastlora.reference import soft_threshold

BACKENDS = [
    pytest.param("auto", marks=pytest.mark.skipif(extension() is None, reason="the extension was not built")),
    pytest.param("triton", marks=pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1")),
]
# empty, one, less and more than a vector, a block and an element, two dimensions; the gates' ones are the last three
SHAPES = ((0,), (1,), (7,), (33,), (1025,), (5, 9), (16,), (0,), (1030,))
GATES = 3
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.9999), "eps": 1e-8, "weight_decay": 0.0}


class Twin:
    """The same values twice: stepped in one launch, and by torch's AdamW with the reference operator in `dtype`."""

    def __init__(self, backend, operator="exact", dtype=torch.float32, shapes=SHAPES, gates=GATES, **options):
        self.operator, options = operator, OPTIONS | options
        values = [torch.randn(shape) for shape in shapes]
        self.ours = [torch.nn.Parameter(value.clone()) for value in values]
        self.theirs = [torch.nn.Parameter(value.to(dtype)) for value in values]
        self.directions = len(values) - gates
        first, last = slice(self.directions), slice(self.directions, None)
        self.groups = [{"params": self.ours[first], **options}, {"params": self.ours[last], "prox": True, **options}]
        self.state: dict = _State()
        self.launch = OneLaunch(operator, backend)
        self.torch = torch.optim.AdamW([{"params": self.theirs[first]}, {"params": self.theirs[last]}], **options)

    def step(self, grads, kappa=0.0):
        for p, q, g in zip(self.ours, self.theirs, grads):
            p.grad, q.grad = (None, None) if g is None else (g.clone(), g.to(q.dtype))
        self.groups[1]["kappa"] = kappa
        assert self.launch.step(self.groups, self.state), self.launch.why_not
        self.step_theirs(kappa)

    @torch.no_grad()
    def step_theirs(self, kappa):
        self.torch.step()
        for gate in self.theirs[self.directions :]:
            gate.copy_(soft_threshold(gate, kappa, operator=self.operator))

    def grads(self):
        return [torch.randn(p.shape) for p in self.ours]

    def kept(self):
        return [int(torch.count_nonzero(p)) for p in self.ours[self.directions :]]


class _State(dict):
    """As an optimizer's: a defaultdict of dicts."""

    def __missing__(self, key):
        return self.setdefault(key, {})


def assert_close(twin, atol=1e-6):
    for p, q in zip(twin.ours, twin.theirs):
        torch.testing.assert_close(p, q.to(p.dtype), atol=atol, rtol=1e-5, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["exact", "released"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_steps_are_as_exact_as_torch(backend, operator):
    # in the interpreter a program takes 10 ms, and a gate is stepped as everything is
    shapes, gates = (SHAPES, GATES) if backend == "auto" else (((33,),), 1)
    torch.manual_seed(5)
    twin = Twin(backend, operator, shapes=shapes, gates=gates)
    torch.manual_seed(5)
    truth = Twin(backend, operator, torch.float64, shapes=shapes, gates=gates)
    generator = torch.Generator().manual_seed(1)
    for step in range(1000):
        grads = [torch.randn(p.shape, generator=generator) for p in twin.ours]
        for g in grads[: twin.directions]:
            g += 0.3  # so that parameters move further than their noise
        kappa = 0.0 if step < 500 else 5e-3 * (step - 500) / 500
        twin.step(grads, kappa)
        for p, g in zip(truth.theirs, grads):
            p.grad = g.double()
        truth.step_theirs(kappa)
    assert twin.launch.kept.tolist() == twin.kept()
    assert 0 < sum(twin.kept()) < sum(p.numel() for p in twin.ours[twin.directions :]), "the threshold was not at work"
    for ours, theirs, exact in zip(twin.ours, twin.theirs, truth.theirs):
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact)
        if exact.numel():
            assert (ours.detach() == 0).equal(exact.detach() == 0), "another rank died"
    for ours, theirs, exact in zip(twin.ours, twin.theirs, truth.theirs):
        for name in ("exp_avg", "exp_avg_sq"):
            limit = 2 * relative_error(twin.torch.state[theirs][name], truth.torch.state[exact][name])
            assert relative_error(twin.state[ours][name], truth.torch.state[exact][name]) <= limit
        assert float(twin.state[ours]["step"]) == 1000


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_corrections_of_the_first_step(backend):
    """The first step is lr for any gradient at all; 1 - 0.9999 in float32 would make it 1e-4 too small."""
    twin = Twin(backend)
    with torch.no_grad():
        torch._foreach_zero_(twin.ours)
    twin.step([torch.where(torch.rand(p.shape) < 0.5, -1.0, 1.0) for p in twin.ours])
    for p in twin.ours:
        torch.testing.assert_close(p.detach().abs(), torch.full_like(p, 1e-2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kappa", [0.0, 0.25])
@pytest.mark.parametrize("operator", ["exact", "released"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_at_its_edges(backend, operator, kappa):
    edges = torch.tensor([0.0, -0.0, 0.25, -0.25, 0.3, -0.3, 0.49, 0.5, -0.5, 0.51, 1.0, math.nan, math.inf, -math.inf])
    gate = torch.nn.Parameter(edges.clone())
    gate.grad = torch.zeros_like(edges)  # AdamW leaves it where it is
    groups = [{"params": [gate], "prox": True, "kappa": kappa, **OPTIONS}]
    launch = OneLaunch(operator, backend)
    assert launch.step(groups, _State())
    expected = soft_threshold(edges, kappa, operator=operator)
    torch.testing.assert_close(gate.detach(), expected, rtol=0, atol=0, equal_nan=True)
    assert launch.kept.tolist() == [int(torch.count_nonzero(expected))]


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e-30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gradients_do_as_in_torch(backend, value):
    twin = Twin(backend, "exact")
    for step in range(3):
        grads = twin.grads()
        if step == 1:
            for g in grads:
                g.flatten()[::3] = value
        twin.step(grads, 0.01)
    assert_close(twin)
    assert twin.launch.kept.tolist() == twin.kept()
    for p, q in zip(twin.ours, twin.theirs):
        for name in ("exp_avg", "exp_avg_sq"):
            ours, theirs = twin.state[p][name], twin.torch.state[q][name]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-38, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1},
        {"betas": (0.3, 0.5)},  # torch.lerp from its other end
        {"betas": (0.0, 0.0)},
        {"eps": 1e-2},
        {"lr": 0.0},
        {"lr": torch.tensor(1e-2), "foreach": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_options(backend, options):
    twin = Twin(backend, **options)
    for _ in range(5):
        twin.step(twin.grads(), 0.02)
    assert_close(twin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_without_a_gradient_is_skipped_and_its_gate_thresholded(backend):
    twin = Twin(backend)
    for present in ((0, 1, 2, 4, 6), (1, 3, 4, 5, 7), tuple(range(9)), (0, 8)):
        grads = [g if number in present else None for number, g in enumerate(twin.grads())]
        twin.step(grads, 0.05)
        assert twin.launch.kept.tolist() == twin.kept()
    assert_close(twin)
    for p, q in zip(twin.ours, twin.theirs):
        assert float(twin.state[p]["step"]) == float(twin.torch.state[q]["step"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_never_had_a_gradient_has_no_state(backend):
    twin = Twin(backend)
    twin.step([None] * 5 + twin.grads()[5:])
    assert list(twin.state) == twin.ours[5:]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_other_layouts(backend):
    twin = Twin(backend)
    for _ in range(3):
        grads = twin.grads()
        grads[5] = torch.randn(9, 5).t()
        grads[4] = torch.randn(1).expand(1025)
        for p, q, g in zip(twin.ours, twin.theirs, grads):
            p.grad, q.grad = g, g.clone()
        twin.groups[1]["kappa"] = 0.0
        assert twin.launch.step(twin.groups, twin.state)
        twin.step_theirs(0.0)
    assert not grads[5].is_contiguous()
    assert_close(twin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_table_is_written_again_only_when_something_moved(backend, monkeypatch):
    twin, built = Twin(backend), []
    original = OneLaunch._build
    monkeypatch.setattr(OneLaunch, "_build", lambda self, *a: (built.append(0), original(self, *a))[1])

    def step_and_count(expected):
        built.clear()
        for p, q in zip(twin.ours, twin.theirs):
            g = torch.randn(p.shape)
            # where the last gradient was, when it has that size: a step that finds nothing new
            p.grad = p.grad.copy_(g) if p.grad is not None and p.grad.shape == g.shape else g
            q.grad = g.clone()
        assert twin.launch.step(twin.groups, twin.state)
        twin.step_theirs(0.0)
        assert len(built) == expected
        assert_close(twin)

    twin.groups[1]["kappa"] = 0.0
    step_and_count(1)
    step_and_count(0)
    # other memory, the same object
    twin.ours[4].data = twin.ours[4].data.clone()
    step_and_count(1)
    # a shorter tensor at the same address
    for p, state in ((twin.ours[3], twin.state), (twin.theirs[3], twin.torch.state)):
        p.grad = None
        p.data = p.data[:20]
        for name in ("exp_avg", "exp_avg_sq"):
            state[p][name] = state[p][name][:20]
    step_and_count(1)
    # state that was replaced, and state that was taken away
    twin.state[twin.ours[2]]["exp_avg"] = twin.state[twin.ours[2]]["exp_avg"].clone()
    step_and_count(1)
    del twin.state[twin.ours[1]], twin.torch.state[twin.theirs[1]]
    step_and_count(1)
    twin.state[twin.ours[4]].clear(), twin.torch.state[twin.theirs[4]].clear()
    step_and_count(1)
    # one parameter for another
    for params, group in ((twin.ours, twin.groups[0]), (twin.theirs, twin.torch.param_groups[0])):
        params[0] = group["params"][0] = torch.nn.Parameter(torch.ones(3))
    step_and_count(1)
    step_and_count(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_moving_gradients_alone_do_not_build(backend, monkeypatch):
    twin = Twin(backend)
    twin.step(twin.grads())
    monkeypatch.setattr(OneLaunch, "_build", None)
    for _ in range(4):
        held = [p.grad for p in twin.ours]  # so that the next ones lie elsewhere
        twin.step(twin.grads())
        del held
    assert_close(twin)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_is_told_of_the_write(backend):
    twin = Twin(backend, shapes=((3,), (3,)), gates=1)
    p = twin.ours[0]
    y = (p * p).sum()
    twin.step(twin.grads())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_resized_parameter_is_told():
    twin = Twin("auto")
    twin.step(twin.grads())
    p = twin.ours[4]
    p.grad, p.data = None, p.data[:5]
    p.grad = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"shape \[5\] and its exp_avg \[1025\]; .*drop_dead_ranks_"):
        twin.launch.step(twin.groups, twin.state)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.groups[0].update(amsgrad=True), "asks for amsgrad"),
        (lambda t: t.groups[1].update(maximize=True), "asks for maximize"),
        (lambda t: t.groups[0].update(betas=(torch.tensor(0.9), torch.tensor(0.99))), "betas of a group are tensors"),
        (lambda t: setattr(t.ours[2], "data", t.ours[2].data.double()), "torch.float64"),
        (lambda t: setattr(t.ours[5], "data", torch.randn(9, 5).t()), "not contiguous"),
        (
            lambda t: t.groups[0]["params"].append(torch.nn.Parameter(torch.ones(2, device="meta"))),
            "no ordinary tensor",
        ),
        (lambda t: setattr(t.ours[4], "grad", torch.ones(1025).to_sparse()), "sparse"),
    ],
    ids=["amsgrad", "maximize", "betas", "double", "transposed", "meta", "sparse"],
)
def test_the_rest_is_left_to_torch_untouched(change, reason):
    twin = Twin("auto")
    for p, g in zip(twin.ours, twin.grads()):
        p.grad = g
    before = [p.detach().clone() for p in twin.ours]
    change(twin)
    moved = [p.data_ptr() for p in twin.ours]
    assert not twin.launch.step(twin.groups, twin.state)
    assert reason in twin.launch.why_not
    assert twin.launch.kept is None
    for p, q, address in zip(twin.ours, before, moved):
        assert p.data_ptr() == address and (p.shape != q.shape or p.stride() != q.stride() or p.equal(q.to(p.dtype)))


def test_without_the_extension_torch_steps(monkeypatch):
    monkeypatch.setattr(prox_adamw, "extension", lambda: None)
    twin = Twin("auto")
    for p, g in zip(twin.ours, twin.grads()):
        p.grad = g
    assert not twin.launch.step(twin.groups, twin.state) and "extension was not built" in twin.launch.why_not


@pytest.mark.skipif(extension() is None, reason="the extension was not built")
@pytest.mark.parametrize("operator", ["exact", "released"])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(operator, monkeypatch):
    # more elements than a second thread is started for
    shapes = ((40_000,), (3,), (20_011,), (0,), (7, 1031), (16,), (37,))
    results = []
    for simd, threads in (("auto", 1), ("auto", 2), ("auto", 7), ("scalar", 1), ("scalar", 3), ("avx2", 1)):
        if simd not in ("auto", *extension().simd_levels()):
            continue
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(prox_adamw, "SIMD", simd)
        torch.manual_seed(2)
        twin = Twin("auto", operator, shapes=shapes, gates=2, weight_decay=0.01)
        for _ in range(4):
            twin.step(twin.grads(), 0.03)
        results.append([p.detach().clone() for p in twin.ours])
        assert_close(twin)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other))


@pytest.mark.skipif(extension() is None, reason="the extension was not built")
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match='simd "sse9" is unknown'):
        extension().prox_adamw_cpu(0, 0, 0, False, 0, threads=1, simd="sse9")


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_moves_under_its_objects_is_found(backend):
    """As `t.data = t.data.cpu()` and back does to all of it."""
    twin = Twin(backend)
    twin.step(twin.grads())
    held = [entry[name].data for entry in twin.state.values() for name in prox_adamw.MOMENTS]
    for entry in twin.state.values():
        for name in prox_adamw.MOMENTS:
            entry[name].data = entry[name].data.clone()
    for _ in range(2):
        twin.step(twin.grads())
    del held
    assert_close(twin)
    for p, q in zip(twin.ours, twin.theirs):
        for name in prox_adamw.MOMENTS:
            torch.testing.assert_close(twin.state[p][name], twin.torch.state[q][name], rtol=1e-5, atol=1e-9)
