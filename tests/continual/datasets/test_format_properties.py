"""Formats of the data sets: arrays, texts and lists that somebody else wrote are read as they were."""

from __future__ import annotations

import gzip
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from continual.datasets.layouts import idx
from hypothesis import given
from hypothesis import strategies as st

from fastlora.continual.datasets.disk_cache import DiskCache
from fastlora.continual.datasets.formats import read_idx, read_json, read_lines, read_mat, read_pickle
from fastlora.continual.datasets.split import DataError

DEADLY = Path(__file__).parent / "at_which_scipy_dies.mat"
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp", "Zs"]), min_size=1, max_size=8)


def drawn(shape, seed, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)


def written(content, name="file"):
    """A folder of its own, which lives as long as the path that is returned is read in the same test."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / name
    path.write_bytes(content)
    return folder, path


@given(SHAPES, st.integers(0, 99), st.booleans())
def test_idx(shape, seed, packed):
    array = drawn(shape, seed)
    content = idx(array)
    folder, path = written(gzip.compress(content) if packed else content, "file.gz" if packed else "file")
    with folder:
        assert np.array_equal(read_idx(path.with_name("file")), array)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 99), st.lists(st.integers(0, 99), max_size=5),
       st.lists(TEXTS, max_size=5), st.integers(2, 4))  # fmt: skip
def test_pickles(shape, seed, labels, texts, protocol):
    content = {"data": drawn(shape, seed), "fine_labels": labels, "names": texts}
    folder, path = written(pickle.dumps(content, protocol=protocol))
    with folder:
        found = read_pickle(path)
    assert np.array_equal(found["data"], content["data"]) and (found["fine_labels"], found["names"]) == (labels, texts)


@given(st.lists(TEXTS, max_size=5), st.dictionaries(TEXTS, st.lists(st.integers() | TEXTS, max_size=3), max_size=3))
def test_lists_and_json(lines, mapping):
    folder, path = written("\n".join(["", *lines, " "]).encode())
    with folder:
        assert read_lines(path) == lines
    folder, path = written(json.dumps(mapping).encode())
    with folder:
        assert read_json(path) == mapping


@given(st.binary(min_size=32, max_size=32), st.integers(0, 6), st.integers(0, 6), st.integers(0, 99))
def test_cached_images(key, height, width, seed):
    pixels = torch.from_numpy(drawn((3, height, width), seed))
    with tempfile.TemporaryDirectory() as folder:
        DiskCache(Path(folder) / "cache", 10**6).put(key, pixels)
        found = DiskCache(Path(folder) / "cache", 10**6).get(key)
    assert torch.equal(found, pixels)


# ---- MATLAB


def test_matlab_files(tmp_path):
    """What scipy finds in them, as lists."""
    io = pytest.importorskip("scipy.io")
    names = np.array([["a car", "Škoda", "b"]], object)
    rows = np.array([[("1.jpg", 3), ("2.jpg", 5)]], [("fname", object), ("class", object)])
    numbers = np.arange(3, dtype=np.uint8)
    variables = {"names": names, "rows": rows, "numbers": numbers, "one": 7.5, "text": "abc"}
    for packed in (False, True):
        io.savemat(tmp_path / "file.mat", variables, do_compression=packed)
        assert read_mat(tmp_path / "file.mat") == {
            "names": ["a car", "Škoda", "b"],
            "rows": [{"fname": "1.jpg", "class": 3}, {"fname": "2.jpg", "class": 5}],
            "numbers": [0, 1, 2],
            "one": [7.5],
            "text": ["abc"],
        }


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0", DEADLY.read_bytes()[:5000], DEADLY.read_bytes()])
def test_a_matlab_file_that_is_damaged_ends_no_run(tmp_path, content):
    """One of them was found by fuzzing: scipy dies of it."""
    pytest.importorskip("scipy")
    (tmp_path / "file.mat").write_bytes(content)
    with pytest.raises(DataError, match=r"file.mat is not a readable MATLAB file .* Download it again"):
        read_mat(tmp_path / "file.mat")
