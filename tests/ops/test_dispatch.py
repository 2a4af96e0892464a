"""Which entry answers a call: the user's table, the shipped one, the rule; and tables that are refused."""

import json
import warnings

import pytest
import torch

from fastlora.ops import dispatch
from fastlora.ops.dispatch_table import Entry, Key, TableError, format_table, read_table
from fastlora.triton_kernels import TileConfig

H200 = "NVIDIA H200"
TILE = {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 4}
ROW = {
    "device": H200, "role": "fwd", "m": 16384, "n": 768, "k": 768, "r": 16, "aligned": True, "parts": 1, "dtype": "bfloat16",
    "variant": "one_pass", "tile": TILE, "measured": "measured by a test", "time_us": 12.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def user_table(monkeypatch, tmp_path):
    """Where this test's user table would lie; a function writes rows there."""
    path = tmp_path / "cache" / "fastlora" / "dispatch.json"
    monkeypatch.delenv("FASTLORA_TABLE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dispatch.reload()

    def write(*rows, version=1):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": version, "entries": rows}))
        dispatch.reload()
        return path

    yield write
    dispatch.reload()


def look(m=12608, n=768, k=768, r=16, dtype=torch.bfloat16, *, role="fwd", device=H200, ranks=None):
    return dispatch.lookup(role, device, m, n, k, r, dtype, ranks)


# ---- tables and rule


def test_the_shipped_table_says_what_was_not_measured():
    table = read_table(dispatch.SHIPPED, "shipped table")
    assert {(key.n, key.k) for key in table} >= {(768, 768), (2304, 768), (3072, 768), (768, 3072), (4096, 4096)}
    for key, entry in table.items():
        assert entry.variant in ("library", "split") or entry.time_us is not None, key
        assert (entry.time_us is None) == ("not measured" in entry.measured), key
    entry = look()
    assert (entry.variant, entry.tile, entry.source) == ("split", None, "shipped table")
    assert "not measured" in entry.reason


def test_the_rule_for_what_no_table_holds():
    entry = look(n=769)
    assert (entry.variant, entry.tile, entry.source) == ("split", None, "rule")
    assert "no entry for fwd on NVIDIA H200 with M 16384, N 769, K 768, R 16, bfloat16" in entry.measured
    assert "not measured on this device" in entry.measured
    assert look(r=65, n=769).variant == "split"
    assert look(r=0).variant == "library"
    assert look(r=0, ranks=(0, 0, 0)).variant == "library"


def test_the_user_table_comes_first_and_its_tile_is_a_tile(user_table):
    path = user_table(ROW)
    entry = look()
    assert (entry.variant, entry.time_us, entry.source) == ("one_pass", 12.5, f"user table {path}")
    assert entry.tile_config == TileConfig(**TILE) and entry.tile_config is entry.tile_config
    assert look(role="dx").source == "shipped table"


def test_what_shares_an_entry_and_what_does_not(user_table):
    user_table(ROW, {**ROW, "r": 32, "parts": 3, "n": 2304, "variant": "leader"})
    assert {look(m=m).variant for m in (8193, 12608, 16384)} == {"one_pass"}
    assert {look(m=m).variant for m in (8192, 16385)} == {"split"}
    assert look(r=16).variant == "one_pass"
    others = (
        {"r": 11}, {"r": 32}, {"dtype": torch.float16}, {"device": "NVIDIA H100"}, {"k": 769}, {"n": 2304, "r": 32}, {"n": 2304}
    )  # fmt: skip
    assert {look(**other).variant for other in others} == {"split"}
    # packed: the widest projection counts, not the sum
    assert look(n=2304, r=48, ranks=(16, 32, 0)).variant == "leader"
    assert look(n=2304, r=52, ranks=(16, 32, 4)).variant == "split"
    assert look(n=2304, r=96, ranks=(32, 32, 32)).variant == "leader"
    assert look(n=2304, r=48, ranks=(16, 16, 16)).source == "shipped table"
    user_table({**ROW, "aligned": False})
    assert {look(r=r).variant for r in (1, 11, 15)} == {"one_pass"} and look(r=16).variant == "split"


def test_of_tensors_as_of_numbers(monkeypatch):
    x, dy, weight = torch.empty(5, 8), torch.empty(5, 16), torch.empty(16, 8)
    expected = dispatch.lookup("fwd", "interpreter", 5, 16, 8, 4, torch.float32)
    assert dispatch.lookup_call("fwd", x, weight, 4) is expected
    assert (
        "dx on interpreter with M 8, N 16, K 8, R 16 unaligned, float32"
        in dispatch.lookup_call("dx", dy, weight, 4).measured
    )
    assert dispatch.lookup_call("fwd", x[:0], weight, 4).variant == "split"


def test_a_call_on_the_cpu_asks_nothing_of_cuda(monkeypatch):
    for name in ("current_device", "get_device_name", "is_available"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was asked"))
    dispatch.lookup_call("fwd", torch.empty(3, 8), torch.empty(16, 8), 4)


def test_tables_are_read_once(user_table):
    path = user_table(ROW)
    assert look().variant == "one_pass"
    path.write_text("broken since")
    assert look().variant == "one_pass" and look(m=40).variant == "split"
    with pytest.warns(UserWarning, match="not used"):
        dispatch.reload()
        assert look().variant == "split"


def test_where_the_user_table_lies(monkeypatch, tmp_path):
    assert dispatch.user_table_path() == tmp_path / "cache" / "fastlora" / "dispatch.json"
    monkeypatch.setenv("FASTLORA_TABLE", str(tmp_path / "mine.json"))
    assert dispatch.user_table_path() == tmp_path / "mine.json"
    monkeypatch.setenv("FASTLORA_TABLE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dispatch.user_table_path() == tmp_path / ".cache" / "fastlora" / "dispatch.json"


# ---- refusals


def refused(text):
    """One warning that names path, reason and remedy; then the shipped table answers."""
    with pytest.warns(UserWarning) as caught:
        assert look().source == "shipped table"
        assert look(n=3072).source == "shipped table"
    (warning,) = caught
    message = str(warning.message)
    assert str(dispatch.user_table_path()) in message and text in message and "run `fastlora tune` again" in message


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "no JSON"),
        (b'{"version": 1, "entries": [', "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"[]", 'no object with "version" and "entries"'),
        (b'{"version": 1}', 'no object with "version" and "entries"'),
        (b'{"entries": []}', "version None"),
        (b'{"version": 2, "entries": [{"unheard": "of"}]}', "version 2, and this fastlora reads version 1"),
        (b'{"version": 1, "entries": [3]}', "entry 0 lacks or has too much: it is no object"),
    ],
)
def test_a_file_that_is_no_table(user_table, content, text):
    user_table().write_bytes(content)
    refused(text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"variant": "merged"}, "has variant 'merged'; accepted: 'library', 'split', 'one_pass', 'leader'"),
        ({"variant": ["split"]}, "has variant ['split']"),
        ({"role": "bwd"}, "has role 'bwd'; accepted: 'fwd', 'dx'"),
        ({"dtype": "float64"}, "has dtype 'float64'"),
        ({"parts": 2}, "has parts 2; accepted: 1, 3"),
        ({"device": ""}, "has device ''"),
        ({"measured": None}, "has measured None"),
        ({"m": 12608}, "has m 12608 and r 16; m must be a power of two"),
        ({"r": 17}, "r one of [16, 32, 64, 128, 256]"),
        ({"aligned": 1}, "has aligned 1; it must be true or false"),
        ({"n": True}, "has n True; it must be an int >= 1"),
        ({"k": 0}, "has k 0"),
        ({"r": 128}, "has variant 'one_pass' for r 128; it serves ranks up to 64"),
        ({"time_us": -1}, "has time_us -1"),
        ({"time_us": float("nan")}, "has time_us nan"),
        ({"extra": 1}, "lacks or has too much: extra"),
        ({"tile": [1]}, "has a tile with [1], which this fastlora does not know"),
        ({"tile": TILE | {"block_q": 16}}, "has a tile with block_q, which this fastlora does not know"),
        ({"tile": {"block_m": 16}}, "has a tile without block_n"),
        ({"tile": TILE | {"block_m": 96}}, "has a tile with block_m 96; it must be a power of two, 16 to 512"),
        ({"tile": TILE | {"block_k": 4096}}, "has a tile with block_k 4096"),
        ({"tile": TILE | {"num_warps": 3}}, "has a tile with num_warps 3; it must be a power of two"),
        ({"tile": TILE | {"tma": 1}}, "has a tile with tma 1; it must be of type bool"),
        ({"tile": TILE | {"num_stages": 0}}, "has a tile with num_stages 0"),
        ({"tile": TILE | {"num_stages": 2.0}}, "has a tile with num_stages 2.0; it must be of type int"),
    ],
)
def test_an_entry_that_cannot_be(user_table, change, text):
    user_table({**ROW, "m": 64}, {**ROW, **change})
    refused(f"its entry 1 {text}" if text.startswith(("has", "lacks")) else text)


def test_two_entries_for_one_key(user_table):
    user_table(ROW, {**ROW, "time_us": None})
    refused("entry 1 has the key of an earlier one")


def test_a_table_that_cannot_be_read(user_table):
    path = user_table()
    path.unlink()
    path.mkdir()
    refused("Is a directory")


def test_a_table_named_and_absent(monkeypatch, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look()  # none at the usual place is the usual case
    monkeypatch.setenv("FASTLORA_TABLE", str(tmp_path / "typo.json"))
    dispatch.reload()
    refused("No such file")


def test_a_broken_shipped_table_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "table.json").write_text("{")
    monkeypatch.setattr(dispatch, "SHIPPED", tmp_path / "table.json")
    dispatch.reload()
    with pytest.raises(RuntimeError, match=r"table\.json cannot be used: it is no JSON .* Install fastlora again"):
        look()


def test_what_is_written_is_read_back(tmp_path):
    key = Key(H200, "dx", 64, 32, 16, 16, True, 1, "float16")
    entry = Entry("dx", "leader", TILE, "measured here", 3.25, "a test")
    path = tmp_path / "table.json"
    path.write_bytes(format_table({key: entry}))
    assert read_table(path, "a test") == {key: entry}
    with pytest.raises(TableError, match="version"):
        path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 0'))
        read_table(path, "a test")
