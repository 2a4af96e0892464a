"""What every plot shares: style, colours safe for colour-blind readers, labels that keep clear of each other, saving."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.patheffects
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from fastlora.files import write_atomically

# Okabe and Ito's, grey in place of their yellow, which is hard to see on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
}
WIDTH = 10.5  # inches; the page shows a plot of this width with letters of the size of its own
_HALO = (matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white"),)


@dataclass(frozen=True)
class Plot:
    """A drawn file: heading, what it shows in words for who cannot see it, and how to read it."""

    title: str
    path: Path
    alt: str
    note: str


def save(figure: Figure, path: Path) -> Path:
    """Render, then write the file in one step; 256 colours, a third of the bytes and no difference to see."""
    FigureCanvasAgg(figure)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=130, bbox_inches="tight", format="png")
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(small, "png", optimize=True)
    write_atomically(path, small.getvalue())
    return path


def plain(axes: Any) -> None:
    """No frame and no tick marks, for heat maps."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def task_ticks(axes: Any, names: Sequence[str], first: int = 0) -> None:
    """Task names below the x axis, the first at `first`."""
    axes.set_xticks(range(first, first + len(names)), names, rotation=35, ha="right", rotation_mode="anchor")


def place_labels(
    axes: Any,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colours: Sequence[str],
    lines: Sequence[tuple[float, float]] = (),
) -> None:
    """A text beside each point: within the axes, clear of other texts and points, off the lines where there is room.

    Call it last: it fixes the layout of the figure. A text that had to move away is tied to its point by a line.

    Args:
        lines: points on lines and error bars that a text had better not cover.
    """
    figure = axes.figure
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    unit, frame = figure.dpi / 72.0, axes.get_window_extent()  # unit: pixels in a typographic point
    at = np.reshape(axes.transData.transform(np.reshape(points, (-1, 2))), (-1, 2))
    on_lines = np.reshape(axes.transData.transform(np.reshape(lines, (-1, 2))), (-1, 2))
    taken = np.concatenate([at - 4 * unit, at + 4 * unit], axis=1)  # [boxes, (x0, y0, x1, y1)]
    soft = np.concatenate([on_lines - unit, on_lines + unit], axis=1)
    for i in np.argsort(at[:, 0], kind="stable"):
        label = axes.text(0, 0, texts[i], fontsize=8)
        size = label.get_window_extent()
        label.remove()
        offsets = np.array(list(_offsets(size, unit)))
        low = at[i] + offsets
        boxes = np.concatenate([low, low + (size.width, size.height)], axis=1)
        outside = size.width * size.height - _overlap(boxes, np.array([frame.extents]))
        crowding = 10 * outside + 10 * _overlap(boxes, taken) + _overlap(boxes, soft)
        best = int(np.argmin(crowding.round(2)))  # of equals the first, which is the nearest
        taken = np.concatenate([taken, boxes[best : best + 1]])
        tie = {"arrowstyle": "-", "color": "#999999", "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            texts[i],
            points[i],
            tuple(offsets[best] / unit),
            textcoords="offset points",
            fontsize=8,
            color=colours[i],
            path_effects=_HALO,
            annotation_clip=False,
            arrowprops=None if best < 2 * _DIRECTIONS else tie,
        )


_DIRECTIONS = 16


def _offsets(size: Bbox, unit: float) -> Iterator[tuple[float, float]]:
    """Where the lower left corner of a text of this size may lie relative to its point, nearest first."""
    for distance in (5, 9, 14, 20, 30, 42, 56, 72, 90, 110):
        for step in range(_DIRECTIONS):
            angle = 2 * math.pi * step / _DIRECTIONS
            centre_x = math.cos(angle) * (distance * unit + size.width / 2)
            centre_y = math.sin(angle) * (distance * unit + size.height / 2)
            yield centre_x - size.width / 2, centre_y - size.height / 2


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[boxes]: square pixels that each box shares with the others, added up."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0.0, None).prod(axis=2).sum(axis=1)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The values moved, in their order, until neighbours are `gap` apart and all within low and high.

    Where there is no room for that gap, all stand evenly.
    """
    gap = min(gap, (high - low) / max(len(values) - 1, 1))
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[tuple[float, int]] = []  # sum of the values, members; the members of a block stand a gap apart
    for i in order:
        blocks.append((values[i], 1))
        while len(blocks) > 1 and _end(blocks[-2], gap) + gap > _start(blocks[-1], gap):
            total, members = blocks.pop()
            blocks[-1] = (blocks[-1][0] + total, blocks[-1][1] + members)
    moved = [_start(block, gap) + gap * k for block in blocks for k in range(block[1])]
    moved = [min(value, high - gap * k) for k, value in enumerate(reversed(moved))][::-1]
    moved = [max(value, low + gap * k) for k, value in enumerate(moved)]
    return [value for _, value in sorted(zip(order, moved))]


def _start(block: tuple[float, int], gap: float) -> float:
    return block[0] / block[1] - gap * (block[1] - 1) / 2


def _end(block: tuple[float, int], gap: float) -> float:
    return block[0] / block[1] + gap * (block[1] - 1) / 2
