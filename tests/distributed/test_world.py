"""What the processes of a run tell each other."""

import pytest
import torch

pytest.importorskip("open_clip")

from distributed import runs  # noqa: E402
from distributed.processes import in_processes  # noqa: E402

from fastlora.continual.device import find_device  # noqa: E402
from fastlora.continual.distributed import ALONE, join  # noqa: E402


def test_rows_gradients_and_objects():
    found = in_processes(3, runs.talk)
    shares, parts = zip(*found)
    for index, total in enumerate((0, 1, 2, 7)):
        rows = [row for each in shares for row in range(total)[each[index]]]
        sizes = [len(range(total)[each[index]]) for each in shares]
        assert rows == list(range(total)) and max(sizes) - min(sizes) <= 1
    assert all(len(range(total)[each[index]]) >= 1 for each in parts for index, total in enumerate((1, 2, 7)))


def test_what_differs_is_told_everywhere():
    first, *others = in_processes(3, runs.disagree)
    assert first[0].startswith("RuntimeError: the gates of process 1 of 3 (from 0) differ from those of process 0.")
    assert first[1].startswith("RuntimeError: the signs of process 2 of 3")
    assert first[2].startswith("RuntimeError: the ranks of process 1, 2 of 3")
    assert first[3] == "" and first[4] == "OSError: the disk is full"
    assert all(other == [*first[:4], "FirstFailed: the disk is full"] for other in others)


def test_one_process_says_nothing():
    rows = torch.ones(3, requires_grad=True)
    assert ALONE.gather(rows, 3) is rows and ALONE.sum(rows) is rows and ALONE.share(3) == ALONE.part(3) == slice(0, 3)
    ALONE.average_gradients([rows])
    ALONE.check_equal([rows], "nothing")
    with pytest.raises(OSError, match="the disk is full"):
        ALONE.from_first(runs._full_disk)
    assert rows.grad is None


def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert join() is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() is ALONE


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert find_device("auto", 1) == find_device("cuda", 1) == torch.device("cuda:1") and len(taken) == 2
    assert find_device("cpu", 1) == torch.device("cpu") and find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(
        ValueError, match="device is 'cuda:0', and several processes .* Give --device cuda, and CUDA_VIS"
    ):
        find_device("cuda:0", 1)
    with pytest.raises(RuntimeError, match="process 2 .from 0. of its machine, where torch sees 2 GPUs"):
        find_device("cuda", 2)
