"""YAML of settings, read as plain values."""

from __future__ import annotations

from typing import Any


def parse_yaml(text: str) -> Any:
    """What a text says.

    Raises:
        ValueError: it is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    # its constructors of numbers, truths and dates let out whatever a text leads them to, "!!timestamp 1" an AttributeError
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
