"""Records of ahead-of-time compiles as a table, as CSV, and in the documentation."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# the page's table stands between these
MARKERS = ("<!-- resources -->", "<!-- end of resources -->")
COLUMNS = {
    "target": "target",
    "kernel": "label",
    "dtype": "dtype",
    "rank": "rank",
    "odd": "odd",
    "tile": "tile",
    "warps": "num_warps",
    "stages": "num_stages",
    "regs": "registers",
    "shared": "shared",
    "tmem": "tensor_memory",
    "mma": "mmas",
    "mma/step": "loop_mmas",
    "async": "async_copies",
    "spills": "spills",
}


@dataclass(frozen=True)
class Record:
    """Resources of one compiled kernel, as read from the binary. error: text of a compile that failed."""

    target: str
    label: str
    dtype: str
    rank: int
    odd: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int = 0
    shared: int = 0
    tensor_memory: int = 0
    mmas: int = 0
    loop_mmas: int = 0
    async_copies: int = 0
    bulk_copies: int = 0
    spills: int = 0
    traps: int = 0
    error: str = ""


Verdicts = Sequence[Sequence[str]]


def table(records: Sequence[Record], verdicts: Verdicts, markdown: bool = False) -> str:
    """The resource table, one line a compiled kernel; verdicts: the limits that each breaks."""
    cells = [[*COLUMNS, "result"]]
    for record, verdict in zip(records, verdicts):
        row = [str(getattr(record, field) or ("-" if field == "odd" else 0)) for field in COLUMNS.values()]
        cells.append([*row, "; ".join(verdict) or "ok"])
    if markdown:
        cells.insert(1, ["---"] * len(cells[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells)


def write_csv(path: Path, records: Sequence[Record], verdicts: Verdicts) -> None:
    """Every record with its verdict, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(records[0]), "result"], lineterminator="\n")
        writer.writeheader()
        for record, verdict in zip(records, verdicts):
            writer.writerow(asdict(record) | {"result": "; ".join(verdict) or "ok"})
    os.replace(partial, path)


def write_docs(path: Path, records: Sequence[Record], verdicts: Verdicts, summary: str) -> None:
    """The bfloat16 part of the table, folded up a target, between the page's markers."""
    before, rest = path.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    parts = [f"{summary}."]
    for target in dict.fromkeys(record.target for record in records):
        chosen = [i for i, record in enumerate(records) if (record.target, record.dtype) == (target, "bf16")]
        text = table([records[i] for i in chosen], [verdicts[i] for i in chosen], markdown=True)
        parts.append(f"<details><summary>{target}, bf16</summary>\n\n{text}\n\n</details>")
    body = "\n\n".join(parts)
    path.write_text(f"{before}{MARKERS[0]}\n{body}\n{MARKERS[1]}{after}")
