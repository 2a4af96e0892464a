import pytest
import torch
from helpers import (
    assert_as_exact_as_torch,
    make_operands,
    outputs_and_gradients,
    reference_in,
    relative_error,
)

from fastlora import reference
from fastlora.ops import rank_lora_linear

HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]
# leading shape, K, N, R: one row, ragged, token counts of CLIP, rank 1, 3, 16, 0 and above the width
SHAPES = [((1,), 5, 3, 1), ((197,), 33, 65, 3), ((2, 98), 48, 40, 16), ((7,), 20, 12, 0), ((4, 3, 2), 9, 8, 20)]
# a merged weight cannot hold gates of one row a sample or token
ROW_GATE_BACKENDS = ["torch", "triton", "one_pass", "leader"]
BACKENDS = [*ROW_GATE_BACKENDS, "merged"]


def compare(operands, dtype, kappa, scaling, backend):
    dy = torch.randn(*operands.x.shape[:-1], operands.weight.shape[0]).to(dtype)
    ours = outputs_and_gradients(rank_lora_linear, operands, dy, kappa, scaling, backend=backend)
    plain = reference_in(dtype, operands, dy, kappa, scaling)
    truth = reference_in(torch.float64, operands, dy, kappa, scaling)
    for name, gradient in (("y", plain["y"]), ("dx", operands.x), ("dlora_a", operands.lora_a)):
        assert ours[name].dtype == gradient.dtype
    assert_as_exact_as_torch(ours, plain, truth, dtype)
    return ours, plain, truth


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize(("shape", "k", "n", "r"), SHAPES)
def test_forward_and_every_gradient(backend, dtype, shape, k, n, r):
    compare(make_operands(shape, k, n, r, dtype), dtype, 0.3, 0.5, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bias_and_no_threshold(backend):
    compare(make_operands((19,), 24, 17, 4, bias=False), torch.float32, 0.0, 1.0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_beside_half_precision(backend, dtype):
    operands = make_operands((31,), 40, 24, 5, dtype, adapter_dtype=torch.float32)
    ours, _, _ = compare(operands, dtype, 0.1, 1.0, backend)
    assert ours["dlora_a"].dtype == ours["dlora_b"].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_exactly_at_the_threshold_and_at_zero(backend):
    operands = make_operands((13,), 16, 16, 40)
    operands.gate[:4] = torch.tensor([0.25, -0.25, 0.0, 0.5])
    ours, _, _ = compare(operands, torch.float32, 0.25, 1.0, backend)
    assert torch.equal(ours["dgate"][:3], torch.zeros(3)) and ours["dgate"][3] != 0
    ours, _, _ = compare(operands, torch.float32, 0.0, 1.0, backend)
    assert (ours["dgate"] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_gate_shows_in_the_output(backend):
    operands = make_operands((5,), 8, 6, 3)
    operands.gate[1] = float("nan")
    y = rank_lora_linear(*operands.tensors(), 0.25, backend=backend)
    assert y.isnan().all()


@pytest.mark.parametrize("backend", ROW_GATE_BACKENDS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("gate_shape", [(3, 6), (15, 6)])
def test_gate_of_a_sample_and_of_a_token(dtype, gate_shape, backend):
    compare(make_operands((3, 5), 14, 11, 6, dtype, gate_shape=gate_shape), dtype, 0.2, 0.7, backend)


@pytest.mark.parametrize("backend", ["split_tma", "one_pass_tma", "leader_tma"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_descriptors_by_name(dtype, backend):
    compare(make_operands((2, 20), 48, 40, 5, dtype), dtype, 0.2, 0.7, backend)


def test_descriptors_by_name_run_or_raise_in_the_forward_and_give_way_in_the_backward():
    with pytest.raises(
        RuntimeError, match='"split_tma" was asked for but .* take float16 and bfloat16.*backend="split"'
    ):
        rank_lora_linear(*make_operands((4,), 48, 40, 5).tensors(), backend="split_tma")
    operands = make_operands((4,), 48, 37, 5, torch.float16)  # dy has rows of 74 bytes
    dy = torch.randn(4, 37).half()
    gradients = outputs_and_gradients(rank_lora_linear, operands, dy, 0.1, 1.0, backend="one_pass_tma")
    expected = outputs_and_gradients(rank_lora_linear, operands, dy, 0.1, 1.0, backend="split")
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("backend", ROW_GATE_BACKENDS)
def test_a_gate_of_a_sample_is_the_gate_of_its_tokens(backend):
    operands = make_operands((3, 5), 14, 11, 6, gate_shape=(3, 6))
    dy = torch.randn(3, 5, 11)
    of_samples = outputs_and_gradients(rank_lora_linear, operands, dy, 0.2, 0.7, backend=backend)
    operands.gate = operands.gate.repeat_interleave(5, 0)
    of_tokens = outputs_and_gradients(rank_lora_linear, operands, dy, 0.2, 0.7, backend=backend)
    of_tokens["dgate"] = of_tokens["dgate"].view(3, 5, 6).sum(1)
    for name, expected in of_tokens.items():
        torch.testing.assert_close(of_samples[name], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sliced_and_transposed_input(backend):
    operands = make_operands((30,), 24, 16, 33)
    operands.x = torch.randn(24, 60).t()[::2, :]
    compare(operands, torch.float32, 0.2, 1.0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows(backend):
    operands = make_operands((0,), 8, 6, 3).requires_grad_()
    y = rank_lora_linear(*operands.tensors(), 0.1, backend=backend)
    assert y.shape == (0, 6)
    gradients = torch.autograd.grad(y.sum(), operands.trainable())
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, operands.trainable()))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_a_planted_error_of_one_percent_fails(dtype):
    operands, dy = make_operands((64,), 32, 32, 8, dtype), torch.randn(64, 32).to(dtype)
    plain, truth = (reference_in(d, operands, dy, 0.1, 1.0) for d in (dtype, torch.float64))
    assert_as_exact_as_torch(plain, plain, truth, dtype)
    for name in truth:
        planted = dict(plain, **{name: plain[name].float() * 1.01})
        with pytest.raises(AssertionError, match=name):
            assert_as_exact_as_torch(planted, plain, truth, dtype)


def test_triton_is_bit_reproducible():
    operands, dy = make_operands((197,), 40, 24, 7), torch.randn(197, 24)
    runs = [outputs_and_gradients(rank_lora_linear, operands, dy, 0.1, 1.0, backend="triton") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_only_x_and_s_are_saved():
    operands = make_operands((50,), 768, 32, 16).requires_grad_()
    operands.x.requires_grad_(False)
    own = {t.untyped_storage().data_ptr() for t in operands.tensors()[1:] if t is not None}
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rank_lora_linear(*operands.tensors(), 0.0, backend="torch")
    x_bytes = operands.x.untyped_storage().nbytes()
    assert saved.pop(operands.x.untyped_storage().data_ptr()) == x_bytes
    assert sum(saved.values()) == 50 * 16 * 4


def test_gradcheck_and_double_backward():
    operands = make_operands((2, 4), 5, 3, 2, torch.float64).requires_grad_()

    def call(x, lora_a, lora_b, gate):
        return rank_lora_linear(x, operands.weight, operands.bias, lora_a, lora_b, gate, 0.1, 0.5)

    assert torch.autograd.gradcheck(call, operands.trainable())
    assert torch.autograd.gradgradcheck(call, operands.trainable())


@pytest.mark.parametrize("needed", ["x", "lora_a", "lora_b", "gate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_gradient_alone(backend, needed):
    operands = make_operands((21,), 12, 10, 3)
    names = ("x", "lora_a", "lora_b", "gate")
    expected = outputs_and_gradients(rank_lora_linear, operands, torch.ones(21, 10), 0.1, 1.0, backend=backend)
    tensor = getattr(operands, needed).requires_grad_(True)
    y = rank_lora_linear(*operands.tensors(), 0.1, 1.0, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), [tensor])
    truth = expected[dict(zip(names, ("dx", "dlora_a", "dlora_b", "dgate")))[needed]]
    assert relative_error(gradient, truth) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_and_float32_gradients(dtype):
    operands = make_operands((9,), 16, 12, 4).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = rank_lora_linear(*operands.tensors(), 0.0)
        plain = reference.rank_lora_linear(*operands.tensors(), 0.0)
    assert y.dtype == dtype
    assert relative_error(y, plain) <= 4 * torch.finfo(dtype).eps
    gradients = torch.autograd.grad(y.float().sum(), operands.trainable())
    assert {g.dtype for g in gradients} == {torch.float32}


def test_autocast_does_not_hide_integers():
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="x has dtype torch.int64"):
        rank_lora_linear(*operands_with(x=torch.ones(4, 6, dtype=torch.int64)))


def operands_with(**changes):
    operands = make_operands((4,), 6, 5, 2)
    for name, value in changes.items():
        setattr(operands, name, value)
    return operands.tensors()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(4, 7)}, ValueError, r"x has shape \[4, 7\]; with weight \[5, 6\] it must be \[..., 6\]"),
        ({"lora_a": torch.randn(2, 7)}, ValueError, r"lora_a has shape \[2, 7\].*must be \[R, 6\]"),
        ({"lora_b": torch.randn(5, 3)}, ValueError, r"lora_b has shape \[5, 3\].*must be \[5, 2\]"),
        ({"gate": torch.randn(3)}, ValueError, r"gate has shape \[3\].*must be \[2\], \[4, 2\]"),
        ({"bias": torch.randn(6)}, ValueError, r"bias has shape \[6\].*must be \[5\] or None"),
        ({"weight": torch.randn(5)}, ValueError, r"weight has shape \[5\]; it must be \[N, K\]"),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "x has dtype torch.int64; it must be floating point"),
        ({"x": torch.randn(4, 6).half()}, TypeError, "weight has dtype torch.float32 and x has torch.float16"),
        ({"lora_a": torch.randn(2, 6).half()}, TypeError, "lora_a has dtype torch.float16; it must be torch.float32"),
        ({"gate": [1.0, 2.0]}, TypeError, "gate is a list; it must be a torch.Tensor"),
        ({"x": [[1.0] * 6]}, TypeError, "x is a list; it must be a torch.Tensor"),
        ({"x": torch.nested.nested_tensor([torch.ones(2, 6)])}, TypeError, "x is a nested tensor; .*to_padded_tensor"),
        (
            {"x": torch.nested.nested_tensor([torch.ones(2, 6)], layout=torch.jagged)},
            TypeError,
            "x is a nested tensor",
        ),
        ({"bias": [1.0] * 5}, TypeError, "bias is a list; it must be a torch.Tensor"),
        ({"gate": torch.randn(2, device="meta")}, ValueError, "gate is on meta and x is on cpu"),
    ],
)
def test_bad_operands_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        rank_lora_linear(*operands_with(**changes))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="kappa is -1.0"):
        rank_lora_linear(*operands_with(), -1.0)
    with pytest.raises(ValueError, match=r"kappa is 1e\+300; .* at most 3.403e\+38"):
        rank_lora_linear(*operands_with(), 1e300)
    with pytest.raises(ValueError, match="scaling is nan"):
        rank_lora_linear(*operands_with(), 0.0, float("nan"))
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        rank_lora_linear(*operands_with(), backend="cuda")


ON_DEVICE = ("split", "one_pass", "leader", "split_tma", "one_pass_tma", "leader_tma")


def on_gpu(operands):
    for name in ("x", "weight", "bias", "lora_a", "lora_b", "gate"):
        setattr(operands, name, getattr(operands, name).cuda())
    return operands


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "split", "one_pass", "leader"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize(("shape", "k", "n", "r"), [*SHAPES, ((197, 8), 768, 3072, 16)])
def test_triton_on_the_device(dtype, shape, k, n, r, backend):
    operands = on_gpu(make_operands(shape, k, n, r, dtype))
    dy = torch.randn(*shape, n, device="cuda").to(dtype)
    ours = outputs_and_gradients(rank_lora_linear, operands, dy, 0.3, 0.5, backend=backend)
    plain, truth = (reference_in(d, operands, dy, 0.3, 0.5) for d in (dtype, torch.float64))
    assert_as_exact_as_torch(ours, plain, truth, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_DEVICE)
@pytest.mark.parametrize("gate_rows", [8, 8 * 197])
def test_row_gates_on_the_device(backend, gate_rows):
    operands = on_gpu(make_operands((8, 197), 768, 768, 16, torch.bfloat16, gate_shape=(gate_rows, 16)))
    dy = torch.randn(8, 197, 768, device="cuda").bfloat16()
    ours = outputs_and_gradients(rank_lora_linear, operands, dy, 0.3, 0.5, backend=backend)
    plain, truth = (reference_in(d, operands, dy, 0.3, 0.5) for d in (torch.bfloat16, torch.float64))
    assert_as_exact_as_torch(ours, plain, truth, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_DEVICE)
def test_a_cuda_graph_replays_forward_and_backward(backend):
    operands = on_gpu(make_operands((256,), 768, 768, 16, torch.bfloat16)).requires_grad_()
    kappa, dy = torch.tensor(0.1, device="cuda"), torch.randn(256, 768, device="cuda").bfloat16()

    def step():
        y = rank_lora_linear(*operands.tensors(), kappa, backend=backend)
        return y, *torch.autograd.grad(y, operands.trainable(), dy)

    expected = [t.clone() for t in step()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected))
    kappa.fill_(0.5)  # a new threshold needs no new capture
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))
