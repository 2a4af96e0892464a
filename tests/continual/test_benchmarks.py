import dataclasses
from pathlib import Path

import pytest
import yaml

from fastlora.continual.arguments import parse_train
from fastlora.continual.benchmarks import BENCHMARKS, benchmark
from fastlora.continual.config import (
    CONFIGS,
    CoDyRAConfig,
    DataConfig,
    LoRAConfig,
    RunConfig,
    UsageError,
    method_config,
)
from fastlora.continual.datasets.catalogue import SOURCES
from fastlora.optim import KappaSchedule

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_presets_are_options_of_their_methods():
    for entry in BENCHMARKS.values():
        for name, config in CONFIGS.items():
            method_config(name, **entry.preset(config))
        assert set(entry.presets) <= set(CONFIGS)


def test_demo_keeps_the_published_total_shrink():
    preset = benchmark("demo").preset(CoDyRAConfig)
    published = KappaSchedule().total_shrink
    scaled = KappaSchedule.for_shrink(published, total=preset["iterations"])
    assert preset["kappa_max"] == pytest.approx(scaled.kappa_max, abs=5e-5)


def test_lora_differs_from_codyra_in_the_gates_alone():
    demo = benchmark("demo")
    codyra, lora = CoDyRAConfig(**demo.preset(CoDyRAConfig)), LoRAConfig(**demo.preset(LoRAConfig))
    shared = lora.as_dict()
    assert {key: value for key, value in codyra.as_dict().items() if key in shared} == shared | {"name": "codyra"}


def test_unknown_benchmark():
    with pytest.raises(ValueError, match="benchmark is 'demmo'; accepted: demo, .*Did you mean 'demo'"):
        benchmark("demmo")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "demo",
            {"model": "ViT-B-16"},
            "model is 'ViT-B-16', but the benchmark 'demo' does not read it; it reads none",
        ),
        ("demo", {"data": DataConfig(root="x")}, "data.root is 'x', but the benchmark 'demo'"),
        (
            "xtail",
            {"data": DataConfig(order="II")},
            "data.order is 'II', but the benchmark 'xtail' does not .* data.root",
        ),
        ("mtil", {"data": DataConfig(prompts="single")}, "data.prompts is 'single', but the benchmark 'mtil'"),
        ("mtil", {"data": DataConfig(tasks=["x"])}, "data.tasks is"),
        ("folders", {"data": DataConfig(order="I")}, "data.order is 'I'"),
    ],
)
def test_an_option_that_a_benchmark_does_not_read_is_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        benchmark(name).load(RunConfig(benchmark=name, **options))
    parts = [f"--{key}={value}" for key, value in options.items() if key != "data"]
    if "data" in options:
        given = {key: value for key, value in options["data"].as_dict().items() if value is not None}
        parts += [f"--data.{key}={value}" for key, value in given.items()]
    with pytest.raises(UsageError, match=message):
        parse_train([f"--benchmark={name}", *parts])


def test_options_of_a_benchmark_exist():
    known = {f"data.{field.name}" for field in dataclasses.fields(DataConfig)} | {"model", "pretrained"}
    assert set().union(*(entry.options for entry in BENCHMARKS.values())) == known


def test_completed_keeps_what_is_given():
    given = RunConfig(benchmark="xtail", model="RN50", data=DataConfig(shots=4, cache_gb=0))
    config = benchmark("xtail").completed(given)
    assert (config.model, config.pretrained, config.data.shots, config.data.cache_gb) == ("RN50", "openai", 4, 0)
    assert benchmark("xtail").completed(config) == config


# ---- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_run(path):
    """All but those of methods that this version does not have."""
    content = yaml.safe_load(path.read_text())
    if content["method"]["name"] not in CONFIGS:
        pytest.skip(f"there is no method {content['method']['name']}")
    run = parse_train(["--config", str(path), "--data.root", "somewhere"]).run
    assert path.stem.startswith({"xtail": "xtail_", "mtil": "mtil"}[run.benchmark])
    assert (run.model, run.pretrained) == ("ViT-B-16", "openai")
    assert run.data.shots == {"xtail": 16, "mtil5": 5, "mtil": 0}[path.stem.split("_")[0]]
    assert path.read_text().startswith("# ") and run.data.reference is None


def test_recipes_of_codyra_are_the_published_options():
    for name, iterations in (("xtail_codyra", 500), ("mtil5_codyra", 500)):
        method = parse_train(["--config", str(ROOT / "recipes" / f"{name}.yaml")]).run.method
        assert method == CoDyRAConfig(iterations=iterations)


def test_recipes_are_listed_in_the_docs():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [path.name for path in RECIPES if path.name not in text] == []


def test_docs_say_where_every_file_lies():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for source in SOURCES.values():
        places = {str(source.coop), str(source.torchvision)}
        needed = [*places, *source.files, *([source.split] if source.split else [])]
        assert [part for part in needed if part not in text] == [], source.name
