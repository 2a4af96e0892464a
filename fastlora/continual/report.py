"""`report.html`: one file with every figure, table and plot of a run; it opens without a network."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.continual.plots import draw_all
from fastlora.continual.saved_run import SavedRun, read_run
from fastlora.continual.tables import FIGURES, READ_TOGETHER, SPACE_TITLES, number, row_names
from fastlora.files import write_atomically

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2129; background: #fff; }
body { max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; } .note { color: #555b66; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid #e4e6ea; }
th:first-child { text-align: left; }
thead th { border-bottom: 2px solid #1d2129; font-weight: 600; } td.now { font-weight: 700; }
tbody th { font-weight: 400; } .wide { overflow-x: auto; }
img { max-width: 100%; } pre { background: #f5f6f8; padding: .8rem 1rem; overflow-x: auto; font-size: 13px; }
.status { padding: .1rem .55rem; border-radius: .6rem; background: #e4e6ea; font-size: .85rem; vertical-align: .25rem; }
.status.finished { background: #d3eee4; } .status.failed, .status.interrupted { background: #fbe1cf; }
"""


def write_report(path: str | os.PathLike[str]) -> Path:
    """Draw the plots of the run at `path` and write its page; also of an unfinished run.

    Returns:
        The page's path.
    Raises:
        FileNotFoundError, ValueError: no run, or one that cannot be read.
    """
    run = read_run(path)
    (run.path / "plots").mkdir(exist_ok=True)
    plots = draw_all(run, run.path / "plots")
    page = run.path / "report.html"
    write_atomically(page, _page(run, plots).encode())
    return page


def _page(run: SavedRun, plots: dict[str, Path]) -> str:
    title = f"{run.label} on {run.manifest['benchmark']}, seed {run.manifest['seed']}"
    body = [f'<h1>{_text(title)} <span class="status {_text(run.status)}">{_text(run.status)}</span></h1>', _lead(run)]
    body += ["<h2>Figures</h2>", _figures(run), f'<p class="note">{READ_TOGETHER}</p>']
    body += [f"<h2>{_text(heading)}</h2>\n{_image(heading, file)}" for heading, file in plots.items()]
    for space, description in SPACE_TITLES.items():
        body += [
            f"<h2>Accuracy (%), {_text(description)}</h2>",
            _accuracies(run.record.tasks, getattr(run.record, space)),
        ]
    body += ["<h2>Configuration</h2>", f"<pre>{_text((run.path / 'config.yaml').read_text())}</pre>"]
    body += ["<h2>Versions and hashes</h2>", f"<pre>{_text((run.path / 'manifest.json').read_text())}</pre>"]
    head = f'<meta charset="utf-8">\n<title>{_text(title)}</title>\n<style>{_CSS}</style>'
    content = "\n".join(body)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{content}\n</body>\n</html>\n'


def _lead(run: SavedRun) -> str:
    done, tasks = run.record.finished_tasks, len(run.record.tasks)
    minutes, seconds = divmod(round(run.manifest["duration_seconds"]), 60)
    text = f"{done} of {tasks} tasks in {minutes} min {seconds} s on {run.manifest['device']}."
    if run.manifest.get("error"):
        text += f" Stopped by {run.manifest['error']}."
    null = run.manifest.get("null_model")
    if null:
        text += (
            f" Each gate is shrunk by {null['total_shrink']:.2f} in all over a task: gates without any gradient "
            f"would keep {null['expected_rank']:.2f} of {run.config['method']['rank']} components (the null model)."
        )
    return f'<p class="note">{_text(text)}</p>'


def _figures(run: SavedRun) -> str:
    metrics = run.record.metrics()
    header = ["label space", *(f"{title} ({unit})" if unit else title for _, title, unit in FIGURES)]
    rows = [[space, *(number(values[key]) for key, _, _ in FIGURES)] for space, values in _both(metrics)]
    reasons = {key: reason for _, values in _both(metrics) for key, reason in values["reasons"].items()}
    shown = {key for key, _, _ in FIGURES}
    notes = "".join(f"<li>{_text(reason)}</li>" for key, reason in reasons.items() if key in shown)
    return _table(header, rows) + (f'<ul class="note">{notes}</ul>' if notes else "")


def _both(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("own", metrics), ("union", metrics["union"])]


def _accuracies(tasks: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    names = row_names(tasks, len(rows))
    return _table(["", *tasks], [[name, *(f"{v:.1f}" for v in row)] for name, row in zip(names, rows)], diagonal=True)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], diagonal: bool = False) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = []
    for i, (first, *cells) in enumerate(rows):
        marked = (
            f'<td class="now">{_text(c)}</td>' if diagonal and j == i - 1 else f"<td>{_text(c)}</td>"
            for j, c in enumerate(cells)
        )
        lines.append(f"<tr><th>{_text(first)}</th>{''.join(marked)}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _image(title: str, path: Path) -> str:
    return f'<img alt="{_text(title)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def _text(value: str) -> str:
    return html.escape(str(value))
