import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora


def model(width=6, kappa=0.0):
    network = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))
    fastlora.inject(network, rank=5, where=["0", "1"], kappa=kappa, scaling=0.5)
    for _, adapter in fastlora.adapters(network):
        adapter.lora_b.data.normal_()
    return network


def state(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def test_round_trip_at_pruned_ranks_with_kappa_and_scaling(tmp_path):
    saved = model(kappa=0.5)
    fastlora.prune(saved)
    fastlora.save_adapter(saved, tmp_path / "a.safetensors", {"task": "3"})
    assert set(load_file(tmp_path / "a.safetensors")) == {
        f"{i}.{k}" for i in "01" for k in ("lora_a", "lora_b", "gate")
    }
    loaded = model()
    fastlora.load_adapter(loaded, tmp_path / "a.safetensors")
    for (_, ours), (_, theirs) in zip(fastlora.adapters(loaded), fastlora.adapters(saved)):
        assert torch.equal(ours.delta_weight(), theirs.delta_weight())
        assert ours.kappa == 0.5 and ours.scaling == 0.5 and ours.gate.numel() == theirs.gate.numel()
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_rank_of_zero_survives(tmp_path):
    saved = model(kappa=100.0)
    fastlora.prune(saved)
    fastlora.save_adapter(saved, tmp_path / "a.safetensors")
    loaded = model()
    fastlora.load_adapter(loaded, tmp_path / "a.safetensors")
    assert all(adapter.gate.numel() == 0 for _, adapter in fastlora.adapters(loaded))


def corrupt(path):
    path.write_bytes(path.read_bytes()[:-20])


def of_another_format(path):
    save_file(load_file(path), path)


def lacking_a_tensor(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    del tensors["1.gate"]
    save_file(tensors, path, header)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, "is not a readable safetensors file"),
        (of_another_format, "has format None; 'fastlora.adapter/1' is accepted"),
        (lacking_a_tensor, "is incomplete: its header and its tensors differ in 1.gate"),
        (lambda path: path.write_bytes(b"\x80\x04pickle"), "is not a readable safetensors file"),
    ],
)
def test_a_damaged_file_changes_nothing(tmp_path, damage, message):
    path = tmp_path / "a.safetensors"
    fastlora.save_adapter(model(), path)
    damage(path)
    target = model()
    before = state(target)
    with pytest.raises(ValueError, match=message):
        fastlora.load_adapter(target, path)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), state(target).values()))


def test_a_file_of_another_model_changes_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    fastlora.save_adapter(model(width=7), path)
    target = model()
    before = state(target)
    with pytest.raises(ValueError, match=r"0 has shapes \(\[5, 4\], \[7, 5\], \[5\]\).*the model takes"):
        fastlora.load_adapter(target, path)
    one = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    fastlora.inject(one, rank=5, where=["0"])
    with pytest.raises(ValueError, match="lacks nothing and has 1 besides"):
        fastlora.load_adapter(one, path)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), state(target).values()))


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    fastlora.save_adapter(model(), path)
    old = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        fastlora.save_adapter(model(), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.safetensors"]


def test_the_file_is_readable_by_others(tmp_path):
    fastlora.save_adapter(model(), tmp_path / "a.safetensors")
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_missing_file_and_missing_adapters(tmp_path):
    with pytest.raises(OSError):
        fastlora.load_adapter(model(), tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="has no adapters to save"):
        fastlora.save_adapter(nn.Linear(2, 2), tmp_path / "a.safetensors")
