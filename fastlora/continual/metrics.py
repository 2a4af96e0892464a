"""Every continual-learning figure, from one accuracy matrix.

`a[i, j]` is the accuracy in percent on dataset j after task i (i, j = 1..T); row 0 is before training.
A true 0 % is a value like any other; a figure that has no terms (one task, no row 0) is None, with its reason.

    Transfer   = mean_{j>=2} mean_{1<=i<j} a[i, j]        accuracy on what is still to come (row 0 not counted)
    Average    = mean_j mean_i a[i, j]                    over the whole stream
    Last       = mean_j a[T, j]
    Forgetting = mean_{j<T} (max_{j<=i<T} a[i, j] - a[T, j])
    BWT        = mean_{j<T} (a[T, j] - a[j, j])
    FWT        = mean_{j>=2} (a[j-1, j] - a[0, j])
    Learning   = mean_j a[j, j]                           read it beside Forgetting: what learns nothing forgets nothing

Transfer, Average, Last as in ZSCL (arXiv 2303.06628) and CoDyRA (arXiv 2412.01004); BWT, FWT as in GEM
(arXiv 1706.08840). TRACE (arXiv 2310.06762), for streams of language tasks, calls Last overall performance, and divides
the sum of BWT by T instead of T - 1:

    OP  = mean_j a[T, j]                                  TRACE's BWT = mean_{j<=T} (a[T, j] - a[j, j])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FIGURES = ("transfer", "average", "last", "forgetting", "bwt", "fwt", "learning")

_ONE_TASK = {
    "transfer": "transfer needs a dataset whose task has not been trained yet; this stream has one task",
    "forgetting": "forgetting needs a task that was trained before the last one; this stream has one task",
    "bwt": "backward transfer needs a task that was trained before the last one; this stream has one task",
    "fwt": "forward transfer needs a task after the first one; this stream has one task",
}
_NO_ROW_ZERO = "forward transfer compares with the accuracy before training; pass zero_shot (row 0 of the matrix)"


def summarize(accuracy_matrix: Sequence[Sequence[float]], zero_shot: Sequence[float] | None = None) -> dict[str, Any]:
    """All figures of one stream.

    Args:
        accuracy_matrix: [T, T], percent; row i - 1 holds the accuracies after task i (without the row before training).
        zero_shot: [T], percent; accuracies before training. Needed by fwt alone.
    Returns:
        A mapping with transfer, average, last, forgetting, bwt, fwt, learning (float or None); `per_dataset`, the same
        names with one value per dataset in stream order (None where the dataset has no term); and `reasons`, which
        says for each figure that is None why.
    Raises:
        ValueError: the matrix is not square, a row has another length, or a value is not a percentage.
    """
    a = _percentages("accuracy_matrix", accuracy_matrix, 2)
    if a.shape[0] != a.shape[1] or a.size == 0:
        raise ValueError(
            f"accuracy_matrix has shape {list(a.shape)}; it must be [T, T] with T >= 1: one row after each task, one "
            "column per dataset. Pass the row before training as zero_shot, an unfinished stream up to its last task."
        )
    tasks = a.shape[0]
    before = None if zero_shot is None else _percentages("zero_shot", zero_shot, 1)
    if before is not None and before.shape != (tasks,):
        raise ValueError(
            f"zero_shot has {before.size} values; with a {tasks} x {tasks} accuracy_matrix it must have {tasks}, "
            "one per dataset. Pass the accuracies before training in stream order."
        )
    per_dataset = _per_dataset(a, before)
    figures: dict[str, Any] = {name: _mean(per_dataset[name]) for name in FIGURES}
    reasons = {name: _ONE_TASK[name] for name in _ONE_TASK if figures[name] is None}
    if before is None:
        reasons["fwt"] = _NO_ROW_ZERO
    return figures | {"per_dataset": per_dataset, "reasons": reasons}


def trace(accuracy_matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """The figures of TRACE after the last task: {"op": ..., "bwt": ...}.

    Args, Raises: as `summarize`. A stream of one task has a bwt of 0.
    """
    figures = summarize(accuracy_matrix)
    changes = [change for change in figures["per_dataset"]["bwt"] if change is not None]
    return {"op": figures["last"], "bwt": sum(changes) / len(figures["per_dataset"]["bwt"])}


def _per_dataset(a: np.ndarray, before: np.ndarray | None) -> dict[str, list[float | None]]:
    last = a.shape[0] - 1
    earlier, later = range(last), range(1, last + 1)  # datasets before the last one; datasets after the first one

    def column(values: dict[int, float]) -> list[float | None]:
        return [float(values[j]) if j in values else None for j in range(last + 1)]

    return {
        "transfer": column({j: a[:j, j].mean() for j in later}),
        "average": column(dict(enumerate(a.mean(axis=0)))),
        "last": column(dict(enumerate(a[last]))),
        "forgetting": column({j: a[j:last, j].max() - a[last, j] for j in earlier}),
        "bwt": column({j: a[last, j] - a[j, j] for j in earlier}),
        "fwt": column({} if before is None else {j: a[j - 1, j] - before[j] for j in later}),
        "learning": column(dict(enumerate(np.diagonal(a)))),
    }


def _mean(values: list[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _percentages(name: str, values: Any, dimensions: int) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} cannot be read as numbers ({type(values).__name__}, rows of unequal length or a non-number); "
            "it must hold percentages, every row of the same length. Leave out what was not measured."
        ) from None
    if array.ndim != dimensions:
        raise ValueError(
            f"{name} has {array.ndim} dimensions; it must have {dimensions}. Pass "
            + ("a list of rows, one after each task." if dimensions == 2 else "one value per dataset.")
        )
    bad = ~(np.isfinite(array) & (array >= 0.0) & (array <= 100.0))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name}{list(where)} is {array[where]}; it must be a percentage in [0, 100]. Multiply shares by 100, and "
            "leave a task that was not measured out of the matrix."
        )
    return array
