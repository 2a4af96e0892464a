"""`fastlora.merge` of a model that fully_shard has dealt out, against the merge of the whole."""

import pytest
import torch

pytest.importorskip("open_clip")

import dataclasses  # noqa: E402

from distributed import runs  # noqa: E402
from distributed.processes import in_processes  # noqa: E402

import fastlora  # noqa: E402


@pytest.mark.parametrize(("size", "dtype", "whole_adapters"), [(2, torch.float16, True), (3, torch.float32, False)])
def test_shards_have_the_bits_of_the_whole(size, dtype, whole_adapters):
    """96 packed rows in 2 shards of 48 and q, k, v of 32 rows: a shard has one of them and a half."""
    model = runs.adapted_clip(dtype)
    report = fastlora.merge(model)
    before, expected = runs.adapted_clip(dtype).state_dict(), model.state_dict()
    weights = [key for key in expected if not key.endswith(("lora_a", "lora_b", "gate"))]
    undone = runs.adapted_clip(dtype)
    runs.merge_and_unmerge(undone)
    found = in_processes(size, runs.merge_everywhere, dtype, whole_adapters)
    for figures, merged, unmerged in found:
        assert all(torch.equal(merged[key], expected[key]) for key in weights)
        assert all(torch.equal(unmerged[key], undone.state_dict()[key]) for key in weights)
        assert figures == found[0][0]
        for ours, module in zip(figures, report, strict=True):
            ours, module = dataclasses.astuple(ours), dataclasses.astuple(module)
            assert ours[:3] == module[:3] and ours[3:] == pytest.approx(module[3:], rel=1e-5, abs=1e-12)
        # fresh adapters: drawn, and the same in every process
        for key in merged.keys() - set(weights):
            assert torch.equal(merged[key], found[0][1][key])
            assert merged[key].shape == expected[key].shape and bool((merged[key] == 0).all()) == key.endswith("lora_b")
    changed = [key for key in weights if not torch.equal(before[key], expected[key])]
    assert len(changed) == 4 * 4, "four matrices in each of four blocks"


def test_a_fault_in_one_shard_stops_all():
    """A NaN or an overflow in rows that one process holds, with the figures of the whole in every message."""
    found = in_processes(2, runs.refuse_to_merge)
    assert found[0] == found[1]
    missing, gate, overflow, drawn = found[0]
    assert "MergeError: 1 of 24 modules cannot be merged" in missing
    assert "transformer.resblocks.0.mlp.c_fc: lora_b holds 1 non-finite of 384 values" in missing
    assert gate.startswith("ValueError: ") and "transformer.resblocks.1.attn.k.gate" in gate
    assert "transformer.resblocks.1.attn.k: 32 of 1024 results are not finite in float16" in overflow
    assert drawn.startswith("ValueError: rounding is 'stochastic', and the weights are sharded")


@pytest.mark.parametrize("whole_adapters", [True, False])
def test_training_and_merging_by_hand(whole_adapters):
    """ProxAdamW over adapters that are whole, and over those that FSDP has sharded; then the merge."""
    expected = runs.train_by_hand(0, None)
    for found in in_processes(2, runs.train_by_hand, whole_adapters):
        assert found["gates"].keys() == expected["gates"].keys()
        assert all(torch.equal(found["gates"][key] == 0, gate == 0) for key, gate in expected["gates"].items())
        assert runs.relative(found["gates"], expected["gates"]) < 1e-5
        assert runs.relative(found["weights"], expected["weights"]) < 1e-6
    assert any(bool((gate == 0).any()) for gate in expected["gates"].values())


def test_ranks_of_sharded_adapters_stay():
    messages = in_processes(2, runs.prune_sharded)
    assert all("ranks are dropped from whole ones alone. Give fully_shard ignored_params" in each for each in messages)
