"""Several processes under one roof; what they train plays no part."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from fastlora.continual import seeds
from fastlora.continual.arguments import TrainArguments, parse_train
from fastlora.continual.config import LoRAConfig, RunConfig


def child(code):
    return [sys.executable, "-c", f"import os, sys, time\n{code}"]


def test_lines_say_whose_they_are(capfd):
    code = "print('lora  task 1'); print('  a table'); print('a note', file=sys.stderr); print('lora  task 2')"
    assert seeds.run_all({0: child(code), 7: child(code)}, 2, "lora") == {0: 0, 7: 0}
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == [f"seed {seed} | lora  task {task}" for seed in (0, 7) for task in (1, 2)]
    assert sorted(err.splitlines()) == ["seed 0 | a note", "seed 7 | a note"]


def test_a_failure_does_not_stop_the_others(capfd):
    codes = seeds.run_all({0: child("sys.exit('no room')"), 1: child("time.sleep(0.2); print('lora')")}, 1, "lora")
    assert codes == {0: 1, 1: 0}
    out, err = capfd.readouterr()
    assert out == "seed 1 | lora\n" and err == "seed 0 | no room\n"


def test_no_more_than_asked_for_at_once_and_one_thread_each(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = f"""
open(f"{tmp_path}/{{os.getpid()}}", "w").close()
assert len(os.listdir("{tmp_path}")) <= 2 and os.environ["OMP_NUM_THREADS"] == "1"
time.sleep(0.2)
os.unlink(f"{tmp_path}/{{os.getpid()}}")
"""
    assert set(seeds.run_all({seed: child(code) for seed in range(5)}, 2, "").values()) == {0}


def test_an_interrupt_stops_them_all(tmp_path):
    """SIGTERM, so that each can leave in good order; those that have not begun never do."""
    code = f"""
import signal
def leave(*_):
    open(f"{tmp_path}/{{os.getpid()}}.left", "w").close(); sys.exit(3)
signal.signal(signal.SIGTERM, leave)
open(f"{tmp_path}/{{os.getpid()}}.here", "w").close()
time.sleep(60)
"""

    def interrupt():
        while len(list(tmp_path.glob("*.here"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        seeds.run_all({seed: child(code) for seed in range(4)}, 2, "")
    thread.join()
    assert time.perf_counter() - start < 30
    assert len(list(tmp_path.glob("*.here"))) == len(list(tmp_path.glob("*.left"))) == 2


def test_the_command_of_a_seed_is_the_run_with_that_seed(tmp_path):
    run = RunConfig(method=LoRAConfig(rank=3, targets=("q", "fc2"), lr=5e-5, where="text"), log_every=3)
    arguments = TrainArguments(run, tmp_path / "out", resume=True, seeds=(2, 9))
    for seed, command in seeds.commands(arguments).items():
        parsed = parse_train(command[command.index("train") + 1 :])
        assert parsed.run == RunConfig(method=run.method, log_every=3, seed=seed)
        assert parsed.out == tmp_path / "out" / f"seed{seed}" and parsed.resume and not parsed.seeds


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, expected in (
        ("auto", ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda:1", ["cuda:1"] * 3),
        ("cpu", ["cpu"] * 3),
    ):
        arguments = TrainArguments(RunConfig(device=device), Path("out"), seeds=(0, 1, 2))
        given = [re.search("--device=(\\S+)", " ".join(command))[1] for command in seeds.commands(arguments).values()]
        assert given == expected
    assert (seeds.default_processes("auto"), seeds.default_processes("cuda:1")) == (2, 1)


def test_processes_of_a_cpu(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for threads, expected in (("", 8), ("1", 8), ("3", 2), ("64", 1), ("4,2", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert seeds.default_processes("cpu") == expected


def test_a_directory_that_is_taken(tmp_path):
    (tmp_path / "seed1").mkdir()
    (tmp_path / "seed1" / "mine").write_text("")
    arguments = TrainArguments(RunConfig(), tmp_path, seeds=(0, 1))
    with pytest.raises(FileExistsError, match="seed1 exists already"):
        seeds.check_directories(arguments)
