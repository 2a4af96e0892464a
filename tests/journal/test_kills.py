"""What a kill leaves, and that memory does not grow with the tasks."""

import gc
import os
import random
import shutil
import signal
import time

import pytest
import torch
from journal.cases import Net, learn, same, settle, state
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter
from fastlora.optim import ProxAdamW


def kill(work, seconds):
    """A child works over and over and is killed so long after the first time; SIGKILL, so that it cleans nothing up."""
    begun, begin = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(begin, b".")
            while True:
                work()
        finally:
            os.write(begin, b".")
            os._exit(1)
    os.read(begun, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(begun), os.close(begin)
    assert os.WIFSIGNALED(status), "the child's work failed"


def wide():
    """Large files, so that many kills fall into a write."""
    model = nn.Sequential(nn.Linear(1024, 1024))
    fastlora.inject(model, rank=256, where=["0"])
    return model


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path):
    path, model, choose = tmp_path / "a.safetensors", wide(), random.Random(0)

    def save_the_next():
        for parameter in fastlora.adapter_parameters(model):
            parameter.data.add_(1)
        fastlora.save_adapter(model, path)

    for _ in range(15):
        kill(save_the_next, choose.uniform(0.0, 0.1))
        read_adapter(path)  # whole: the checksum fits


def test_a_kill_leaves_a_journal_that_can_be_read_and_continued(tmp_path):
    journal, model, choose = fastlora.Journal(tmp_path / "journal"), wide(), random.Random(0)

    def append_the_next():
        for parameter in fastlora.adapter_parameters(model):
            parameter.data.normal_()
        journal.append(model)

    for seed in range(15):
        before = len(journal)
        torch.manual_seed(seed)  # the children draw other adapters each
        kill(append_the_next, choose.uniform(0.0, 0.1))
        assert [entry.number for entry in journal] == list(range(1, len(journal) + 1)) and len(journal) > before
        if len(journal) > 8:  # each append reads what is there
            shutil.rmtree(journal.directory)


def test_what_a_killed_writer_left_is_swept(journal):
    left = journal.directory / ".task_04.safetensors.k1ll3d"
    left.write_bytes(b"half")
    model = Net()
    journal.rebuild(model)
    assert len(journal) == 3 and left.exists()
    journal.append(learn(model, 4))
    assert sorted(os.listdir(journal.directory)) == [f"task_0{i}.safetensors" for i in (1, 2, 3, 4)]


def live_bytes():
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    # by type: isinstance asks some objects for their __class__, and those warn
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


@pytest.fixture
def counted():
    """What lives already is set aside, which makes `live_bytes` quick."""
    gc.freeze()
    yield live_bytes
    gc.unfreeze()


def test_memory_does_not_grow_with_the_tasks(tmp_path, counted):
    """Task after task is trained, written and merged; what is alive after each is the model alone."""
    journal, model, alive = fastlora.Journal(tmp_path / "journal"), Net(), []
    x = torch.randn(4, 8)
    for _ in range(20):
        fastlora.inject(model, rank=4, where=["attn", "fc"])
        optimizer = ProxAdamW(model, lr=0.01)
        optimizer.kappa = 0.3
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        journal.append(model)
        settle(model)
        del optimizer
        alive.append(counted())
    assert len(journal) == 20 and set(alive[1:]) == {alive[1]}
    rebuilt = Net()
    journal.rebuild(rebuilt)
    assert same(state(rebuilt), state(model))
    assert counted() - alive[1] == sum(p.numel() * 4 for p in rebuilt.parameters())
