import os
import resource
import stat
import subprocess
import sys
import time

import pytest

from fastlora.files import write_directory

FILES = {"a.bin": b"one", "b.json": b"two"}


def read(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_a_directory_is_made_whole(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty", target_is_directory=True)
    for name in ("new", "link"):
        write_directory(tmp_path / name, FILES)
        assert read(tmp_path / name) == FILES
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o755
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "new"] and read(tmp_path / "empty") == FILES


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, step):
    def fail(*arguments):
        raise OSError("planted")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"new was not written .planted.*has room, then write again"):
        write_directory(tmp_path / "new", FILES)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """By the limit on the size of a file, which a write meets in its middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
    try:
        with pytest.raises(OSError, match="new was not written .File too large"):
            write_directory(tmp_path / "new", FILES | {"c": bytes(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_what_is_there_already_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(FileExistsError, match=f"{name} exists already, and is not overwritten. Give a new"):
            write_directory(tmp_path / name, FILES)
    # another writer, after the look
    monkeypatch.setattr("fastlora.files._check_new", lambda path: None)
    with pytest.raises(OSError, match="full was not written"):
        write_directory(tmp_path / "full", FILES)
    assert read(tmp_path / "full") == {"mine": b"mine"} and sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_no_parent(tmp_path):
    with pytest.raises(FileNotFoundError, match="Make sure that .*missing exists"):
        write_directory(tmp_path / "missing" / "new", FILES)


def test_killed_writers_leave_all_or_nothing(tmp_path):
    """kill -9 at many moments of a loop that writes one directory after the other."""
    code = (
        "import itertools, sys; from fastlora.files import write_directory\n"
        "for i in itertools.count(): write_directory(f'{sys.argv[1]}/{i}', {k: bytes(20_000) for k in 'abc'})"
    )
    for round_ in range(4):
        folder = tmp_path / str(round_)
        folder.mkdir()
        writer = subprocess.Popen([sys.executable, "-c", code, folder])
        while not any(folder.iterdir()):
            time.sleep(0.01)
        time.sleep(0.013 * round_)
        writer.kill()
        writer.wait()
        made = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert all(sorted(os.listdir(path)) == ["a", "b", "c"] for path in made)
        assert len(list(folder.iterdir())) - len(made) <= 1
