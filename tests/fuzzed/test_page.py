"""docs/fuzzing.md is what fuzzing found, of the readers that there are."""

import json

import fuzz
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from fuzzed.readers import READERS  # noqa: E402

RESULT = json.loads(fuzz.RESULT.read_text())


def test_the_page_shows_what_was_found():
    assert fuzz.PAGE.read_text() == fuzz.page(RESULT)


def test_every_reader_had_its_inputs_and_nothing_is_left():
    assert list(RESULT["readers"]) == list(READERS)
    for name, found in RESULT["readers"].items():
        assert found["inputs"] >= 10_000 and found["edges"] > 0 and found["corpus"] > 0, name
        assert not found["findings"] and not found["died"] and found["longest_ms"] < 5_000, name


def test_what_is_left_shows():
    changed = json.loads(json.dumps(RESULT))
    changed["readers"]["run"]["findings"] = ["KeyError at continual/saved_run.py:1"]
    assert fuzz.page(changed) != fuzz.page(RESULT)


def test_the_shortest_input_of_a_finding_is_kept(tmp_path):
    for given in (b"long one", b"short", b"longer one"):
        fuzz.keep(tmp_path, given, "KeyError", "a/b.py:3", "text")
    assert (tmp_path / "KeyError-a-b-py-3").read_bytes() == b"short"
    assert (tmp_path / "KeyError-a-b-py-3.txt").read_text() == "KeyError at a/b.py:3\ntext\n"


def test_what_was_mended_is_counted():
    assert fuzz.kept("run") >= 4 and sum(map(fuzz.kept, READERS)) == sum(
        path.is_file() for path in fuzz.KEPT.rglob("*")
    )
