"""torch.distributed.checkpoint of a sharded model: written by two processes, read by any number."""

import re

import pytest
import torch

pytest.importorskip("open_clip")

import torch.distributed.checkpoint as dcp  # noqa: E402
from distributed import checkpoint_runs, runs  # noqa: E402
from distributed.processes import in_processes  # noqa: E402
from torch import nn  # noqa: E402

import fastlora  # noqa: E402
from fastlora.interop.dcp import adopt_ranks  # noqa: E402


@pytest.mark.parametrize(("whole_adapters", "rank"), [(True, 2), (False, 3)])
def test_another_number_of_processes_goes_on(tmp_path, whole_adapters, rank):
    """With the ranks, the moments and the weights of those that wrote it, to the bits that they come to."""
    expected = in_processes(2, checkpoint_runs.save, tmp_path, whole_adapters)[0]
    before = runs.adapted_clip().state_dict()
    assert not torch.equal(
        expected["visual.transformer.resblocks.0.attn.q.gate"][:rank],
        before["visual.transformer.resblocks.0.attn.q.gate"][:rank],
    )
    for size in (1, 4):
        for ranks, found in in_processes(size, checkpoint_runs.load, tmp_path, whole_adapters):
            assert ranks == {rank} and found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())


def saved(path, model):
    dcp.save({"model": model.state_dict()}, checkpoint_id=path, no_dist=True)


def adapted(width=6, rank=5):
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))
    fastlora.inject(model, rank=rank, where=["0", "1"])
    return model


def test_ranks_of_a_checkpoint(tmp_path):
    pruned = adapted()
    pruned[0].gate.data[1:3], pruned[1].gate.data[:] = 0.0, 0.0
    fastlora.prune(pruned)
    saved(tmp_path, pruned)
    model = adapted()
    assert adopt_ranks(model, tmp_path) == {"0": 3, "1": 0}
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(state["model"][key], value) for key, value in pruned.state_dict().items())


@pytest.mark.parametrize(
    ("model", "prefix", "message"),
    [
        (lambda: nn.Linear(4, 6), "model.", "Linear has no adapters"),
        (adapted, "net.", "has no net.0.lora_a; it has 10 entries, as model.0.weight"),
        (
            lambda: adapted(7),
            "model.",
            r"0 has shapes \(2, 4\), \(6, 2\), \(2,\) of lora_a, lora_b, gate; the model takes",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, model, prefix, message):
    saved(tmp_path, adapted(rank=2))
    model = model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        adopt_ranks(model, tmp_path, prefix)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(
        ValueError, match=f"{re.escape(str(tmp_path))} is not a checkpoint of torch.distributed.checkpoint"
    ):
        adopt_ranks(adapted(), tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04nothing")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        adopt_ranks(adapted(), tmp_path)


def test_sharded_adapters_keep_their_rank(tmp_path):
    model = runs.adapted_clip()
    fastlora.prune(model)
    saved(tmp_path, model)
    for message, ranks in in_processes(2, checkpoint_runs.refuse, tmp_path):
        assert "ranks are dropped from whole ones alone" in message and ranks == {3}
