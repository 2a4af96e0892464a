"""The command line of `fastlora train`: a YAML file, overridden option by option.

What decides, first to last: the method's own defaults, the benchmark's preset for it, the YAML files, the command line.
Both `method: codyra` and `method: {name: codyra, rank: 16}` are understood, and both `--method codyra` and
`--method.name codyra`.
"""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.continual.benchmarks import BENCHMARKS, Benchmark, benchmark
from fastlora.continual.config import (
    CONFIGS,
    DataConfig,
    MethodConfig,
    RunConfig,
    UsageError,
    check_one_of,
    flat,
    run_config,
)
from fastlora.continual.configs.base import check_count
from fastlora.continual.yaml_text import parse_yaml

# of the command, not of the run: its config.yaml leaves them out
_NOT_SAVED = ("out", "resume", "dry_run", "seeds", "processes")

_DESCRIPTION = """Train a method on a benchmark and write a run directory. Default: CoDyRA on the embedded benchmark.
The options --method.KEY are those of the method asked for: `fastlora train --method lora --help`."""


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """What to train, and how.

    Args:
        run: the run; of several seeds, the first.
        out: its directory, or the one that holds the directories of several seeds.
        resume: go on with what is in `out`.
        dry_run: print the plan, train nothing.
        seeds: of a run each; empty for the one run of `run.seed`.
        processes: that work on several seeds at once; None for as many as the machine can run.
    """

    run: RunConfig
    out: Path
    resume: bool = False
    dry_run: bool = False
    seeds: tuple[int, ...] = ()
    processes: int | None = None


def parse_train(argv: Sequence[str]) -> TrainArguments:
    """Read the arguments after `fastlora train`.

    Raises:
        UsageError: unknown option, key, method or benchmark (the nearest is named), or a value that does not fit.
        SystemExit: --help or --print_config was answered.
    """
    arguments, files = _split(argv)
    configs = [(path, _read(path)) for path in files]
    method, bench = "codyra", "demo"
    for _, config in configs:
        method, bench = config.get("method", {}).get("name", method), config.get("benchmark", bench)
    method = _value_of("--method.name", arguments) or method
    bench = _value_of("--benchmark", arguments) or bench
    try:
        check_one_of("method", method, CONFIGS)
        parser = _parser(CONFIGS[method], benchmark(bench))
        for path, config in configs:
            _check_keys(path, config, CONFIGS[method])
        known = [option for action in parser._actions for option in action.option_strings]
        for argument in arguments:
            if argument.startswith("--"):
                check_one_of("option", argument.split("=")[0], known)
        # files first, so that an option decides also when it stands before --config
        given = [part for _, config in configs for part in ("--config", _dump(config))]
        values = parser.parse_args([*given, *arguments]).as_dict()
        values.pop("config")
        rest = {key: values.pop(key) for key in _NOT_SAVED}
        run = benchmark(bench).completed(run_config(values))
        seeds = _seeds(rest.pop("seeds"), run.seed)
        if rest["processes"] is not None:
            check_count("processes", rest["processes"], "Give how many seeds to train at once.")
    except ArgumentError as error:
        raise UsageError(f"{' '.join(str(error).split())}. See `fastlora train --method {method} --help`.") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    name = f"{run.benchmark}-{run.method.name}" + ("" if seeds else f"-seed{run.seed}")
    out = Path(rest.pop("out") or Path("runs") / name)
    return TrainArguments(run, out, seeds=seeds, **rest)


def options_of(config: RunConfig) -> list[str]:
    """The command line that gives `config` whatever the defaults and presets are."""
    values = flat(config.as_dict())
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _parser(config: type[MethodConfig], bench: Benchmark) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="fastlora train", description=_DESCRIPTION, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file; options on the command line override it.")
    parser.add_class_arguments(RunConfig, None, as_group=False, skip={"method", "data"})
    parser.add_class_arguments(DataConfig, "data", as_group=False)
    parser.add_argument(
        "--out", type=str, default=None, help="run directory to make (default: runs/BENCHMARK-METHOD-seedN)."
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in its directory from its last finished task; the task in work starts again. "
        f"Same command otherwise; {', '.join(RunConfig.MAY_CHANGE)} may change.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print tasks, sizes and memory, and train nothing.")
    parser.add_argument(
        "--seeds",
        type=str | None,
        help="a run for each: 0,1,2; or their number from --seed on: 3. In parallel processes, each in OUT/seedN "
        "(default OUT: runs/BENCHMARK-METHOD); at the end the mean and s.d. over them.",
    )
    parser.add_argument(
        "--processes", type=int | None, help="with --seeds: trained at once (default: one a core, or one a GPU)."
    )
    names = f"also written --method NAME; one of {', '.join(CONFIGS)}. Benchmarks: {', '.join(BENCHMARKS)}."
    parser.add_argument("--method.name", type=str, default=config.name, help=names)
    parser.add_class_arguments(config, "method", as_group=False)
    parser.set_defaults({f"method.{key}": value for key, value in bench.preset(config).items()} | bench.options)
    return parser


def _seeds(text: str | None, first: int) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        given = [int(part) for part in text.split(",")]
    except ValueError:
        given = [-1]
    seeds = given if "," in text else range(first, first + given[0])
    if min(given) < 0 or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"seeds is {text!r}; it must be different seeds such as 0,1,2, or their number, from --seed on, such as 3."
        )
    return tuple(seeds)


def _split(argv: Sequence[str]) -> tuple[list[str], list[Path]]:
    """(arguments with --method NAME spelt out as --method.name NAME, config files)."""
    arguments, files, rest = [], [], iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--method":
            name = "--method.name"
        if name == "--config":
            value = value if equals else next(rest, "")
            if not value:
                raise UsageError(
                    "--config was given without a file; give a YAML file, such as the config.yaml of a run."
                )
            files.append(Path(value))
        else:
            arguments.append(f"{name}{equals}{value}")
    return arguments, files


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value of `option` on the command line."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None]):
        name, equals, value = argument.partition("=")
        if name == option:
            found = value if equals else following
    return found


def _read(path: Path) -> dict[str, Any]:
    """The file's mapping, with `method: NAME` spelt out."""
    try:
        config = parse_yaml(path.read_text())
    except OSError as error:
        raise UsageError(
            f"--config {path} cannot be read ({error.strerror}). Give a YAML file, such as a run's."
        ) from None
    except ValueError as error:
        raise UsageError(f"--config {path} is {error}") from None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError(f"--config {path} holds a {type(config).__name__}; it must hold `key: value` lines.")
    if isinstance(config.get("method"), str):
        config["method"] = {"name": config["method"]}
    if not isinstance(config.get("data") or {}, dict):
        raise UsageError(f"--config {path}: data is {config['data']!r}; give a mapping, such as `data: {{root: DIR}}`.")
    if not isinstance(config.get("method", {}), dict):
        raise UsageError(f"--config {path}: method is {config['method']!r}; give its name, or a mapping with a name.")
    return config


def _check_keys(path: Path, config: dict[str, Any], method: type[MethodConfig]) -> None:
    for key in config:
        check_one_of(
            f"--config {path}: key", key, [field.name for field in dataclasses.fields(RunConfig)] + list(_NOT_SAVED)
        )
    for key in config.get("data") or {}:
        check_one_of(f"--config {path}: key of data", key, [field.name for field in dataclasses.fields(DataConfig)])
    for key in config.get("method", {}):
        accepted = ["name", *(field.name for field in dataclasses.fields(method))]
        check_one_of(f"--config {path}: key of method {method.name}", key, accepted)


def _dump(config: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(config)
