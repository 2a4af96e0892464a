"""What the words of `fastlora train` and config files make: one config, or one message."""

import os
import re

import pytest
from cli.tiny import QUICK
from helpers import run

from fastlora import cli
from fastlora.continual import benchmarks
from fastlora.continual.arguments import options_of, parse_train
from fastlora.continual.config import CONFIGS, CoDyRAConfig, LoRAConfig, RunConfig, UsageError, ZeroShotConfig


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
