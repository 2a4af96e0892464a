"""Pieces of an HTML page in one file: no script, nothing fetched, light and dark, narrow and wide."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from fastlora.continual.drawing import Plot

_CSS = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #555b66; --paper: #fff; --line: #dfe2e7; --panel: #f5f6f8; }
:root { --good: #d3eee4; --bad: #fbe1cf; --accent: #0060a0; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e6e8ec; --soft: #a4abb8; --paper: #16181d; --line: #353a44; --panel: #20242b; --good: #17473a; }
:root { --bad: #5b3115; --accent: #7cc0f2; }
}
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 1180px; margin: 2rem auto 4rem; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .4rem; }
p, ul, dl { margin: .5rem 0; } .note, figcaption { color: var(--soft); } ul.note { padding-left: 1.2rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; } tbody th { font-weight: 400; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 600; white-space: normal; vertical-align: bottom; } td.now { font-weight: 700; color: var(--accent); }
figure { margin: .6rem 0; } figcaption { margin-top: .4rem; max-width: 50rem; }
/* on a phone a plot keeps its letters readable and scrolls within its frame */
img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
img { border-radius: .4rem; padding: .6rem; }
pre { background: var(--panel); padding: .8rem 1rem; overflow-x: auto; font-size: 13px; border-radius: .4rem; }
summary { cursor: pointer; color: var(--accent); padding: .3rem 0; }
.status { padding: .1rem .6rem; border-radius: .7rem; background: var(--panel); font-size: .85rem; white-space: nowrap; }
.status { vertical-align: .25rem; font-weight: 500; } .status.finished { background: var(--good); }
.status.failed, .status.interrupted { background: var(--bad); }
.warning { background: var(--bad); padding: .6rem 1rem; border-radius: .4rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.tiles div { background: var(--panel); border-radius: .5rem; padding: .5rem .9rem; flex: 1 1 8rem; }
.tiles dt { color: var(--soft); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; font-size: .8rem; color: var(--soft); }
@media (max-width: 700px) { img { max-width: none; width: 760px; } }
"""


def document(title: str, body: Sequence[str]) -> str:
    """A whole page; `body` is HTML, `title` is text."""
    head = '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    head += f"<title>{text(title)}</title>\n<style>{_CSS}</style>"
    content = "\n".join(part for part in body if part)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{content}\n</body>\n</html>\n'


def text(value: object) -> str:
    """`value` as text that the browser shows as it is."""
    return html.escape(str(value))


def heading(words: str) -> str:
    return f"<h2>{text(words)}</h2>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of text; `kind` is note or warning."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def items(lines: Sequence[str]) -> str:
    """A list of notes; nothing where there are none."""
    return f'<ul class="note">{"".join(f"<li>{text(line)}</li>" for line in lines)}</ul>' if lines else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], diagonal: bool = False) -> str:
    """Rows of text; with `diagonal` the cell of the task just trained stands out. Scrolls where it is too wide."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    lines = []
    for i, (first, *cells) in enumerate(rows):
        marked = (
            f'<td class="now">{text(c)}</td>' if diagonal and j == i - 1 else f"<td>{text(c)}</td>"
            for j, c in enumerate(cells)
        )
        lines.append(f'<tr><th scope="row">{text(first)}</th>{"".join(marked)}</tr>')
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="wide" tabindex="0">{body}</div>'


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Name, value and small print of the figures to see first."""
    cells = (f"<div><dt>{text(n)}</dt><dd>{text(v)} <small>{text(s)}</small></dd></div>" for n, v, s in figures)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def figure(plot: Plot) -> str:
    """Heading, picture and caption of a plot, the picture within the page."""
    data = base64.b64encode(plot.path.read_bytes()).decode()
    image = f'<img alt="{text(plot.alt)}" src="data:image/png;base64,{data}">'
    caption = f"<figcaption>{text(plot.note)}</figcaption>"
    return f'{heading(plot.title)}\n<figure><div class="wide" tabindex="0">{image}</div>{caption}</figure>'


def folded(summary: str, content: str) -> str:
    """HTML content that opens on a click."""
    return f"<details><summary>{text(summary)}</summary>\n{content}\n</details>"


def listing(content: str) -> str:
    return f"<pre>{text(content)}</pre>"
