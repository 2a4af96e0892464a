"""Settings in YAML: plain values, or an error for users, soon."""

import time

import pytest
import yaml

from fastlora.continual.yaml_text import parse_yaml


def test_settings():
    text = (
        "method: {name: codyra, kappa: 1e-3}\nlog_to: [wandb]\nseed: 3\ndata: &a {root: null}\nmore: {<<: *a, b: 2}\n"
    )
    assert parse_yaml(text) == yaml.safe_load(text) and parse_yaml("") is None


def aliases(levels, of):
    """A list of `of` lists of the one before, and so on."""
    return "".join(f"a{i}: &b{i} [{', '.join([f'*b{i - 1}'] * of) if i else 'x'}]\n" for i in range(levels))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [", "while parsing"),
        ("!!timestamp 1", "groupdict"),
        ("2001-13-45", "month must be"),
        ("!!int x", "invalid literal"),
        ('!!int ""', "index out of range"),
        ("!!bool x", "'x'"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("- " * 20_000, "recursion"),
        ("[" * 20_000, "more than 50 lists within lists"),
        ("a: &a [*a]", "holds itself"),
        (aliases(40, 9), "more than 100000 values"),
        (aliases(60, 2), "more than 100000 values"),
        ("\0", "special characters are not allowed"),
    ],
)
def test_everything_else(text, why):
    started = time.perf_counter()
    with pytest.raises(ValueError, match="not YAML") as caught:
        parse_yaml(text)
    assert why in str(caught.value) and time.perf_counter() - started < 5
