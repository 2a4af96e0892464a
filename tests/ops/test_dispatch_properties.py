"""Dispatch tables: what is formatted is read back, entry by entry."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops.dispatch_table import DTYPES, RANK_BUCKETS, ROLES, Entry, Key, format_table, read_table

TEXTS = st.text(min_size=1, max_size=9)
KEYS = st.builds(
    Key, TEXTS, st.sampled_from(ROLES), st.integers(0, 20).map(lambda n: 1 << n), st.integers(1, 99), st.integers(1, 99),
    st.sampled_from(RANK_BUCKETS), st.booleans(), st.sampled_from([1, 3]), st.sampled_from(DTYPES),
)  # fmt: skip
TILES = st.none() | st.fixed_dictionaries(
    {name: st.sampled_from([16, 64, 512]) for name in ("block_m", "block_n", "block_k")}
    | {"num_warps": st.sampled_from([1, 4, 8]), "num_stages": st.integers(1, 5)}
)


@given(st.dictionaries(KEYS, st.tuples(TILES, TEXTS, st.none() | st.floats(1e-3, 1e6)), max_size=5))
def test_tables(entries):
    table = {
        key: Entry(key.role, "split", tile, measured, time, "drawn") for key, (tile, measured, time) in entries.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dispatch.json"
        path.write_bytes(format_table(table))
        assert read_table(path, "drawn") == table
