"""The dispatch table as a file: versioned JSON, read as a whole or refused as a whole.

    {"version": 1, "entries": [
    {"device": "NVIDIA H200", "role": "fwd", "m": 16384, "n": 768, "k": 768, "r": 16, "aligned": true, "parts": 1,
     "dtype": "bfloat16", "variant": "split", "tile": null, "measured": "not measured: ...", "time_us": null},
    ...]}

The key: device (as torch.cuda.get_device_name says it), role ("fwd": y; "dx": the gradient of x), N and K of the layer
in both roles, dtype, and two buckets: m, rows rounded up to a power of two, and r, the rank of the widest projection
rounded up to one of RANK_BUCKETS. aligned: 16 divides every rank; others are loaded element by element, for which other
tiles are good. parts is 3 for packed q, k and v (N is their sum), else 1.

What the key gives: variant; tile, the fields of a `fastlora.triton_kernels.TileConfig`, or null for the kernel layer's
own rule; measured, on what and with which versions, or "not measured" and why the entry is as it is; time_us or null.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastlora.ops.backend import ONE_PASS_MAX_RANK, TRITON_DTYPES, TRITON_VARIANTS

if TYPE_CHECKING:
    from fastlora.triton_kernels import TileConfig

VERSION = 1
ROLES = ("fwd", "dx")
VARIANTS = ("library", *TRITON_VARIANTS)
RANK_BUCKETS = (16, 32, 64, 128, 256)
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in TRITON_DTYPES)


class TableError(ValueError):
    """A table that cannot be used as a whole; the message says what is wrong in it."""


class Key(NamedTuple):
    """What an entry is looked up by; the module docstring tells the fields."""

    device: str
    role: str
    m: int
    n: int
    k: int
    r: int
    aligned: bool
    parts: int
    dtype: str


@dataclass(frozen=True)
class Entry:
    """What runs a call, and why.

    tile: TileConfig's fields; None where the kernel layer's own rule picks, and for "library". measured: device and
    versions, or a sentence that begins with or holds "not measured". source: the table, or "rule".
    """

    role: str
    variant: str
    tile: dict[str, Any] | None
    measured: str
    time_us: float | None = None
    source: str = "rule"

    @functools.cached_property
    def tile_config(self) -> TileConfig | None:
        """The tile as the launchers take it; made once an entry."""
        if self.tile is None:
            return None
        from fastlora.triton_kernels import TileConfig

        return TileConfig(**self.tile)

    @functools.cached_property
    def reason(self) -> str:
        """One line: where the choice comes from, and on what it was measured."""
        return f"{self.source}: {self.measured}"


def m_bucket(m: int) -> int:
    """Rows rounded up to a power of two; no rows at all count as two."""
    return 1 << (m - 1).bit_length()


def rank_bucket(r: int) -> int:
    """Rank rounded up to one of RANK_BUCKETS; above the last one, itself."""
    return next((bucket for bucket in RANK_BUCKETS if r <= bucket), r)


def read_table(path: str | os.PathLike[str], source: str) -> dict[Key, Entry]:
    """Every entry of a table file.

    Raises:
        TableError: no JSON, another version, or an entry that is not as the module docstring says.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is no JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise TableError('it is no object with "version" and "entries"')
    if content.get("version") != VERSION:
        raise TableError(f"it has version {content.get('version')!r}, and this fastlora reads version {VERSION}")
    table: dict[Key, Entry] = {}
    for index, fields in enumerate(content["entries"]):
        try:
            key, entry = _parse(fields, source)
        except TableError as error:
            raise TableError(f"its entry {index} {error}") from None
        if key in table:
            raise TableError(f"its entry {index} has the key of an earlier one")
        table[key] = entry
    return table


def format_table(table: Mapping[Key, Entry]) -> bytes:
    """The file's content, one entry a line, sorted."""
    rows = [
        key._asdict()
        | {name: getattr(entry, name) for name in _GIVEN}
        | {"tile": None if entry.tile is None else dict(entry.tile)}
        for key, entry in sorted(table.items())
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{{"version": {VERSION}, "entries": [\n{lines}\n]}}\n'.encode()


_GIVEN = ("variant", "tile", "measured", "time_us")


def _parse(fields: Any, source: str) -> tuple[Key, Entry]:
    wanted = {*Key._fields, *_GIVEN}
    if not isinstance(fields, dict) or fields.keys() != wanted:
        different = sorted(wanted ^ fields.keys()) if isinstance(fields, dict) else []
        raise TableError(f"lacks or has too much: {', '.join(different) or 'it is no object'}")
    key = Key(*(fields[name] for name in Key._fields))
    accepted: dict[str, tuple[Any, ...]] = {"role": ROLES, "dtype": DTYPES, "variant": VARIANTS, "parts": (1, 3)}
    for name, values in accepted.items():
        if fields[name] not in values:
            raise TableError(f"has {name} {fields[name]!r}; accepted: {', '.join(map(repr, values))}")
    for name in ("device", "measured"):
        if not isinstance(fields[name], str) or not fields[name]:
            raise TableError(f"has {name} {fields[name]!r}; it must be a text")
    if not isinstance(key.aligned, bool):
        raise TableError(f"has aligned {key.aligned!r}; it must be true or false")
    for name in ("m", "n", "k", "r"):
        if not _is_int(fields[name], 1):
            raise TableError(f"has {name} {fields[name]!r}; it must be an int >= 1")
    if key.m != m_bucket(key.m) or key.r not in RANK_BUCKETS:
        raise TableError(f"has m {key.m} and r {key.r}; m must be a power of two, r one of {list(RANK_BUCKETS)}")
    if fields["variant"] in ("one_pass", "leader") and key.r > ONE_PASS_MAX_RANK:
        raise TableError(f"has variant {fields['variant']!r} for r {key.r}; it serves ranks up to {ONE_PASS_MAX_RANK}")
    time_us, tile = fields["time_us"], fields["tile"]
    if time_us is not None and not (type(time_us) in (int, float) and math.isfinite(time_us) and time_us > 0):
        raise TableError(f"has time_us {time_us!r}; it must be a number above 0, or null")
    if tile is not None:
        _check_tile(tile)
    return key, Entry(key.role, fields["variant"], tile, fields["measured"], time_us, source)


def _check_tile(tile: Any) -> None:
    """The tile is one that TileConfig takes; whether it fits the device, only its compiler knows."""
    from fastlora.triton_kernels import TileConfig

    known = {field.name: field for field in dataclasses.fields(TileConfig)}
    if not isinstance(tile, dict) or not known.keys() >= tile.keys():
        unknown = sorted(tile.keys() - known.keys()) if isinstance(tile, dict) else [repr(tile)]
        raise TableError(f"has a tile with {', '.join(unknown)}, which this fastlora does not know")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in tile]
    if missing:
        raise TableError(f"has a tile without {', '.join(missing)}")
    for name, value in tile.items():
        if type(value).__name__ != str(known[name].type):
            raise TableError(f"has a tile with {name} {value!r}; it must be of type {known[name].type}")
        block, warps = name.startswith("block_"), name == "num_warps"
        if (block and not 16 <= value <= 512) or ((block or warps) and (value < 1 or value & (value - 1))):
            raise TableError(f"has a tile with {name} {value}; it must be a power of two{', 16 to 512' * block}")
        if name in ("num_stages", "group_m") and value < 1:
            raise TableError(f"has a tile with {name} {value}; it must be >= 1")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
