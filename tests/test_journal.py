"""The journal: bit-exact rebuilding, what it refuses, and what a kill leaves. Whatever is refused changes nothing."""

import gc
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter
from fastlora.optim import ProxAdamW

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Net(nn.Module):
    """A packed attention, two linear layers of which one is adapted, and a norm."""

    def __init__(self, width=8, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.attn = nn.MultiheadAttention(width, 2)
        self.fc, self.norm, self.head = nn.Linear(width, 12), nn.LayerNorm(width), nn.Linear(12, 3)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.fc(self.norm(x + self.attn(x, x, x)[0])))


def learn(model, task):
    """Adapters as after training on a task: about half of the gates live."""
    fastlora.inject(model, rank=6, where=["attn", "fc"], kappa=0.6, scaling=0.7)
    generator = torch.Generator().manual_seed(task)
    for _, adapter in fastlora.adapters(model):
        adapter.reset_adapter_(generator)
        adapter.lora_b.data.normal_(generator=generator)
    return model


def settle(model):
    fastlora.merge(model)
    return fastlora.remove(model)


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write_tasks(directory, dtype=torch.float32, count=3, **options):
    """The journal of a model that learned `count` tasks, and its states: 0 is the base."""
    model, journal = Net(dtype=dtype, **options), fastlora.Journal(directory)
    states = [state(model)]
    for task in range(1, count + 1):
        journal.append(learn(model, task), f"name {task}")
        states.append(state(settle(model)))
    return journal, states


@pytest.fixture
def journal(tmp_path):
    return write_tasks(tmp_path / "journal")[0]


# ---- what it gives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_state_after_any_task_is_rebuilt_bit_for_bit(tmp_path, dtype):
    journal, states = write_tasks(tmp_path / "journal", dtype, count=5)
    assert not any(same(a, b) for a, b in zip(states, states[1:]))
    for task, expected in enumerate(states):
        model = Net(dtype=dtype)
        reports = journal.rebuild(model, after=task)
        assert same(state(model), expected) and len(reports) == task
    model = Net(dtype=dtype)
    journal.rebuild(model)
    assert same(state(model), states[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dropped_task_leaves_no_trace(tmp_path, dtype):
    """The state of a model that learned tasks 1 and 3 alone, by way of the adapters in place."""
    journal, _ = write_tasks(tmp_path / "journal", dtype)
    expected = Net(dtype=dtype)
    for task in (1, 3):
        settle(learn(expected, task))
    model = Net(dtype=dtype)
    journal.rebuild(model, tasks=[1, 3])
    assert same(state(model), state(expected))
    shutil.copytree(journal.directory, tmp_path / "copy")
    (tmp_path / "copy" / "task_02.safetensors").unlink()  # nothing of it is needed
    model = Net(dtype=dtype)
    fastlora.Journal(tmp_path / "copy").rebuild(model, tasks=[1, 3])
    assert same(state(model), state(expected))


def test_listing(tmp_path):
    journal, _ = write_tasks(tmp_path / "journal")
    assert len(journal) == 3
    entries = list(journal)
    assert [(entry.number, entry.name) for entry in entries] == [(1, "name 1"), (2, "name 2"), (3, "name 3")]
    assert [entry.path.name for entry in entries] == [f"task_0{i}.safetensors" for i in (1, 2, 3)]
    assert list(entries[0].ranks) == ["attn.q", "attn.k", "attn.v", "attn.out_proj", "fc"]
    assert all(0 <= rank <= 6 for entry in entries for rank in entry.ranks.values())
    assert 0 < sum(entries[0].ranks.values()) < 30
    assert set(entries[0].base) == set(dict(Net().named_parameters()))
    assert entries[0].base["fc.weight"].startswith("float32[12, 8] ")
    assert len(fastlora.Journal(tmp_path / "none")) == 0 and list(fastlora.Journal(tmp_path / "none")) == []


def test_a_second_process_goes_on_where_the_first_ended(tmp_path):
    _, states = write_tasks(tmp_path / "journal", count=4)
    write_tasks(tmp_path / "other", count=2)
    model, journal = Net(), fastlora.Journal(tmp_path / "other")
    journal.rebuild(model)
    for task in (3, 4):
        assert journal.append(learn(model, task)).name == f"task_0{task}.safetensors"
        settle(model)
    assert same(state(model), states[4])
    model = Net()
    journal.rebuild(model, after=4)
    assert same(state(model), states[4])


def test_tasks_may_adapt_other_modules_and_keep_nothing(tmp_path):
    journal, model = fastlora.Journal(tmp_path / "journal"), Net()
    for task, (where, kappa) in enumerate([(["fc"], 0.1), (["head", "attn"], 0.1), (["fc"], 99.0), (["fc"], 99.0)]):
        fastlora.inject(model, rank=3, where=where, kappa=kappa)
        for _, adapter in fastlora.adapters(model):
            adapter.lora_b.data.normal_(generator=torch.Generator().manual_seed(task))
        journal.append(model)
        settle(model)
    assert [sum(entry.ranks.values()) > 0 for entry in journal] == [True, True, False, False]
    rebuilt = Net()
    journal.rebuild(rebuilt)
    assert same(state(rebuilt), state(model))


def test_one_layer_as_the_whole_model(tmp_path):
    """Its adapter has no name, and its weight no module before the dot."""
    layer = fastlora.FusedRankLoRALinear(4, 5, rank=2)
    base = {"weight": layer.weight.detach().clone(), "bias": layer.bias.detach().clone()}
    layer.lora_b.data.normal_()
    journal = fastlora.Journal(tmp_path / "journal")
    journal.append(layer)
    plain = settle(layer)
    rebuilt = nn.Linear(4, 5)
    rebuilt.load_state_dict(base)
    journal.rebuild(rebuilt)
    assert torch.equal(rebuilt.weight, plain.weight) and not torch.equal(rebuilt.weight, base["weight"])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_a_weight_that_is_tied_to_an_adapted_one(tmp_path):
    model, journal = Tied(), fastlora.Journal(tmp_path / "journal")
    for _ in range(2):
        fastlora.inject(model, rank=2, where=["head"])
        model.head.lora_b.data.normal_()
        journal.append(model)
        settle(model)
    rebuilt = Tied()
    journal.rebuild(rebuilt)
    assert same(state(rebuilt), state(model)) and rebuilt.head.weight is rebuilt.embed.weight
    with pytest.raises(ValueError, match="Tied differs from .* in 2 of 2 weights .* merged already"):
        journal.rebuild(rebuilt)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_is_repeated(tmp_path, dtype):
    model, journal = Net(dtype=dtype), fastlora.Journal(tmp_path / "journal")
    nearest = Net(dtype=dtype)
    for task in (1, 2):
        journal.append(learn(model, task), rounding="stochastic", seed=task)
        fastlora.merge(model, rounding="stochastic", seed=task)
        fastlora.remove(model)
        settle(learn(nearest, task))
    assert [entry.merge_options for entry in journal] == [{"rounding": "stochastic", "seed": seed} for seed in (1, 2)]
    base = Net(dtype=dtype)
    journal.rebuild(base)
    assert same(state(base), state(model))
    assert same(state(base), state(nearest)) is (dtype == torch.float32)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_residuals_are_rebuilt_with_the_weights(tmp_path, dtype, int8):
    def residuals_of(model):
        if not int8:
            return {}
        weights = {name: adapter.weight for name, adapter in fastlora.adapters(learn(model, 1))}
        fastlora.remove(model)
        return dict(zip(weights, fastlora.ops.new_residuals(list(weights.values()), int8=True)))

    model, journal = Net(dtype=dtype), fastlora.Journal(tmp_path / "journal")
    residuals = residuals_of(model)
    for task in (1, 2, 3):
        journal.append(learn(model, task))
        fastlora.merge(model, residuals=residuals)
        fastlora.remove(model)
    base, rebuilt = Net(dtype=dtype), residuals_of(Net(dtype=dtype))
    journal.rebuild(base, residuals=rebuilt)
    assert same(state(base), state(model)) and same(rebuilt, residuals)
    assert any(bool(residual.any()) for residual in residuals.values())


def test_residuals_of_a_rebuild_that_fails_have_not_changed(journal):
    rewrite_last = sorted(journal.directory.iterdir())[-1]
    not_finite(rewrite_last)
    residuals = {}
    with pytest.raises(ValueError):
        journal.rebuild(Net(), residuals=residuals)
    assert residuals == {}


def test_merge_options_that_no_header_holds_are_refused(tmp_path):
    model, journal = learn(Net(), 1), fastlora.Journal(tmp_path / "journal")
    with pytest.raises(TypeError, match=r"merge options \['check'\] were given; a journal keeps rounding and seed"):
        journal.append(model, check=False)
    with pytest.raises(ValueError, match="'stochastic' without a seed, which no rebuild could repeat"):
        journal.append(model, rounding="stochastic")


# ---- what it refuses on disk


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-30] ^= 4
    path.write_bytes(content)


def pickled(path):
    torch.save({"lora_a": torch.zeros(3)}, path)


def of_another_base(path):
    write_tasks(path.parent.parent / "foreign", seed=5)
    shutil.copy(path.parent.parent / "foreign" / path.name, path)


def of_another_task(path):
    shutil.copy(path.parent / "task_03.safetensors", path)


def of_no_journal(path):
    fastlora.save_adapter(learn(Net(), 2), path)


def of_the_old_format(path):
    from safetensors.torch import save_file

    file = read_adapter(path)
    header = {key: file.header[key] for key in ("settings", "task", "task_name")}
    save_file(file.tensors, path, header | {"format": "fastlora.adapter/1"})


def rewrite(path, model):
    """A file with a right checksum, written by something else than a journal."""
    header = read_adapter(path).header
    fastlora.save_adapter(model, path, {key: header[key] for key in ("task", "task_name", "base", "merge")})


def not_finite(path):
    model = learn(Net(), 2)
    model.attn.k.lora_a.data[0, 0] = float("nan")
    rewrite(path, model)


def too_wide(path):
    rewrite(path, learn(Net(width=10), 2))


def of_other_modules(path):
    model = nn.Sequential(nn.Linear(8, 8))
    fastlora.inject(model, rank=2, where=["0"])
    rewrite(path, model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "task_02.safetensors is not a readable safetensors file .* Restore it from a copy"),
        (flip, "task_02.safetensors is damaged: its content has another SHA-256 .* Restore it from a copy"),
        (pickled, "task_02.safetensors is not a readable safetensors file"),
        (lambda path: path.write_bytes(b""), "task_02.safetensors is not a readable safetensors file"),
        (Path.unlink, r"task_02.safetensors is missing; .* Put the file back, or leave the task out .*tasks="),
        (of_another_base, "task_02.safetensors belongs to another base model than .*task_01.safetensors"),
        (of_another_task, "task_02.safetensors holds task 3, not 2"),
        (of_no_journal, "names no base model .format 'fastlora.adapter/2'.* Merge it by itself"),
        (of_the_old_format, "names no base model .format 'fastlora.adapter/1'.* Merge it by itself"),
        (not_finite, "task_02.safetensors: attn.k holds non-finite values"),
        (too_wide, r"attn.in_proj_weight has shape \[24, 8\]; with 10 rows in lora_b of attn.q it must have 30 rows"),
        (of_other_modules, "Net has no weight for the adapter of 0"),
    ],
)
def test_a_bad_file_changes_no_weight(journal, damage, message):
    """The first task's file is whole, so that merging as one reads would have changed the model."""
    damage(journal.directory / "task_02.safetensors")
    model = Net()
    before = state(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        journal.rebuild(model)
    assert same(state(model), before)
    journal.rebuild(model, after=1)  # what comes before it is not affected


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, of_another_base, of_the_old_format])
def test_nothing_is_appended_to_a_bad_journal(journal, damage):
    model = Net()
    journal.rebuild(model)
    damage(journal.directory / "task_02.safetensors")
    files = sorted(os.listdir(journal.directory))
    with pytest.raises((ValueError, FileNotFoundError), match="task_02.safetensors"):
        journal.append(learn(model, 4))
    assert sorted(os.listdir(journal.directory)) == files


def test_every_flipped_bit_is_found(journal):
    path = journal.directory / "task_01.safetensors"
    whole, choose = path.read_bytes(), random.Random(0)
    for bit in choose.sample(range(8 * len(whole)), 1000):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match="task_01.safetensors"):
            read_adapter(path)
    for length in choose.sample(range(len(whole)), 200):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="task_01.safetensors"):
            read_adapter(path)
    path.write_bytes(whole)
    read_adapter(path)


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


# ---- kills, and memory


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
