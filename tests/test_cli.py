"""The command line, in this process on a benchmark of seconds; and once as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from helpers import run
from safetensors.torch import load_file, save_file

pytest.importorskip("open_clip")
pytest.importorskip("jsonargparse")

import fastlora  # noqa: E402
from fastlora import cli  # noqa: E402
from fastlora.continual import benchmarks  # noqa: E402
from fastlora.continual.arguments import options_of, parse_train  # noqa: E402
from fastlora.continual.config import (  # noqa: E402
    CONFIGS,
    CoDyRAConfig,
    LoRAConfig,
    RunConfig,
    UsageError,
    ZeroShotConfig,
)
from fastlora.continual.stream import InMemoryImages, Task, TaskStream  # noqa: E402

QUICK = ["--benchmark", "tiny", "--method.iterations=3", "--method.rank=2", "--method.batch_size=8"]


def tiny(config=None):
    """Two tasks of random images for a CLIP of one narrow block per tower."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = dict(width=32, head_width=16, layers=1, patch_size=8, image_size=16)
    model = CLIP(32, vision, dict(width=32, heads=2, layers=1, context_length=8, vocab_size=32))
    generator = torch.Generator().manual_seed(1)

    def images(n):
        return InMemoryImages(torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 2)

    def tokenize(texts):
        tokens = torch.zeros(len(texts), 8, dtype=torch.long)
        for row, text in zip(tokens, texts):
            row[:2] = torch.tensor([1 + sum(map(ord, text)) % 30, 31])
        return tokens

    tasks = [Task(name, (f"{name} a", f"{name} b"), ("a {}", "{}"), images(8), images(6)) for name in ("red", "blue")]
    held_out = Task("grey", ("grey a", "grey b"), ("{}",), None, images(6))
    return benchmarks.Loaded(model, tokenize, TaskStream("tiny", tasks, held_out))


@pytest.fixture(autouse=True)
def tiny_benchmark(monkeypatch, tmp_path):
    presets = {"codyra": {"kappa_max": 0.4}}
    monkeypatch.setitem(benchmarks.BENCHMARKS, "tiny", benchmarks.Benchmark(tiny, presets=presets))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_plots(monkeypatch):
    """Drawing takes longer than training here; for the tests that look at neither page nor plots."""
    monkeypatch.setattr("fastlora.continual.report.write_report", lambda path: None)


# ---- arguments of train


def test_defaults_are_the_demo_and_codyra_with_its_preset():
    run, out = parse_train([]).run, str(parse_train([]).out)
    preset = benchmarks.BENCHMARKS["demo"].preset(CoDyRAConfig)
    assert (run.benchmark, run.seed, out) == ("demo", 0, "runs/demo-codyra-seed0")
    assert run.method == CoDyRAConfig(**preset) and run.method.iterations == 120


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "lora", "--method.rank", "4"],
        ["--method=lora", "--method.rank=4"],
        ["--method.name", "lora", "--method.rank", "4"],
        ["--method.rank", "4", "--method", "lora"],
    ],
)
def test_spellings_of_a_method(arguments):
    assert parse_train(["--benchmark", "tiny", *arguments]).run.method == LoRAConfig(rank=4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method: lora", LoRAConfig()),
        ("method: {name: lora, rank: 3, lr: 5e-5, targets: [q, v]}", LoRAConfig(rank=3, lr=5e-5, targets=("q", "v"))),
        ("method:\n  rank: 3", CoDyRAConfig(rank=3, kappa_max=0.4)),
        ("method: zero_shot", ZeroShotConfig()),
        ("", CoDyRAConfig(kappa_max=0.4)),
    ],
)
def test_config_file(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(f"benchmark: tiny\n{text}\n")
    assert parse_train(["--config", "run.yaml"]).run.method == expected


def test_command_line_overrides_files_wherever_it_stands(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "benchmark: tiny\nseed: 1\nmethod: {name: lora, rank: 3, lr: 0.5}\nout: from_file\n"
    )
    (tmp_path / "b.yaml").write_text("seed: 2\nmethod: {lr: 0.25}\n")
    parsed = parse_train(["--method.rank", "7", "--config", "a.yaml", "--config=b.yaml"])
    assert parsed.run.method == LoRAConfig(rank=7, lr=0.25)
    assert parsed.run.seed == 2 and str(parsed.out) == "from_file"


@pytest.mark.parametrize(
    ("arguments", "seeds", "out"),
    [
        (["--seeds=3"], (0, 1, 2), "runs/demo-codyra"),
        (["--seeds", "2", "--seed=5"], (5, 6), "runs/demo-codyra"),
        (["--seeds=4,0", "--out=mine"], (4, 0), "mine"),
        ([], (), "runs/demo-codyra-seed0"),
    ],
)
def test_seeds(arguments, seeds, out):
    parsed = parse_train(arguments)
    assert parsed.seeds == seeds and str(parsed.out) == out


@pytest.mark.parametrize("name", CONFIGS)
def test_options_of_a_run_give_it_back(name):
    run = RunConfig(method=CONFIGS[name](), seed=3, log_every=7)
    assert parse_train(options_of(run)).run == run


def test_print_config_can_be_read_back(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *QUICK, "--method", "lora", "--method.targets=[q,fc2]", "--print_config"])
    assert stop.value.code == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert not os.path.exists("runs")
    expected = LoRAConfig(iterations=3, rank=2, batch_size=8, targets=("q", "fc2"))
    assert parse_train(["--config", "run.yaml"]).run.method == expected


def test_config_of_a_run_can_be_read_back(capsys, tmp_path, no_plots):
    assert run(capsys, "train", *QUICK, "--seed=4", "--out=first")[0] == 0
    assert run(capsys, "train", "--config", "first/config.yaml", "--out=second")[0] == 0
    for file in ("config.yaml", "accuracy.csv", "log.csv", "metrics.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method.rnk", "4"], r"option is '--method.rnk'; accepted: .* Did you mean '--method.rank'\?"),
        (["--sed=4"], "option is '--sed'; .* Did you mean '--seed'"),
        (["--method", "codira"], "method is 'codira'; accepted: codyra, .*Did you mean 'codyra'"),
        (["--benchmark", "demmo"], "benchmark is 'demmo'; accepted: demo, .*Did you mean 'demo'"),
        (["--method", "lora", "--method.kappa_max", "1"], "option is '--method.kappa_max'"),
        (["--method.rank", "0"], "rank is 0; it must be an integer >= 1"),
        (
            ["--method.rank", "many"],
            r'Parser key "method.rank": Expected a .*int.* Got value: many. See `fastlora train',
        ),
        (["--method.kappa_max=-0.1"], "kappa_max is -0.1; it must be a finite number >= 0"),
        (["--method.kappa_max=.nan"], "kappa_max is nan"),
        (["--method.prox=exakt"], "prox is 'exakt'; accepted: exact, released. Did you mean 'exact'"),
        (["--resum"], "option is '--resum'; .* Did you mean '--resume'"),
        (["--dryrun"], "option is '--dryrun'; .* Did you mean '--dry-run'"),
        (["--seeds=0"], "seeds is '0'; it must be different seeds such as 0,1,2, or their number"),
        (["--seeds=1,1"], "seeds is '1,1'"),
        (["--seeds=many"], "seeds is 'many'"),
        (["--processes=0"], "processes is 0; it must be an integer >= 1"),
        (["--seed=-1"], "seed is -1; it must be an integer >= 0"),
        (["more"], "nrecognized arguments: more"),
        (["--config"], "--config was given without a file"),
        (["--config", "none.yaml"], "--config none.yaml cannot be read .*No such file"),
    ],
)
def test_wrong_command_line(capsys, arguments, message):
    code, out, err = run(capsys, "train", *arguments)
    assert code == 2 and out == "" and re.search(message, err)
    assert not os.listdir(".")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 4", "run.yaml: key is 'sed'; accepted: benchmark, .* Did you mean 'seed'"),
        ("method: {rnk: 4}", "run.yaml: key of method codyra is 'rnk'; .* Did you mean 'rank'"),
        ("method: {name: lora, kappa_max: 1}", "run.yaml: key of method lora is 'kappa_max'"),
        ("method: [codyra]", r"run.yaml: method is \['codyra'\]; give its name, or a mapping"),
        ("method: {name: codira}", "Did you mean 'codyra'"),
        ("- 1", "run.yaml holds a list; it must hold `key: value` lines"),
        ("a: [", "run.yaml is not YAML"),
        ("seed: many", 'Parser key "seed"'),
    ],
)
def test_wrong_config_file(capsys, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    code, _, err = run(capsys, "train", "--config", "run.yaml")
    assert code == 2 and re.search(message, err)


def test_usage_errors_are_value_errors():
    with pytest.raises(UsageError):
        parse_train(["--nonsense"])
    assert issubclass(UsageError, ValueError)


# ---- runs


def test_train_report_eval_compare(capsys, tmp_path):
    """The way of a user: train two methods, look at one again, evaluate it again, compare."""
    code, out, err = run(capsys, "train", *QUICK)
    assert code == 0 and err == ""
    path = tmp_path / "runs" / "tiny-codyra-seed0"
    assert f"Report: {path.relative_to(tmp_path) / 'report.html'}" in out and "Learning %" in out
    assert (path / "report.html").stat().st_size > 50_000 and len(list((path / "plots").iterdir())) >= 6
    assert yaml.safe_load((path / "config.yaml").read_text())["method"]["kappa_max"] == 0.4  # the preset is in effect

    assert run(capsys, "train", "--benchmark=tiny", "--method=zero_shot", "--out=zero")[0] == 0
    (path / "report.html").unlink()
    code, out, _ = run(capsys, "report", path)
    assert code == 0 and "codyra on tiny, seed 0: finished" in out and (path / "report.html").exists()

    for task in (None, 0, 1, 2):
        code, out, _ = run(capsys, "eval", path, *([] if task is None else ["--task", task]))
        assert code == 0 and "equal to the recorded row" in out
    assert "checkpoints/task_02.safetensors" in out

    code, out, _ = run(capsys, "compare", path, "zero", "--out", "plot.png")
    assert code == 0 and "zero_shot" in out and "nothing forgets nothing" in out
    assert "Comparison: plot.png" in out and (tmp_path / "plot.png").exists() and str(path / "plots") in out
    code, out, _ = run(capsys, "compare", path, "zero", "--json")
    assert code == 0 and [group["label"] for group in json.loads(out)["groups"]] == ["codyra r=2", "zero_shot"]


@pytest.mark.parametrize(
    ("method", "source"),
    [
        ("full", "checkpoints/task_02.safetensors"),
        ("joint", "checkpoints/task_01.safetensors"),
        ("per_task", "the base model and 2 adapter files"),
    ],
)
def test_eval_of_methods_that_leave_no_sequence_of_adapters(capsys, tmp_path, no_plots, method, source):
    quick = [option for option in QUICK if method != "full" or "rank" not in option]
    assert run(capsys, "train", *quick, "--method", method, "--method.lr=0.01", "--out=run")[0] == 0
    code, out, _ = run(capsys, "eval", "run")
    assert code == 0 and f"from {source}" in out and "equal to the recorded row" in out
    code, out, err = run(capsys, "eval", "run", "--task", 1)
    if method == "full":
        assert code == 1 and "Train with --checkpoints all" in err
    else:
        assert code == 0 and "equal to the recorded row" in out


def test_eval_says_when_the_weights_are_others(capsys, tmp_path, no_plots):
    run(capsys, "train", *QUICK, "--out=run")
    checkpoint = tmp_path / "run" / "checkpoints" / "task_02.safetensors"
    state = load_file(checkpoint)
    state["visual.proj"] = -state["visual.proj"]  # every image feature turned round
    save_file(state, checkpoint)
    code, out, _ = run(capsys, "eval", "run")
    assert code == 0 and re.search(r"differs from the recorded row by up to \d", out)
    checkpoint.write_bytes(b"no weights")
    code, _, err = run(capsys, "eval", "run")
    assert code == 1 and "does not fit the benchmark's model" in err


def test_eval_refuses_another_test_set(capsys, tmp_path, no_plots):
    run(capsys, "train", *QUICK, "--out=run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    manifest["hashes"]["blue"]["test_labels_sha256"] = "0" * 64
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    code, _, err = run(capsys, "eval", "run")
    assert code == 1 and "'blue' has other test labels" in err


def test_a_run_that_exists_is_never_touched(capsys, tmp_path, no_plots):
    run(capsys, "train", "--benchmark=tiny", "--method=zero_shot", "--out=run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, out, err = run(capsys, "train", *QUICK, "--out=run")
    assert code == 1 and re.search("run exists already .a run, finished, 2 of 2 tasks.; .* Pass another --out", err)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["report", "eval", "compare"])
def test_no_run(capsys, command):
    code, _, err = run(capsys, command, "nowhere")
    assert code == 1 and "nowhere is not a run directory" in err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_a_readable_run(capsys, no_plots, monkeypatch, sent, code):
    """The signal arrives in the second task."""
    from fastlora.continual.methods import CoDyRA

    def after_step(self, ctx):
        if ctx.number == 2:
            os.kill(os.getpid(), sent)

    monkeypatch.setattr(CoDyRA, "after_step", after_step)
    handler = signal.getsignal(signal.SIGTERM)
    got, _, err = run(capsys, "train", *QUICK, "--out=run")
    assert got == code and "run holds the finished tasks; `fastlora report run` shows them" in err
    assert signal.getsignal(signal.SIGTERM) is handler
    got, out, _ = run(capsys, "report", "run")
    assert got == 0 and "codyra on tiny, seed 0: interrupted" in out and "after 1 red" in out and "after 2" not in out


def test_resume(capsys, no_plots, monkeypatch, tmp_path):
    """The same command with --resume, after a failure and after the end."""
    from fastlora.continual.methods import CoDyRA

    assert run(capsys, "train", *QUICK, "--out=whole", "--resume")[0] == 0  # nothing there: a new run
    with monkeypatch.context() as patch:
        patch.setattr(CoDyRA, "extra_loss", lambda self, ctx: torch.tensor(float("nan")) if ctx.number == 2 else None)
        code, _, err = run(capsys, "train", *QUICK, "--out=run")
        assert code == 1 and "loss is nan" in err and "the same command with --resume goes on from there" in err
    code, _, err = run(capsys, "train", *QUICK, "--out=run", "--method.lr=1", "--resume")
    assert code == 1 and "method.lr was 0.0005 and is 1.0 now" in err and "Give the options that" in err
    code, out, _ = run(capsys, "train", *QUICK, "--out=run", "--resume")
    assert code == 0 and "resumed after task 1/2; before, the run was stopped by an error (FloatingPointError" in out
    for file in ("accuracy.csv", "accuracy_union.csv", "log.csv", "ranks.csv", "metrics.json", "config.yaml"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    weights = [load_file(tmp_path / name / "checkpoints" / "task_02.safetensors") for name in ("run", "whole")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    before = (tmp_path / "run" / "manifest.json").read_bytes()
    code, out, _ = run(capsys, "train", *QUICK, "--out=run", "--resume")
    assert code == 0 and "run is finished already; nothing was trained" in out and "Learning %" in out
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    code, _, err = run(capsys, "train", *QUICK, "--seed=1", "--out=run", "--resume")
    assert code == 1 and "seed was 0 and is 1 now" in err


@pytest.mark.parametrize("method", sorted(CONFIGS.keys() - {"zscl"}))  # which needs reference data
def test_dry_run(capsys, tmp_path, method):
    code, out, err = run(capsys, "train", "--benchmark=tiny", f"--method={method}", "--dry-run", "--out=run")
    assert code == 0 and err == "" and not os.listdir(tmp_path)
    assert f"{method} on tiny, seed 0, on cpu: the plan; nothing is trained." in out
    assert "commit point" in out and "Class names that tasks share: none." in out


@pytest.mark.slow
def test_seeds_on_the_demo(capfd, tmp_path):
    """Two processes; of what is resumed one is finished already, the other damaged."""
    quick = ["--method=zero_shot", "--out", tmp_path]
    code, out, _ = run(capfd, "train", *quick, "--seeds=0,1")
    assert code == 0 and "zero_shot, mean over seeds 0, 1, own" in out and "mean ± s.d. over seeds" in out
    (tmp_path / "seed1" / "manifest.json").write_text("{}")
    (tmp_path / "seed1" / "checkpoints" / "state.safetensors").write_text("no state")
    code, out, err = run(capfd, "train", *quick, "--seeds=0,1", "--resume")
    assert code == 1 and "seed 1 | fastlora train: " in err and "state.safetensors is damaged" in err
    assert "seed 1 of 2 failed; the others are whole" in err
    assert "zero_shot, seed 0, own label space" in out


def test_a_failure_is_one_message(capsys, monkeypatch):
    from fastlora.continual.methods import CoDyRA

    monkeypatch.setattr(CoDyRA, "extra_loss", lambda self, ctx: torch.tensor(float("nan")))
    code, _, err = run(capsys, "train", *QUICK, "--out=run")
    assert code == 1 and "fastlora train: the loss is nan at iteration 0 (from 0) of task 1 (red)" in err


def test_works_outside_the_main_thread(capsys):
    """Where no signal handler can be set, as in a notebook's worker."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["doctor"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_selection_of_runs(capsys, tmp_path, no_plots):
    """One file a run; a table, or JSON, and nothing else on stdout."""
    for method in ("codyra", "random_selection"):
        assert run(capsys, "train", *QUICK, "--method", method, "--out", method)[0] == 0
    code, out, err = run(capsys, "compare", "--selection", "codyra", "random_selection")
    assert code == 0 and "codyra on tiny, seed 0, task red, other task blue:" in out and "training 5 of 5" in err
    assert "other gates, same data" in out and "other choice, same data" in out and "written: codyra/selection" in out
    code, out, _ = run(capsys, "compare", "--selection", "--json", "codyra")
    saved = json.loads((tmp_path / "codyra" / "selection.json").read_text())
    assert code == 0 and json.loads(out) == [saved] and len(saved["comparisons"]) == 4
    code, _, err = run(capsys, "compare", "--selection", "codyra", "--out", "x.png")
    assert code == 2 and "--selection draws nothing; leave --out away" in err


# ---- merge


@pytest.fixture
def trained(capsys, tmp_path, no_plots):
    """base.safetensors, and a run with the state after each of its tasks."""
    state = {key: value.clone() for key, value in tiny().model.state_dict().items()}
    save_file(state, tmp_path / "base.safetensors", {"origin": "test"})
    assert run(capsys, "train", *QUICK, "--checkpoints=all", "--out=run")[0] == 0
    return tmp_path / "run"


def test_merge_of_files_is_the_merge_of_the_trainer(capsys, tmp_path, trained):
    """Task by task from the base to the last checkpoint, bit for bit, q, k and v rows of the packed weight included."""
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    assert run(capsys, "merge", "base.safetensors", first, "--out", "one.safetensors")[0] == 0
    code, out, _ = run(capsys, "merge", "one.safetensors", second, "--out", "two.safetensors")
    assert code == 0 and "written: two.safetensors" in out
    for name, number in (("one", 1), ("two", 2)):
        merged, expected = (
            load_file(f"{name}.safetensors"),
            load_file(trained / "checkpoints" / f"task_0{number}.safetensors"),
        )
        assert merged.keys() == expected.keys()
        for key in merged:
            assert torch.equal(merged[key], expected[key]), key


def test_merge_of_a_journal_at_once(capsys, tmp_path, trained):
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    code, out, _ = run(capsys, "merge", "base.safetensors", first, second, "--out", "two.safetensors")
    assert code == 0 and f"{first}\n" in out and f"{second}\n" in out and out.count("modules merged by") == 2
    merged, expected = load_file("two.safetensors"), load_file(trained / "checkpoints" / "task_02.safetensors")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[key], expected[key]) for key in merged)
    assert run(capsys, "merge", "base.safetensors", second, "--out", "alone.safetensors")[0] == 0  # task 1 dropped
    model = tiny().model
    fastlora.Journal(trained / "adapters").rebuild(model, tasks=[2])
    alone = load_file("alone.safetensors")
    assert all(torch.equal(value, alone[key]) for key, value in model.state_dict().items())


def test_merge_in_another_order_than_that_of_the_journal(capsys, tmp_path, trained):
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    for files in ((second, first), (first, first)):
        code, _, err = run(capsys, "merge", "base.safetensors", *files, "--out", "out.safetensors")
        assert code == 1 and "merged in the order of its tasks, each once" in err
    assert not (tmp_path / "out.safetensors").exists()


def test_merge_into_weights_that_are_not_the_base(capsys, tmp_path, trained):
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    state = load_file("base.safetensors")
    state["logit_scale"] += 1
    save_file(state, tmp_path / "other.safetensors")
    run(capsys, "merge", "base.safetensors", first, "--out", "one.safetensors")
    for base, message in (
        ("one.safetensors", "one.safetensors differs from the adapters' base model .* it has been merged already"),
        ("other.safetensors", "other.safetensors differs .* another model of the same shapes"),
    ):
        code, _, err = run(capsys, "merge", base, first, second, "--out", "out.safetensors")
        assert code == 1 and re.search(message, err)
    assert not (tmp_path / "out.safetensors").exists()


def test_merge_of_files_of_which_the_last_is_damaged(capsys, tmp_path, trained):
    first, second = (trained / "adapters" / f"task_0{i}.safetensors" for i in (1, 2))
    (tmp_path / "out.safetensors").write_text("mine")
    content = bytearray(second.read_bytes())
    content[-9] ^= 8
    second.write_bytes(content)
    code, out, err = run(capsys, "merge", "base.safetensors", first, second, "--out", "out.safetensors", "--force")
    assert code == 1 and out == "" and f"{second} is damaged" in err
    assert (tmp_path / "out.safetensors").read_text() == "mine"


def test_merge_never_overwrites_unless_told(capsys, tmp_path, trained):
    adapter = trained / "adapters" / "task_01.safetensors"
    (tmp_path / "out.safetensors").write_text("mine")
    code, _, err = run(capsys, "merge", "base.safetensors", adapter, "--out", "out.safetensors")
    assert code == 1 and "out.safetensors exists; it is not overwritten without --force" in err
    assert (tmp_path / "out.safetensors").read_text() == "mine"
    assert run(capsys, "merge", "base.safetensors", adapter, "--out", "out.safetensors", "--force")[0] == 0
    assert load_file("out.safetensors").keys() == load_file("base.safetensors").keys()


def test_merge_of_what_does_not_fit(capsys, tmp_path, trained):
    adapter = trained / "adapters" / "task_01.safetensors"
    state = load_file("base.safetensors")
    cases = {
        "other": (
            {"fc.weight": torch.zeros(2, 2)},
            "has no weight for the adapter of visual.transformer.resblocks.0.attn.q",
        ),
        "narrow": (
            state | {"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(9, 32)},
            "in_proj_weight is float32[9, 32], there float32[96, 32]",
        ),
    }
    for name, (content, message) in cases.items():
        save_file(content, tmp_path / f"{name}.safetensors")
        code, _, err = run(capsys, "merge", f"{name}.safetensors", adapter, "--out", "out.safetensors")
        assert code == 1 and message in err
    for base, file, message in (
        ("run/log.csv", adapter, "run/log.csv is not a readable safetensors file"),
        ("base.safetensors", "base.safetensors", "has format None"),
        ("absent.safetensors", adapter, "absent.safetensors"),
    ):
        code, _, err = run(capsys, "merge", base, file, "--out", "out.safetensors")
        assert code == 1 and message in err
    code, _, err = run(capsys, "merge", "base.safetensors", adapter, "--out", "missing/out.safetensors")
    assert code == 1 and "missing is no directory" in err
    assert not (tmp_path / "out.safetensors").exists() and not list(tmp_path.glob(".*"))


def test_merge_refuses_a_broken_adapter(capsys, tmp_path, trained):
    model = tiny().model
    fastlora.inject(model, rank=2)
    model.visual.transformer.resblocks[0].attn.k.lora_a.data[:] = float("nan")
    fastlora.save_adapter(model, tmp_path / "broken.safetensors")
    code, _, err = run(capsys, "merge", "base.safetensors", "broken.safetensors", "--out", "out.safetensors")
    assert code == 1 and "visual.transformer.resblocks.0.attn.k" in err and not (tmp_path / "out.safetensors").exists()


# ---- the rest


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in (
        f"fastlora        {fastlora.__version__}",
        "python ",
        "torch ",
        "triton ",
        "open_clip ",
        "extension ",
        "backend ",
    ):
        assert word in out


def test_help_and_version(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name} " in out for name in cli.COMMANDS)
    assert list(cli.COMMANDS) == ["train", "eval", "report", "compare", "merge", "tune", "doctor"]
    assert run(capsys)[0] == 2
    assert run(capsys, "--version")[1] == f"fastlora {fastlora.__version__}\n"
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0 and f"usage: fastlora {command}" in capsys.readouterr().out


def test_unknown_command(capsys):
    code, _, err = run(capsys, "trian")
    assert (
        code == 2
        and "no command 'trian'; accepted: train, eval, report, compare, merge, tune, doctor. Did you mean 'train'?"
        in err
    )


def test_missing_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    code, _, err = run(capsys, "train", *QUICK)
    assert code == 1 and "needs jsonargparse, which is not installed. Run: pip install 'fastlora[train]'" in err


def test_quick_commands_do_not_import_torch():
    """`--help`, `--print_config` and wrong command lines answer at once."""
    code = "import sys; from fastlora import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    for arguments in (["--help"], ["train", "--print_config"], ["train", "--nonsense"], ["tune", "--rank=many"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_terminated_as_a_user_does_it(tmp_path):
    """The demo in a process of its own: SIGTERM after the first line, exit code 143, a readable run."""
    command = [sys.executable, "-m", "fastlora.cli", "train", "--method.rank=2", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert first.startswith("codyra  before training:")
    assert process.returncode == 143 and "terminated" in err and "Traceback" not in err
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "interrupted"
    assert len((tmp_path / "run" / "accuracy.csv").read_text().splitlines()) == 2
