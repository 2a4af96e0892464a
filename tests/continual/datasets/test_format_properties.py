"""Formats of the data sets: arrays, texts and lists that somebody else wrote are read as they were."""

from __future__ import annotations

import gzip
import io
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
from fastlora.continual.datasets.formats import read_idx, read_json, read_lines, read_pickle
from fastlora.continual.datasets.matlab import MatlabError, parse_matlab

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


# ---- MATLAB, against scipy

NUMBERS = st.builds(
    drawn, st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 99),
    st.sampled_from(["u1", "i1", "u2", "i2", "i4", "u4", "i8", "u8", "f4", "f8", "bool"]),
)  # fmt: skip
CELLS = st.lists(NUMBERS | TEXTS, min_size=1, max_size=4).map(lambda values: _cell(values))
FIELDS = st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), NUMBERS | TEXTS, min_size=1, max_size=3)
VARIABLES = st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), NUMBERS | TEXTS | CELLS | FIELDS, max_size=4)


def _cell(values):
    cell = np.empty((1, len(values)), object)
    for i, value in enumerate(values):
        cell[0, i] = value
    return cell


def same(ours, theirs):
    if isinstance(theirs, np.ndarray) and theirs.dtype.names:
        return ours.dtype.names == theirs.dtype.names and all(
            same(ours[n][()], theirs[n][()]) for n in theirs.dtype.names
        )
    if isinstance(theirs, np.ndarray) and theirs.dtype == object:
        return ours.shape == theirs.shape and all(map(same, ours.flat, theirs.flat))
    return np.array_equal(ours, theirs)


def saved(variables, packed):
    savemat = pytest.importorskip("scipy.io").savemat
    file = io.BytesIO()
    savemat(file, variables, do_compression=packed)
    return file.getvalue()


@given(VARIABLES, st.booleans())
def test_matlab_files_are_read_as_scipy_reads_them(variables, packed):
    content = saved(variables, packed)
    theirs = pytest.importorskip("scipy.io").loadmat(io.BytesIO(content), squeeze_me=True)
    ours = parse_matlab(content)
    assert ours.keys() == variables.keys()
    assert all(same(value, theirs[name]) for name, value in ours.items())


@given(VARIABLES, st.booleans(), st.integers(0, 10**6))
def test_matlab_files_that_end_early(variables, packed, at):
    content = saved(variables, packed)
    found = content[: at % len(content)]
    try:
        assert set(parse_matlab(found)) <= set(variables)  # it may end between two variables
    except MatlabError:
        pass
