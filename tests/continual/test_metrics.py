"""Figures worked out by hand on small matrices."""

import pytest

from fastlora.continual.metrics import FIGURES, summarize, trace

# rows after task 1, 2, 3; a true 0 % on dataset 2 after task 1, and a dataset (1) that is best in the middle
MATRIX = [
    [80.0, 0.0, 30.0],
    [90.0, 70.0, 20.0],
    [60.0, 50.0, 100.0],
]
ZERO_SHOT = [40.0, 10.0, 25.0]


def test_by_hand():
    result = summarize(MATRIX, ZERO_SHOT)
    assert result["transfer"] == pytest.approx((0.0 + (30.0 + 20.0) / 2) / 2)
    assert result["average"] == pytest.approx(sum(map(sum, MATRIX)) / 9)
    assert result["last"] == pytest.approx((60.0 + 50.0 + 100.0) / 3)
    assert result["forgetting"] == pytest.approx(((90.0 - 60.0) + (70.0 - 50.0)) / 2)  # max is after task 2, not task 1
    assert result["bwt"] == pytest.approx(((60.0 - 80.0) + (50.0 - 70.0)) / 2)
    assert result["fwt"] == pytest.approx(((0.0 - 10.0) + (20.0 - 25.0)) / 2)
    assert result["learning"] == pytest.approx((80.0 + 70.0 + 100.0) / 3)
    assert result["reasons"] == {}


def test_figures_of_trace_by_hand():
    assert trace(MATRIX) == {
        "op": pytest.approx((60.0 + 50.0 + 100.0) / 3),
        "bwt": pytest.approx((-20.0 - 20.0 + 0.0) / 3),
    }
    assert trace([[30.0]]) == {"op": 30.0, "bwt": 0.0}
    with pytest.raises(ValueError, match=r"it must be \[T, T\]"):
        trace(MATRIX[:2])


def test_per_dataset_by_hand():
    per_dataset = summarize(MATRIX, ZERO_SHOT)["per_dataset"]
    assert per_dataset["transfer"] == [None, 0.0, 25.0]
    assert per_dataset["forgetting"] == [30.0, 20.0, None]
    assert per_dataset["bwt"] == [-20.0, -20.0, None]
    assert per_dataset["fwt"] == [None, -10.0, -5.0]
    assert per_dataset["last"] == [60.0, 50.0, 100.0]
    assert per_dataset["learning"] == [80.0, 70.0, 100.0]
    assert per_dataset["average"] == pytest.approx([230.0 / 3, 40.0, 50.0])


def test_true_zero_is_a_value_not_a_hole():
    """A masked mean (0 % taken for "not measured") would say 20 for transfer and 100 for last."""
    result = summarize([[100.0, 0.0, 20.0], [0.0, 100.0, 0.0], [0.0, 0.0, 100.0]])
    assert result["transfer"] == pytest.approx((0.0 + 10.0) / 2)
    assert result["last"] == pytest.approx(100.0 / 3)
    assert result["forgetting"] == pytest.approx(100.0)


def test_forgetting_may_be_negative():
    assert summarize([[10.0, 0.0], [40.0, 50.0]])["forgetting"] == pytest.approx(-30.0)


def test_one_task_has_reasons():
    result = summarize([[50.0]], [20.0])
    assert result["average"] == result["last"] == result["learning"] == 50.0
    for name in ("transfer", "forgetting", "bwt", "fwt"):
        assert result[name] is None
        assert "one task" in result["reasons"][name]
        assert result["per_dataset"][name] == [None]


def test_missing_row_zero():
    result = summarize(MATRIX)
    assert result["fwt"] is None and "zero_shot" in result["reasons"]["fwt"]
    assert result["per_dataset"]["fwt"] == [None, None, None]
    with_row = summarize(MATRIX, ZERO_SHOT)
    assert {name: result[name] for name in FIGURES if name != "fwt"} == {
        name: with_row[name] for name in FIGURES if name != "fwt"
    }


def test_no_training_means_nothing_learned_and_nothing_forgotten():
    row = [30.0, 40.0, 50.0]
    result = summarize([row, row, row], row)
    assert result["forgetting"] == result["bwt"] == result["fwt"] == 0.0
    assert result["learning"] == result["last"] == result["average"] == 40.0
    assert result["transfer"] == 45.0


@pytest.mark.parametrize(
    ("matrix", "zero_shot", "message"),
    [
        ([[1.0, 2.0]], None, r"shape \[1, 2\]; it must be \[T, T\]"),
        ([], None, "dimensions; it must have 2"),
        ([[]], None, r"shape \[1, 0\]"),
        ([[1.0, 2.0], [3.0]], None, "unequal length"),
        ([[1.0, None], [3.0, 4.0]], None, r"\[0, 1\] is nan; it must be a percentage"),
        ([[1.0, 101.0], [3.0, 4.0]], None, r"\[0, 1\] is 101.0; it must be a percentage"),
        ([[-1.0]], None, r"\[0, 0\] is -1.0"),
        ([["a"]], None, "cannot be read as numbers"),
        ([[1.0, 2.0], [3.0, 4.0]], [1.0], "zero_shot has 1 values; .* must have 2"),
        ([[1.0]], [float("inf")], r"zero_shot\[0\] is inf"),
        ([1.0, 2.0], None, "has 1 dimensions"),
    ],
)
def test_bad_input(matrix, zero_shot, message):
    with pytest.raises(ValueError, match=message):
        summarize(matrix, zero_shot)
