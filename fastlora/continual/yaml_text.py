"""YAML of settings, read as plain values."""

from __future__ import annotations

import functools
import math
from typing import Any

_DEEPEST = (
    50  # lists within lists; the time that yaml takes grows with the square of it, to minutes for a page of brackets
)
_LARGEST = 100_000  # values, with aliases written out: a hundred lines of aliases of aliases stand for more than any memory holds


def parse_yaml(text: str) -> Any:
    """What a text says.

    Raises:
        ValueError: it is no YAML.
    """
    import yaml

    try:
        found = yaml.load(text, _loader())
    # its constructors of numbers, truths and dates let out whatever a text leads them to, "!!timestamp 1" an AttributeError
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    if _written_out(found, {}) > _LARGEST:
        raise ValueError(f"not YAML of settings: it holds more than {_LARGEST} values, or a list that holds itself")
    return found


def _written_out(value: Any, known: dict[int, float]) -> float:
    """Number of values; infinity where one holds itself."""
    if not isinstance(value, (list, dict)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # while it is counted
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_out(each, known) for each in inner)
    return known[id(value)]


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """What safe_load takes, which builds nothing but plain values, up to a depth."""

        def fetch_flow_collection_start(self, kind: Any) -> None:
            if self.flow_level >= _DEEPEST:
                raise yaml.YAMLError(f"it has more than {_DEEPEST} lists within lists")
            super().fetch_flow_collection_start(kind)

    return Loader
