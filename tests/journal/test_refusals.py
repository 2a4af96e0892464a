"""Models and adapters that do not belong to a journal: whatever is refused changes nothing."""

import pytest
import torch
from journal.cases import Net, learn, settle, state
from torch import nn

import fastlora

# ---- models it refuses


def merged(journal):
    model = Net()
    journal.rebuild(model, after=2)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (merged, r"Net differs from .* in 3 of 10 weights .*it has been merged already. Load the untouched weights"),
        (lambda _: Net(seed=1), r"Net differs from .* it is another model of the same shapes. Load the untouched"),
        (lambda _: Net(width=10), r"another model than the adapters' base: attn.in_proj_weight is float32\[30, 10\]"),
        (lambda _: Net(dtype=torch.float16), r"attn.in_proj_weight is float16\[24, 8\], there float32\[24, 8\]"),
        (lambda _: nn.Linear(3, 3), r"it lacks attn.in_proj_bias, .* and 7 more and has bias, weight besides"),
        (lambda _: Net().to("meta"), "is on the meta device and has no content"),
        (lambda _: learn(Net(), 1), r"Net has 5 adapters; .* Call fastlora.remove\(model\)"),
    ],
)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_model_that_is_not_the_base_is_not_touched(journal, make, message, after):
    model = make(journal)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        journal.rebuild(model, after=after)
    assert model.state_dict().keys() == before.keys()
    assert all(value.is_meta or torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"after": 4}, "task 4 was asked for; .* holds 3 tasks. Give 0 to 3"),
        ({"after": -1}, "task -1 was asked for"),
        ({"after": 1, "tasks": [1]}, r"after=1 and tasks=\[1\] were given; give one of them"),
        ({"tasks": [3, 1]}, r"tasks is \[3, 1\]; .* holds 3 tasks. Give numbers from 1 to 3, ascending"),
        ({"tasks": [1, 1]}, r"tasks is \[1, 1\]"),
        ({"tasks": [4]}, r"tasks is \[4\]"),
    ],
)
def test_tasks_that_are_not_there(journal, arguments, message):
    with pytest.raises(ValueError, match=message):
        journal.rebuild(Net(), **arguments)


def test_an_overflow_in_the_last_task_finds_the_first_weight_as_it_was(tmp_path):
    """float16 ends at 65504: all three fit in their order, the third does not without the second."""
    model, journal = nn.Sequential(nn.Linear(1, 1, bias=False)).half(), fastlora.Journal(tmp_path / "journal")
    base = nn.Sequential(nn.Linear(1, 1, bias=False)).half()
    for network in (model, base):
        network[0].weight.data[:] = 40000
    for change in (3000.0, -20000.0, 30000.0):
        fastlora.inject(model, rank=1, where=["0"], gate_init="ones")
        model[0].lora_a.data[:], model[0].lora_b.data[:] = 1, change
        journal.append(model)
        settle(model)
    with pytest.raises(fastlora.MergeError, match="results are not finite in float16"):
        journal.rebuild(base, tasks=[1, 3])
    assert base[0].weight.item() == 40000
    journal.rebuild(base)
    assert torch.equal(base[0].weight, model[0].weight)


# ---- what it does not append


def test_the_same_adapters_are_not_written_twice(journal):
    model = Net()
    journal.rebuild(model)
    journal.append(learn(model, 4))
    with pytest.raises(ValueError, match="adapters are those of .*task_04.safetensors, bit for bit"):
        journal.append(model)
    assert len(journal) == 4


def test_another_model_is_not_appended(journal):
    model = Net()
    journal.rebuild(model)
    with torch.no_grad():
        model.norm.weight[0] += 1
    for other, message in (
        (model, "norm.weight of Net changed since task 1, and no task of .* updates that"),
        (Net(seed=1), "of Net changed since task 1"),
        (Net(width=10), "another model than the adapters' base"),
    ):
        with pytest.raises(ValueError, match=message):
            journal.append(learn(other, 4))
    assert len(journal) == 3


@pytest.mark.parametrize("key", ["lora_a", "lora_b", "gate"])
def test_what_is_not_finite_is_not_written(tmp_path, key):
    model, journal = learn(Net(), 1), fastlora.Journal(tmp_path / "journal")
    getattr(model.fc, key).data.view(-1)[0] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match=rf"fc.{key} holds non-finite values; it was not written"):
        journal.append(model)
    assert not journal.directory.exists()
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(before.values(), state(model).values()))


def test_a_model_without_adapters_and_a_file_for_a_directory(tmp_path):
    with pytest.raises(ValueError, match="Net has no adapters"):
        fastlora.Journal(tmp_path / "journal").append(Net())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file; a journal is a directory"):
        fastlora.Journal(tmp_path / "file")


def test_two_who_append_at_once(journal, monkeypatch):
    """The second one is told, and the first one's file is whole."""
    from fastlora import journal as module

    model, other = Net(), Net()
    journal.rebuild(model), journal.rebuild(other)
    learn(model, 4), learn(other, 5)

    def save(*arguments):
        with pytest.raises(RuntimeError, match="journal is in use: another process writes there at this moment"):
            fastlora.Journal(journal.directory).append(other)
        fastlora.save_adapter(*arguments)

    monkeypatch.setattr(module, "save_adapter", save)
    journal.append(model)
    assert len(journal) == 4
    monkeypatch.undo()
    journal.append(other)  # the lock went with the append
    assert len(list(journal)) == 5
