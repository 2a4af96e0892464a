import dataclasses
import re

import pytest

from fastlora.continual.config import CONFIGS, CoDyRAConfig, LoRAConfig, ZeroShotConfig, method_config


def test_published_defaults():
    """Rank 16, 500 iterations of 64, lr 5e-4, 50 values up to 0.005, dense half, six targets, both towers."""
    assert CoDyRAConfig().as_dict() == {
        "name": "codyra",
        "rank": 16,
        "iterations": 500,
        "batch_size": 64,
        "lr": 5e-4,
        "clip_norm": 0.0,
        "merge_scale": 1.0,
        "targets": ["q", "k", "v", "out", "fc1", "fc2"],
        "where": "all",
        "distillation": 0.0,
        "teacher": "previous",
        "distil_on": "task",
        "temperature": 2.0,
        "references": 8192,
        "kappa_max": 0.005,
        "kappa_steps": 50,
        "dense": 0.5,
        "prox": "exact",
        "gate_init": "normal",
        "gate_lr": None,
        "gates": "trained",
        "drop_dead": True,
    }


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CoDyRAConfig().rank = 3


def test_targets_are_kept_in_canonical_order():
    assert LoRAConfig(targets=["fc2", "q"]).targets == ("q", "fc2")


@pytest.mark.parametrize("name", CONFIGS)
def test_as_dict_round_trip(name):
    config = CONFIGS[name]()
    assert method_config(**config.as_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0; it must be an integer >= 1"),
        ({"rank": 2.5}, "rank is 2.5; it must be an integer"),
        ({"rank": True}, "rank is True; it must be an integer"),
        ({"iterations": 0}, "iterations is 0; it must be an integer >= 1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"lr": 0.0}, "lr is 0.0; it must be a finite number > 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"kappa_max": -0.1}, "kappa_max is -0.1; it must be a finite number >= 0"),
        ({"kappa_max": float("nan")}, "kappa_max is nan"),
        ({"kappa_max": float("inf")}, "kappa_max is inf"),
        ({"kappa_steps": 1}, "kappa_steps is 1; it must be an integer >= 2"),
        ({"dense": 1.5}, r"dense is 1.5; it must be a finite number in \[0, 1\]"),
        ({"prox": "exakt"}, "prox is 'exakt'; accepted: exact, released. Did you mean 'exact'"),
        ({"gate_init": "zeros"}, "gate_init is 'zeros'; accepted: normal, ones"),
        ({"drop_dead": "no"}, "drop_dead is 'no'; it must be true or false"),
        ({"where": "visual"}, "where is 'visual'; accepted: all, vision, text"),
        ({"targets": []}, "targets is .*; it must name at least one"),
        ({"targets": ["q", "q"]}, "each at most once"),
        ({"targets": "qv"}, "must be a list out of q, k, v, out, fc1, fc2"),
        ({"targets": ["q", "fc3"]}, "target is 'fc3'; accepted: q, k, v, out, fc1, fc2. Did you mean 'fc"),
    ],
)
def test_bad_value(options, message):
    with pytest.raises(ValueError, match=message):
        CoDyRAConfig(**options)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match=r"method is 'codira'; accepted: codyra, .*Did you mean 'codyra'\?"):
        method_config("codira")


def test_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="option of method lora is 'rnk'; accepted: .*rank, .* Did you mean 'rank'"):
        method_config("lora", rnk=4)


def test_a_method_does_not_take_another_ones_option():
    with pytest.raises(ValueError, match="option of method lora is 'kappa_max'"):
        method_config("lora", kappa_max=0.1)
    with pytest.raises(ValueError, match="option of method zero_shot is 'rank'; accepted: \\(none\\)"):
        method_config("zero_shot", rank=4)
    assert isinstance(method_config("zero_shot"), ZeroShotConfig)


def test_help_of_an_option_is_that_of_the_class_which_has_it():
    lines = [line for line in CoDyRAConfig.__doc__.splitlines() if re.match(r" {4}\w", line)]
    documented = [line.split(":")[0].strip() for line in lines]
    assert documented == [field.name for field in dataclasses.fields(CoDyRAConfig)]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_documented(name):
    for field in dataclasses.fields(CONFIGS[name]):
        assert f"    {field.name}: " in CONFIGS[name].__doc__ or f", {field.name}: " in CONFIGS[name].__doc__
