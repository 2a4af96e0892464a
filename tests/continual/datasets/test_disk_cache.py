"""The directory by itself: whole entries or none, the bound, other files, other processes, disks that cannot be written."""

import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import stat
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastlora.continual.config import UsageError
from fastlora.continual.datasets.disk_cache import LOCK, TAG, DiskCache, entry_bytes

SIZE = entry_bytes(8, 6)


def key(number):
    """The first digits differ, so that entries lie in different folders."""
    return bytes([number % 256]) + number.to_bytes(31, "big")


def pixels(number, height=8, width=6):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def entries(folder):
    return sorted(path for path in Path(folder).glob("??/*") if not path.name.startswith("."))


def path_of(folder, number):
    return folder / key(number).hex()[:2] / key(number).hex()[2:]


def is_kept(cache, number):
    kept = cache.get(key(number))
    assert kept is None or torch.equal(kept, pixels(number))
    return kept is not None


def counted(folder):
    return int((folder / LOCK).read_text())


def age(folder, seconds):
    """As if everything had been used so long ago."""
    for path in entries(folder):
        used = path.stat().st_mtime - seconds
        os.utime(path, (used, used))


@pytest.fixture
def make(tmp_path):
    return lambda images=100: DiskCache(tmp_path / "cache", images * SIZE)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def test_what_was_put_is_there_in_later_runs_too(make, folder):
    cache = make()
    assert not is_kept(cache, 0)
    cache.put(key(0), pixels(0))
    cache.put(key(1), pixels(1, 5, 9))
    assert is_kept(cache, 0) and torch.equal(make().get(key(1)), pixels(1, 5, 9))
    cache.get(key(0)).zero_()  # a copy of the caller's own
    assert is_kept(cache, 0)
    assert entries(folder) == [path_of(folder, 0), path_of(folder, 1)]
    assert counted(folder) == sum(path.stat().st_size for path in entries(folder)) == SIZE + entry_bytes(5, 9)
    assert (folder / TAG).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert stat.S_IMODE(path_of(folder, 0).stat().st_mode) == 0o644  # other users may read it
    cache.put(key(0), pixels(0))  # once more counts once
    assert counted(folder) == SIZE + entry_bytes(5, 9)


def test_every_flipped_bit_is_found(make, folder):
    cache = make()
    cache.put(key(3), pixels(3))
    whole = path_of(folder, 3).read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path_of(folder, 3).write_bytes(damaged)
        assert not is_kept(cache, 3)
    cache.put(key(3), pixels(3))
    assert is_kept(cache, 3) and counted(folder) == SIZE


@pytest.mark.parametrize("damage", ["empty", "header", "half", "longer", "zeros", "another", "huge"])
def test_damaged_entries_are_made_again(make, folder, damage):
    cache, path = make(), path_of(folder, 3)
    for number in (3, 4):
        cache.put(key(number), pixels(number))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "header": whole[:50],
            "half": whole[: len(whole) // 2],
            "longer": whole + b"\0",
            "zeros": bytes(len(whole)),
            "another": path_of(folder, 4).read_bytes(),
            "huge": whole[:40] + b"\xff" * 8 + whole[48:],
        }[damage]
    )
    assert not is_kept(cache, 3) and is_kept(cache, 4)
    cache.put(key(3), pixels(3))
    assert is_kept(cache, 3) and path.read_bytes() == whole


def test_something_in_the_place_of_an_entry(make, folder):
    cache = make()
    cache.put(key(4), pixels(4))
    path_of(folder, 3).mkdir(parents=True)
    assert not is_kept(cache, 3)
    with pytest.warns(UserWarning, match="cannot be written .Is a directory"):
        cache.put(key(3), pixels(3))
    assert is_kept(cache, 4) and path_of(folder, 3).is_dir()


def test_the_bound_is_held_and_the_run_keeps_what_it_uses(make, folder):
    cache = make(10)
    with pytest.warns(
        UserWarning, match=r"is full: its .* GB hold what this run uses\. .* Raise data.cache_dir_gb"
    ) as told:
        for number in range(30):
            cache.put(key(number), pixels(number))
    assert len(told) == 1 and counted(folder) == 10 * SIZE
    assert [number for number in range(30) if is_kept(cache, number)] == list(range(10))


def test_a_later_run_drives_out_what_was_unused_for_longest(make, folder):
    first = make(10)
    for number in range(10):
        first.put(key(number), pixels(number))
    age(folder, 5000)
    second = make(10)
    assert all(is_kept(second, number) for number in (0, 1, 2))  # used by the second run
    age(folder, 100)
    third = make(10)
    assert is_kept(third, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(20, 26):
            third.put(key(number), pixels(number))
    assert all(is_kept(third, number) for number in (*range(20, 26), 3, 0, 1, 2))
    assert len(entries(folder)) == 10 and counted(folder) == 10 * SIZE


def test_a_smaller_bound_holds_from_the_start(make, folder):
    first = make(10)
    for number in range(10):
        first.put(key(number), pixels(number))
    age(folder, 100)
    second = make(5)
    assert len(entries(folder)) == 4 and counted(folder) == 4 * SIZE  # nine tenths of the bound
    second.put(key(20), pixels(20))
    assert is_kept(second, 20) and counted(folder) == 5 * SIZE


def test_the_count_is_made_again_where_it_is_lost(make, folder):
    make().put(key(0), pixels(0))
    for content in (b"", b"some"):
        (folder / LOCK).write_bytes(content)
        make()
        assert counted(folder) == SIZE
    (folder / LOCK).write_text(f"{9 * SIZE:020d}\n")  # too much: entries were deleted by hand
    cache = make(10)
    for number in range(1, 10):
        cache.put(key(number), pixels(number))
    assert counted(folder) == 10 * SIZE == sum(path.stat().st_size for path in entries(folder))


def test_what_killed_writers_left_goes_and_other_files_stay(make, folder, tmp_path):
    cache = make(3)
    for number in range(3):
        cache.put(key(number), pixels(number))
    age(folder, 10_000)
    outside = tmp_path / "outside"
    outside.mkdir()
    name = key(1).hex()[2:]
    left, recent = (folder / "01" / f".{name}.{end}" for end in ("abcd1234", "efgh5678"))
    foreign = [folder / "01" / "notes.txt", folder / "01" / ".hidden.abcd1234", folder / "photo.jpg", outside / name]
    for path in (left, recent, *foreign):
        path.write_bytes(b"something")
        if path != recent:
            os.utime(path, (1, 1))
    os.symlink(outside, folder / "ff")
    os.symlink(outside / name, folder / "01" / ("a" * 62))
    later = make(3)
    for number in range(10, 12):
        later.put(key(number), pixels(number))
    assert not is_kept(later, 0) and is_kept(later, 10) and counted(folder) <= 3 * SIZE
    assert not left.exists() and recent.exists()
    assert all(path.read_bytes() == b"something" for path in foreign)
    assert (folder / "ff").is_symlink() and (folder / "01" / ("a" * 62)).is_symlink()


# ---- what is no directory for a cache


def test_a_directory_of_other_things_is_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "abcd":
        (tmp_path / "photos" / name).write_bytes(b"x")
    with pytest.raises(
        UsageError, match=r"data.cache_dir is '.*photos', which holds 'a', 'b', 'c' and 1 more and is no"
    ):
        DiskCache(tmp_path / "photos", 10**6)
    (tmp_path / "photos" / TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# of another program\n")
    with pytest.raises(UsageError, match="is no cache of images"):
        DiskCache(tmp_path / "photos", 10**6)
    assert sorted(os.listdir(tmp_path / "photos")) == [TAG, *"abcd"]
    with pytest.raises(UsageError, match="data.cache_dir is '.*a', which is no directory. Give one that is new"):
        DiskCache(tmp_path / "photos" / "a", 10**6)
    with pytest.raises(UsageError, match="and '.*missing' is no directory to make it in"):
        DiskCache(tmp_path / "missing" / "cache", 10**6)
    assert not (tmp_path / "missing").exists()


def test_an_empty_directory_will_do(tmp_path):
    cache = DiskCache(tmp_path, 10**6)
    cache.put(key(0), pixels(0))
    assert is_kept(DiskCache(tmp_path, 10**6), 0)


# ---- disks that cannot be written


@pytest.fixture
def nobody():
    """A directory with a cache, and a user who may only read it: root may write anywhere."""
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    DiskCache(folder, 10**6).put(key(0), pixels(0))
    age(folder, 100)
    for path in (folder, *folder.glob("??")):
        path.chmod(0o555)
    for path in (*folder.glob("??/*"), folder / LOCK):
        path.chmod(0o444)
    if user == 0:
        try:
            os.seteuid(65534)
        except PermissionError:
            pytest.skip("root without the right to become another user writes anywhere")
    yield folder
    os.seteuid(user)
    for path in (folder, *folder.glob("??")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_directory_that_can_only_be_read_is_read(nobody):
    with pytest.warns(UserWarning, match=r"cannot be written \(Permission denied\). What is in it is used") as told:
        cache = DiskCache(nobody, 10**6)
        assert is_kept(cache, 0)
        for number in (1, 2):
            cache.put(key(number), pixels(number))
            assert not is_kept(cache, number)
    assert len(told) == 1


def test_a_full_disk_is_told_once_and_leaves_nothing_half_written(make, folder):
    """By the limit on the size of a file, which a write meets in its middle."""
    cache, (soft, hard) = make(), resource.getrlimit(resource.RLIMIT_FSIZE)
    cache.put(key(0), pixels(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 10, hard))
    try:
        with pytest.warns(UserWarning, match="cannot be written .File too large.. What is in it is used") as told:
            for number in (1, 2, 3):
                cache.put(key(number), pixels(number))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(told) == 1 and is_kept(cache, 0) and entries(folder) == [path_of(folder, 0)]
    assert not list(folder.rglob(".*")) and counted(folder) == SIZE
    again = make()
    again.put(key(1), pixels(1))
    assert is_kept(again, 1)


def test_threads_that_fail_together_tell_it_once(make, monkeypatch):
    cache, together = make(), threading.Barrier(4)

    def fail(**_):
        together.wait(10)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", fail)
    with pytest.warns(UserWarning, match="cannot be written .No space left on device") as told:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda number: cache.put(key(number), pixels(number)), range(4)))
    assert len(told) == 1


def test_a_directory_that_is_deleted_under_way(make, folder):
    cache = make()
    cache.put(key(0), pixels(0))
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="cannot be written"):
        cache.put(key(0), pixels(0))
    assert not is_kept(cache, 0) and not folder.exists()


# ---- at the same time


def write_all(folder, limit, numbers, threads=3):
    """Put and get in threads; every figure that is had is right."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cache, wrong = DiskCache(folder, limit), []

    def work():
        for number in numbers:
            cache.put(key(number), pixels(number))
            kept = cache.get(key(number))
            if kept is not None and not torch.equal(kept, pixels(number)):
                wrong.append(number)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os._exit(1 if wrong else 0)


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=write_all, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("images", [1000, 50])
def test_processes_at_once(folder, images):
    """The same entries and others, into a directory that none of them has made before, with room and without."""
    limit = images * SIZE
    writers = [start(folder, limit, range(first, first + 80)) for first in (0, 20, 40)]
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = DiskCache(folder, limit)
    kept = [number for number in range(120) if is_kept(cache, number)]
    assert len(kept) == len(entries(folder)) == min(120, images)
    assert counted(folder) == len(kept) * SIZE <= limit and not list(folder.rglob(".*"))


def test_kills(folder):
    """What a killed writer leaves is whole, or not there; nobody waits for it."""
    choose = random.Random(0)
    for first in range(0, 10_000, 1000):
        begun, begin = os.pipe()
        child = os.fork()
        if child == 0:
            cache = DiskCache(folder, 10**9)
            for number in range(first, first + 1000):
                cache.put(key(number), pixels(number, 224, 224))
                os.write(begin, b".")
            os._exit(1)
        os.read(begun, 1)
        time.sleep(choose.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(begun), os.close(begin)
    cache = DiskCache(folder, 10**9)
    for path in entries(folder):
        number = int(path.name, 16)
        assert torch.equal(cache.get(key(number)), pixels(number, 224, 224))
    assert len(entries(folder)) >= 10 and counted(folder) >= sum(path.stat().st_size for path in entries(folder))
    cache.put(key(1), pixels(1))
    assert is_kept(cache, 1)
