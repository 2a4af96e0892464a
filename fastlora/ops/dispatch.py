"""Variant and tile of a call of the Triton kernels: two tables, and a rule for what is in neither.

In this order:

1. R = 0: "library", a plain GEMM.
2. The user's table, which `fastlora tune` writes: $FASTLORA_TABLE, else fastlora/dispatch.json in $XDG_CACHE_HOME or
   ~/.cache. Read once a process, at the first look-up.
3. The shipped table, dispatch_table.json beside this file.
4. The rule: "split", with the tile of the kernel layer's own rule. It is the one variant that serves every rank and
   relies on nothing but its launches, so what nobody measured gets it.

Nothing is timed here. `fastlora.ops.dispatch_table` describes keys and entries.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastlora.ops.backend import interpreting
from fastlora.ops.dispatch_table import Entry, Key, TableError, m_bucket, rank_bucket, read_table

__all__ = ["Entry", "device_name", "lookup", "lookup_call", "reload", "user_table_path"]

INTERPRETER = "interpreter"
SHIPPED = Path(__file__).with_name("dispatch_table.json")
Ranks = tuple[int, int, int] | None

_found: dict[tuple[object, ...], Entry] = {}
_names: dict[int, str] = {-1: INTERPRETER}


def lookup(
    role: str, device_name: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, ranks: Ranks = None
) -> Entry:
    """The entry for a call.

    Args:
        role: "fwd" or "dx". device_name: as `device_name` gives it.
        m: rows. n, k: N and K of the layer, in both roles. r: its rank; of packed projections the sum.
        ranks: of packed projections.
    Returns:
        Entry; `.measured` says on what it was measured, or that it was not.
    """
    key = (role, device_name, (m - 1).bit_length(), n, k, r, dtype, ranks)
    try:
        return _found[key]
    except KeyError:
        return _found.setdefault(key, _find(role, device_name, m, n, k, r, dtype, ranks))


def lookup_call(role: str, x: Tensor, weight: Tensor, r: int, ranks: Ranks = None) -> Entry:
    """`lookup` for tensors: x [M, K], or dy [M, N] in the role "dx"; weight [N, K] in both."""
    index = x.get_device()
    name = _names.get(index) or device_name(x.device)
    n, k = weight.shape
    key = (role, name, (x.shape[0] - 1).bit_length(), n, k, r, x.dtype, ranks)
    try:
        return _found[key]
    except KeyError:
        return lookup(role, name, x.shape[0], n, k, r, x.dtype, ranks)


def device_name(device: torch.device) -> str:
    """The device's name in the tables; "interpreter" where Triton's interpreter runs the kernels."""
    if device.type != "cuda" or interpreting():
        return INTERPRETER
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _names:
        _names[index] = torch.cuda.get_device_name(index)
    return _names[index]


def user_table_path() -> Path:
    """Where `fastlora tune` writes, and from where the user's table is read."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("FASTLORA_TABLE") or os.path.join(cache, "fastlora", "dispatch.json"))


def reload() -> None:
    """Forget the tables; the next look-up reads them again."""
    _user_table.cache_clear()
    _shipped_table.cache_clear()
    _found.clear()


def _find(role: str, device_name: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, ranks: Ranks) -> Entry:
    if r == 0:
        return Entry(role, "library", None, "rank 0 is a plain GEMM, which needs no measurement")
    key = table_key(role, device_name, m, n, k, r, dtype, ranks)
    entry = _user_table().get(key) or _shipped_table().get(key)
    if entry:
        return entry
    rank = f"R {key.r}{' x 3' * (key.parts == 3)}{' unaligned' * (not key.aligned)}"
    cell = f"{role} on {device_name} with M {key.m}, N {n}, K {k}, {rank}, {key.dtype}"
    return Entry(role, "split", None, f"no entry for {cell}: the safe default; not measured on this device")


def table_key(
    role: str, device_name: str, m: int, n: int, k: int, r: int, dtype: torch.dtype, ranks: Ranks = None
) -> Key:
    """The tables' key of a call; arguments as `lookup`."""
    own = ranks or (r,)
    aligned = all(rank % 16 == 0 for rank in own)
    return Key(
        device_name,
        role,
        m_bucket(m),
        n,
        k,
        rank_bucket(max(own)),
        aligned,
        len(own),
        str(dtype).removeprefix("torch."),
    )


@functools.cache
def _shipped_table() -> dict[Key, Entry]:
    try:
        return read_table(SHIPPED, "shipped table")
    except (OSError, TableError) as error:
        raise RuntimeError(
            f"the shipped dispatch table {SHIPPED} cannot be used: {error}. Install fastlora again."
        ) from error


@functools.cache
def _user_table() -> dict[Key, Entry]:
    path = user_table_path()
    try:
        return read_table(path, f"user table {path}")
    except FileNotFoundError as error:
        if not os.environ.get("FASTLORA_TABLE"):
            return {}
        reason: Exception = error
    except (OSError, TableError) as error:
        reason = error
    warnings.warn(
        f"the dispatch table {path} is not used: {reason}. Delete it, or run `fastlora tune` again; the shipped table "
        "serves meanwhile.",
        UserWarning,
        stacklevel=2,
    )
    return {}
