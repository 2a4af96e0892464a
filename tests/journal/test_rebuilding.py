"""What a journal gives back: the weights after any task, bit for bit."""

import shutil

import pytest
import torch
from journal.cases import DTYPES, Net, learn, not_finite, same, settle, state, write_tasks
from torch import nn

import fastlora


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
    """Neither appended nor rebuilt, since a merge would change the embedding; parted it is both."""
    model, journal = Tied(), fastlora.Journal(tmp_path / "journal")
    with pytest.warns(UserWarning, match="one tensor under 2 names"):
        fastlora.inject(model, rank=2, where=["head"])
    model.head.lora_b.data.normal_()
    before = state(model)
    for work in (lambda: journal.append(model), lambda: fastlora.merge(model), lambda: fastlora.unmerge(model)):
        with pytest.raises(
            ValueError,
            match="head is one tensor under 2 names .embed.weight, head.weight.; a merge would.*detach...clone",
        ):
            work()
    assert same(state(model), before) and not journal.directory.exists()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone(), requires_grad=False)
    journal.append(model)
    settle(model)
    assert torch.equal(model.embed.weight, Tied().embed.weight)
    rebuilt = Tied()
    with pytest.raises(ValueError, match="head.weight and embed.weight are one tensor"):
        journal.rebuild(rebuilt)
    assert same(state(rebuilt), state(Tied()))
    rebuilt.head.weight = nn.Parameter(rebuilt.head.weight.detach().clone())
    journal.rebuild(rebuilt)
    assert same(state(rebuilt), state(model))


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
