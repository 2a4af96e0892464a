"""Which calls a model makes, what is measured for them, and the table that comes of it."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import fastlora
from fastlora import triton_kernels
from fastlora.ops import dispatch, rank_lora_torch
from fastlora.ops.dispatch_table import format_table, read_table
from fastlora.triton_kernels import TileConfig
from fastlora.tune import Call, Candidate, calls_of, tune
from fastlora.tune.candidates import Check, Operands, default_candidates, make_run

CPU = torch.device("cpu")
LINEAR = Call(12, 8, 16, 4, torch.float32)
PACKED = Call(12, 24, 8, 7, torch.float32, (4, 0, 3))
TILE = TileConfig(32, 32, 32, 1, 1)


@pytest.fixture(autouse=True)
def user_table(monkeypatch, tmp_path):
    path = tmp_path / "cache" / "dispatch.json"
    monkeypatch.setenv("FASTLORA_TABLE", str(path))
    yield path
    dispatch.reload()


@pytest.fixture
def launchers(monkeypatch):
    """Kernels that are the library, so that what surrounds them is tested alone and at once; a dict breaks variants."""
    broken = {}

    def spoil(y, variant):
        if isinstance(broken.get(variant), Exception):
            raise broken[variant]
        return y * broken.get(variant, 1.0)

    def fwd(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, *, ranks, variant, tile):
        y, s = rank_lora_torch.rank_lora_fwd(x, weight, bias, lora_a, lora_b, gate, kappa, scaling, ranks)
        return spoil(y, variant), s

    def dx(dy, weight, lora_a, lora_b, gate, kappa, scaling, *, ranks, p, variant, tile):
        gated = rank_lora_torch.times_gate(p, rank_lora_torch.effective_gate(gate, kappa, scaling))
        return spoil(dy @ weight + gated @ lora_a, variant), p

    monkeypatch.setattr(triton_kernels, "rank_lora_fwd", fwd)
    monkeypatch.setattr(triton_kernels, "rank_lora_dx", dx)
    return broken


def clock(*times):
    """A timer that returns these microseconds, the first for the first run."""
    return lambda runs: list(times[: len(runs)])


# ---- calls_of


def adapted(module, rank=4, **options):
    fastlora.inject(module, rank, where=lambda name, _: True, **options)
    return module


def test_calls_of_linear_layers_are_distinct_and_in_order():
    model = adapted(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)))
    assert calls_of(model, torch.randn(2, 3, 8)) == [
        Call(6, 16, 8, 4, torch.float32),
        Call(6, 8, 16, 4, torch.float32),
    ]


def test_calls_of_attention_are_packed_where_the_input_is_shared():
    model = adapted(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)))
    x = torch.randn(2, 5, 8)
    packed, out = Call(10, 24, 8, 12, torch.float32, (4, 4, 4)), Call(10, 8, 8, 4, torch.float32)
    model.forward = lambda *inputs: model[0](*inputs)
    assert calls_of(model, x, x, x) == [packed, out]
    assert calls_of(model, x, x.clone(), x) == [out]
    model.forward = lambda x: model[0](query=x, value=x, key=x, need_weights=False)
    assert calls_of(model, x) == [packed, out]
    fastlora.remove(model)
    adapted(model, targets=("q", "out"))
    assert calls_of(model, x)[0] == Call(10, 24, 8, 4, torch.float32, (4, 0, 0))


def test_calls_of_a_clip():
    model = fastlora.open_clip_demo().model
    fastlora.inject(model, 4, where="text")
    calls = calls_of(model, torch.randn(1, 3, 32, 32), torch.zeros(2, model.context_length, dtype=torch.long))
    rows = 2 * model.context_length
    assert calls[0] == Call(rows, 384, 128, 12, torch.float32, (4, 4, 4))
    assert [(c.n, c.k) for c in calls[1:]] == [(128, 128), (512, 128), (128, 512)]


def test_calls_of_leaves_the_model_as_it_was():
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)), dropout=0.1).train()
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(calls_of(model, torch.randn(4, 8))) == 1
    assert [m.training for m in model] == [True, True, False] and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="x has shape"):
        calls_of(model, torch.randn(4, 7))
    assert not any(m._forward_pre_hooks for m in model.modules()) and model.training


def test_calls_of_under_autocast_and_in_half_precision():
    model = adapted(nn.Sequential(nn.Linear(8, 16)))
    with torch.autocast("cpu", torch.bfloat16):
        assert calls_of(model, torch.randn(3, 8)) == [Call(3, 16, 8, 4, torch.bfloat16)]
    assert calls_of(model.half(), torch.randn(3, 8).half()) == [Call(3, 16, 8, 4, torch.float16)]


def test_calls_of_needs_adapters_that_run():
    with pytest.raises(ValueError, match=r"Linear has no adapters; call fastlora\.inject"):
        calls_of(nn.Linear(2, 2), torch.randn(1, 2))
    model = adapted(nn.Sequential(nn.Linear(2, 2)))
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="without calling any"):
        calls_of(model, torch.randn(1, 2))


# ---- candidates


@pytest.mark.parametrize("call", [LINEAR, PACKED], ids=["linear", "packed"])
@pytest.mark.parametrize("role", ["fwd", "dx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_check_passes_the_library_and_fails_one_percent(call, role, dtype):
    operands = Operands(dataclasses.replace(call, dtype=dtype), CPU)
    check = Check(role, operands)
    result = make_run(Candidate("library"), role, operands)()
    assert result.shape == ((12, call.n) if role == "fwd" else (12, call.k))
    assert check.why_wrong(result) is None
    assert "its error is" in check.why_wrong(result * 1.01)
    assert "its error is nan" in check.why_wrong(result.index_fill(0, torch.tensor([11]), float("nan")))
    assert "its result has shape" in check.why_wrong(result[:-1])


def test_the_check_sees_a_rank_product_that_is_missing():
    operands = Operands(LINEAR, CPU)
    assert "its error is" in Check("fwd", operands).why_wrong(operands.x @ operands.weight.t() + operands.bias)
    assert "its error is" in Check("dx", operands).why_wrong(operands.dy @ operands.weight)


def test_operands_leave_the_random_stream_alone():
    state = torch.get_rng_state()
    Operands(LINEAR, CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_default_candidates():
    forward = default_candidates(LINEAR, "fwd", CPU)
    assert forward[0] == Candidate("library")
    assert {c.variant for c in forward} == {"library", "split", "one_pass", "leader"}
    assert all(isinstance(c.tile, TileConfig) for c in forward[1:])
    # p is there already, so every variant is the same launch
    assert {c.variant for c in default_candidates(LINEAR, "dx", CPU)} == {"library", "split"}
    wide = dataclasses.replace(LINEAR, r=65)
    assert {c.variant for c in default_candidates(wide, "fwd", CPU)} == {"library", "split"}
    packed = dataclasses.replace(PACKED, r=96, ranks=(32, 32, 32))
    assert "leader" in {c.variant for c in default_candidates(packed, "fwd", CPU)}


# ---- tune


def test_the_fastest_is_written_and_then_looked_up(launchers, user_table):
    candidates = [Candidate("library"), Candidate("split", TILE), Candidate("one_pass", TILE)]
    report = tune([LINEAR, PACKED], CPU, candidates=candidates, timer=clock(30.0, 10.0, 20.0))
    assert (report.device, report.path, len(report.outcomes)) == ("interpreter", user_table, 4)
    for role, call in (("fwd", LINEAR), ("dx", LINEAR), ("fwd", PACKED), ("dx", PACKED)):
        entry = dispatch.lookup(role, "interpreter", call.m, call.n, call.k, call.r, call.dtype, call.ranks)
        assert (entry.variant, entry.time_us, entry.source) == ("split", 10.0, f"user table {user_table}")
        assert entry.tile_config == dataclasses.replace(TILE, tuned_on="interpreter")
        assert entry.measured.startswith("measured on interpreter, fastest of 3 candidates, torch ")
        assert f"fastlora {fastlora.__version__}" in entry.measured
    text = str(report)
    assert f"interpreter: 4 of 4 measured, written to {user_table}" in text
    assert "split 32x32x32, 1 warps, 1 stages" in text and "30.0" in text and "x3" in text


def test_the_library_may_win(launchers):
    tune([LINEAR], CPU, candidates=[Candidate("library"), Candidate("split", TILE)], timer=clock(1.0, 2.0))
    entry = dispatch.lookup("fwd", "interpreter", 12, 8, 16, 4, torch.float32)
    assert (entry.variant, entry.tile) == ("library", None)


def test_a_wrong_or_failing_candidate_is_never_timed(launchers):
    launchers |= {"one_pass": 1.01, "leader": RuntimeError("out of resources\nand more")}
    candidates = [Candidate(variant, TILE) for variant in ("one_pass", "leader", "split")]
    report = tune([LINEAR], CPU, candidates=candidates, timer=clock(7.0))
    forward, _ = report.outcomes
    wrong, failed, fine = forward.trials
    assert "its error is" in wrong.reason and wrong.time_us is None
    assert failed.reason == "RuntimeError: out of resources"
    assert (fine.time_us, forward.entry.variant) == (7.0, "split")
    assert "leader 32x32x32, 1 warps, 1 stages: RuntimeError: out of resources" in str(report)


def test_nothing_measured_writes_nothing(launchers, user_table):
    launchers["split"] = ValueError("no")
    report = tune([LINEAR], CPU, candidates=[Candidate("split", TILE)], timer=clock(1.0))
    assert report.entries == {} and not user_table.exists()
    assert "no candidate could be measured" in str(report) and "nothing written" in str(report)

    def stopped(runs):
        raise RuntimeError("the clock stopped")

    report = tune([LINEAR], CPU, candidates=[Candidate("library")], timer=stopped)
    assert "RuntimeError: the clock stopped" in str(report) and not user_table.exists()


def test_the_budget(launchers, user_table):
    report = tune([LINEAR], CPU, budget_seconds=-1)
    assert [outcome.reason for outcome in report.outcomes] == ["the budget was spent before"] * 2
    assert not user_table.exists()


def test_a_budget_that_ends_among_the_candidates(launchers, user_table, monkeypatch):
    """The library alone was tried: no ground to say that it is the fastest."""
    now = iter(range(100))
    monkeypatch.setattr("fastlora.tune.tuning.time.monotonic", lambda: next(now))
    report = tune([LINEAR], CPU, budget_seconds=2.5, candidates=[Candidate("library"), Candidate("split", TILE)])
    assert report.outcomes[0].reason == "the budget was spent after 1 of 2 candidates"
    assert not user_table.exists()


def test_the_largest_call_stands_for_those_that_share_its_key(launchers):
    seen = []
    calls = [dataclasses.replace(LINEAR, m=m) for m in (9, 16, 12, 40)]
    report = tune(calls, CPU, candidates=[Candidate("library")], timer=clock(1.0), progress=seen.append)
    assert seen == [f"{role} M {m} N 8 K 16 R 4 float32" for m in (40, 16) for role in ("fwd", "dx")]
    assert [outcome.key.m for outcome in report.outcomes] == [64, 64, 16, 16]


def test_calls_with_nothing_to_choose(launchers):
    calls = [dataclasses.replace(LINEAR, r=0), dataclasses.replace(LINEAR, dtype=torch.float64)]
    reasons = {outcome.reason for outcome in tune(calls, CPU, timer=clock()).outcomes}
    assert any("nothing to choose" in reason for reason in reasons) and any("float64" in reason for reason in reasons)


def test_other_keys_of_the_table_are_kept(launchers, user_table):
    tune([LINEAR], CPU, candidates=[Candidate("library")], timer=clock(5.0))
    tune([PACKED, LINEAR], CPU, candidates=[Candidate("split", TILE)], timer=clock(6.0))
    tune([PACKED], CPU, candidates=[Candidate("library")], timer=clock(4.0))
    found = {(key.parts, key.role): (e.variant, e.time_us) for key, e in read_table(user_table, "").items()}
    assert found == {
        (1, "fwd"): ("split", 6.0), (1, "dx"): ("split", 6.0), (3, "fwd"): ("library", 4.0), (3, "dx"): ("library", 4.0)
    }  # fmt: skip
    assert user_table.read_bytes() == format_table(read_table(user_table, ""))


def test_a_table_of_another_version_is_replaced_and_said(launchers, user_table):
    user_table.parent.mkdir()
    user_table.write_text(json.dumps({"version": 0, "entries": []}))
    report = tune([LINEAR], CPU, candidates=[Candidate("library")], timer=clock(5.0))
    assert f"{user_table} was replaced as a whole: it has version 0" in str(report)
    assert len(read_table(user_table, "")) == 2


def test_out_names_another_file(launchers, user_table, tmp_path):
    tune([LINEAR], CPU, out=tmp_path / "new" / "mine.json", candidates=[Candidate("library")], timer=clock(5.0))
    assert len(read_table(tmp_path / "new" / "mine.json", "")) == 2 and not user_table.exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "mine.json", tmp_path):
        with pytest.raises(OSError, match=str(tmp_path)):
            tune([LINEAR], CPU, out=path, timer=lambda runs: pytest.fail("measured before the path was tried"))


def test_no_device_to_tune_for(monkeypatch):
    monkeypatch.setattr("fastlora.tune.tuning.interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in (None, "cpu", "cuda"):
        with pytest.raises(RuntimeError, match="for CUDA and ROCm devices.*on a CPU the torch backend has nothing to"):
            tune([LINEAR], device)


def test_the_clock_takes_turns():
    from fastlora.tune.clock import MAX_ROUNDS, MIN_ROUNDS, interleaved

    order = []
    runs = [lambda i=i: order.append(i) or torch.empty(0) for i in range(3)]
    times = interleaved(runs)
    assert len(times) == 3 and all(time > 0 for time in times)
    turns = len(order) // 3
    assert order == [0, 1, 2] * turns and MIN_ROUNDS < turns <= MAX_ROUNDS + 1


@pytest.mark.parametrize("call", [LINEAR, PACKED], ids=["linear", "packed"])
def test_the_kernels_themselves(call, user_table):
    """Every default candidate runs and is exact, in the interpreter."""
    report = tune([call], CPU, budget_seconds=600)
    for outcome in report.outcomes:
        assert outcome.entry is not None, outcome.reason
        assert [trial.reason for trial in outcome.trials] == [""] * len(outcome.trials)


@pytest.mark.gpu
def test_on_a_gpu(user_table):
    if triton_kernels.is_interpreted():
        pytest.skip("Triton's interpreter runs the kernels; start the tests with TRITON_INTERPRET=0")
    torch.use_deterministic_algorithms(False)  # cuBLAS would ask for a workspace of its own
    call = Call(1024, 768, 768, 16, torch.bfloat16)
    report = tune([call], "cuda")
    assert len(report.entries) == 2, str(report)
    entry = dispatch.lookup("fwd", torch.cuda.get_device_name(), 1024, 768, 768, 16, torch.bfloat16)
    assert entry.source == f"user table {user_table}" and entry.time_us < 1000
