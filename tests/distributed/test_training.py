"""Runs of several processes against the run of one, with equal batches."""

import pytest

pytest.importorskip("open_clip")

from distributed import runs  # noqa: E402
from distributed.processes import in_processes  # noqa: E402


@pytest.mark.parametrize("size", [2, 4])
def test_equals_one_process(size, tmp_path):
    """Uneven last batches, and rows for some processes alone; every process ends with the same bits."""
    expected = runs.train(0, out=tmp_path / "one")
    found = in_processes(size, runs.train, runs.CODYRA, tmp_path / "several")
    runs.assert_same_bits(found)
    runs.assert_same_run(found[0], expected)
    assert any(0 < rank < 4 for _, rank in expected["ranks"]), "some gates are dead, and some are not"
    assert len(expected["losses"]) == 12
    for name in ("accuracy.csv", "accuracy_union.csv", "config.yaml"):
        assert (tmp_path / "several" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    files = [
        {str(path.relative_to(tmp_path / run)) for path in (tmp_path / run).rglob("*")} for run in ("one", "several")
    ]
    assert files[0] == files[1]


@pytest.mark.slow
def test_every_kind_of_loss_and_hook():
    """With 3 processes a share of a batch is 2 or 3 images of 7, and 1 or 0 of what is left at the end of an epoch."""
    expected = runs.train_all(0)
    found = in_processes(3, runs.train_all)
    for name in runs.METHODS:
        each = [result[name] for result in found]
        runs.assert_same_bits(each)
        runs.assert_same_run(each[0], expected[name])
        assert runs.relative(each[0]["kept"], expected[name]["kept"]) < 1e-4 or name == "inputs of layers"


def test_half_precision_starts_at_the_same_scale():
    """In float16 gradients overflow, and steps are skipped, where they are in one process."""
    expected = runs.train(0, options={"dtype": "float16"})
    found = in_processes(2, runs.train, runs.CODYRA, None, {"dtype": "float16"})
    runs.assert_same_bits(found)
    for one, two in zip(found[0]["adapters"], expected["adapters"], strict=True):
        assert runs.relative(one, two) < 0.03


def test_the_embedded_benchmark():
    expected, found = runs.train_demo(0), in_processes(2, runs.train_demo)
    for each in found:
        assert each["record"] == expected["record"]
        for one, two in zip(each["adapters"], expected["adapters"], strict=True):
            assert runs.relative(one, two) < 3e-5
