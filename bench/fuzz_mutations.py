"""Mutations that leave most of a text standing: one value of it is another. Of JSON that is a string in JSON, too."""

from __future__ import annotations

import json
import random
import re

# what a mutation by bytes would not come upon
WORDS = (
    "{}", "[]", "null", "true", '""', "-1", "0", "1", "2.5", "1e999", "1e300", "-1e-300", "NaN", "nan", "Infinity", "inf", "[[[[[[[[",
    '{"a":{}}', "[1]", '["a"]', '"a"', "9" * 25, "1" + "0" * 400, "4294967296", "9223372036854775807", "[" * 3000,
    '"F32"', '"F16"', '"BF16"', '"I64"', '"BOOL"', '"F8_E4M3"', '"C64"', "[0]", "[0,0]", "[2,3,4]", '"__metadata__"',
    '"\\u0000"', '"\\ud800"', '"\\n"', '"../../a"', '"0"', '"settings"', '"format"', '"fastlora.adapter/1"',
    "\n", ",", ": ", "- ", "&a [*a]", "!!python/name:os.system ", "!!timestamp 1", "!!binary a", "name: ", "method: ", "~", ".5", "1:2",
)  # fmt: skip
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\w+|\s+|.', re.DOTALL)


def mutated(text: str, choose: random.Random, depth: int = 3) -> str:
    """`text` with one to three of its tokens changed, gone, doubled or exchanged."""
    tokens = _TOKEN.findall(text)
    if not tokens:
        return choose.choice(WORDS)
    for _ in range(choose.choice((1, 1, 2, 3))):
        at, kind = choose.randrange(len(tokens)), choose.randrange(8)
        if tokens[at].isspace() or len(tokens[at]) == 1 and choose.random() < 0.7:
            at = choose.randrange(len(tokens))  # rather a value than a comma
        inner = _inside(tokens[at]) if depth else None
        if inner is not None and choose.random() < 0.8:
            tokens[at] = json.dumps(mutated(inner, choose, depth - 1))
        elif kind < 4:
            tokens[at] = choose.choice(WORDS)
        elif kind == 4:
            tokens[at] = choose.choice(tokens)
        elif kind == 5:
            tokens[at] = ""
        elif kind == 6:
            other = choose.randrange(len(tokens))
            tokens[at], tokens[other] = tokens[other], tokens[at]
        else:
            length = choose.randint(1, 12)
            tokens[at:at] = tokens[at : at + length]
    return "".join(tokens)


def _inside(token: str) -> str | None:
    """The JSON that a string holds."""
    if len(token) < 4 or token[0] != '"' or token[1] not in "{[":
        return None
    try:
        return json.loads(token)
    except ValueError:
        return None
