"""Mutations of bench/fuzz.py: texts that are mostly what they were."""

import json
import random

from fuzz_mutations import mutated

TEXT = json.dumps({"settings": json.dumps({"0": {"kappa": 0.5}}), "shape": [2, 3], "name": "a b"})


def test_much_of_a_text_stays():
    found = [mutated(TEXT, random.Random(seed)) for seed in range(300)]
    assert len(set(found)) > 150 and found == [mutated(TEXT, random.Random(seed)) for seed in range(300)]
    assert sum('"name"' in text for text in found) > 200
    assert isinstance(mutated("", random.Random(0)), str)


def test_what_is_json_in_json_is_mutated_as_such():
    inner = set()
    for seed in range(500):
        try:
            inner.add(json.loads(mutated(TEXT, random.Random(seed)))["settings"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    changed = {text for text in inner if isinstance(text, str) and text.startswith("{") and "kappa" in text}
    assert len(changed) > 10
