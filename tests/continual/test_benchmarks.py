import pytest

from fastlora.continual.benchmarks import BENCHMARKS, benchmark
from fastlora.continual.config import CONFIGS, CoDyRAConfig, LoRAConfig, method_config
from fastlora.optim import KappaSchedule


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
