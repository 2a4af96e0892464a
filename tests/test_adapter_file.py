import os
import pathlib
import resource
import stat
import tempfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import tensor_file
from fastlora.adapter_file import read_adapter


def model(width=6, kappa=0.0):
    """Its frozen weights are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = plain(width)
    fastlora.inject(network, rank=5, where=["0", "1"], kappa=kappa, scaling=0.5)
    for _, adapter in fastlora.adapters(network):
        adapter.lora_b.data.normal_()
    return network


def plain(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))


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


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def without_checksum(path):
    rewrite(path, sha256=None)


def with_other_settings(path):
    rewrite(path, settings='{"0": {"kappa": 0.0, "scaling": 2.0}, "1": {"kappa": 0.0, "scaling": 2.0}}')


def with_settings(text):
    return lambda path: rewrite(path, format="fastlora.adapter/1", settings=text)


def of_integers(path):
    file = read_adapter(path)
    tensors = {key: tensor.int() for key, tensor in file.tensors.items()}
    save_file(tensors, path, file.header | {"format": "fastlora.adapter/1"})


def rewrite(path, **header):
    """The same tensors under a header with these changes; None takes a key out."""
    file = read_adapter(path)
    changed = {key: value for key, value in (file.header | header).items() if value is not None}
    save_file(file.tensors, path, changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "is damaged: its content has another SHA-256 than its header tells. Restore it"),
        (without_checksum, "is damaged"),
        (with_other_settings, "is damaged"),
        (with_settings("{"), "tells no kappa and scaling of each module .JSONDecodeError"),
        (with_settings('{"0": {}}'), "tells no kappa and scaling of each module .KeyError: 'kappa'"),
        (with_settings("[1]"), "tells no kappa and scaling of each module .AttributeError"),
        (with_settings('{"0": {"kappa": NaN, "scaling": 1}}'), "tells no kappa .*kappa is nan; it must be finite"),
        (with_settings('{"0": {"kappa": 1e300, "scaling": 1}}'), "tells no kappa .*kappa is 1e.300"),
        (with_settings('{"0": {"kappa": 0, "scaling": 1' + "0" * 400 + "}}"), "tells no kappa .*OverflowError"),
        (with_settings("[" * 100_000), "tells no kappa .*RecursionError"),
        (of_integers, r"a.safetensors: 0.gate is int32\[5\]; an adapter is of floating-point numbers"),
        (corrupt, "is not a readable safetensors file"),
        (of_another_format, "has format None; 'fastlora.adapter/2' and 'fastlora.adapter/1' are accepted"),
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


def test_a_file_of_the_older_format_is_read(tmp_path):
    """It has no checksum to be compared with."""
    saved = model(kappa=0.5)
    fastlora.save_adapter(saved, tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", format="fastlora.adapter/1", sha256=None)
    loaded = model()
    fastlora.load_adapter(loaded, tmp_path / "a.safetensors")
    for (_, ours), (_, theirs) in zip(fastlora.adapters(loaded), fastlora.adapters(saved)):
        assert torch.equal(ours.delta_weight(), theirs.delta_weight()) and ours.kappa == 0.5


def test_the_metadata_is_covered_by_the_checksum(tmp_path):
    fastlora.save_adapter(model(), tmp_path / "a.safetensors", {"task": "3"})
    assert read_adapter(tmp_path / "a.safetensors").header["task"] == "3"
    with pytest.raises(ValueError, match="is damaged"):
        rewrite(tmp_path / "a.safetensors", task="4") or read_adapter(tmp_path / "a.safetensors")


def test_what_is_not_finite_is_not_loaded(tmp_path):
    broken = model()
    fastlora.adapters(broken).__next__()[1].lora_b.data[0] = float("inf")
    fastlora.save_adapter(broken, tmp_path / "a.safetensors")
    target = model()
    before = state(target)
    with pytest.raises(ValueError, match="0 holds non-finite values; load an adapter from before training diverged"):
        fastlora.load_adapter(target, tmp_path / "a.safetensors")
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


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """By the limit on the size of a file, which a write meets in its middle."""
    path = tmp_path / "a.safetensors"
    fastlora.save_adapter(model(), path)
    old, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    large = nn.Sequential(nn.Linear(64, 64))
    fastlora.inject(large, rank=64, where=["0"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
    try:
        with pytest.raises(
            OSError, match="a.safetensors was not written .File too large.; what was there before is whole"
        ):
            fastlora.save_adapter(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_directory_that_cannot_be_written(nobody):
    """Also a journal's."""
    folder = nobody
    for write in (
        lambda: fastlora.save_adapter(model(), folder / "a.safetensors"),
        lambda: fastlora.Journal(folder).append(model()),
    ):
        with pytest.raises(PermissionError, match="safetensors was not written .Permission denied.* can be written"):
            write()
    with pytest.raises(FileNotFoundError, match="Make sure that .*missing exists"):
        fastlora.save_adapter(model(), folder / "missing" / "a.safetensors")
    assert os.listdir(folder) == []


@pytest.fixture
def nobody():
    """A directory that can be read, and a user who may not write it: root may write anywhere."""
    folder, user = tempfile.mkdtemp(), os.geteuid()
    os.chmod(folder, 0o555)
    if user == 0:
        try:
            os.seteuid(65534)
        except PermissionError:
            pytest.skip("root without the right to become another user writes anywhere")
    yield pathlib.Path(folder)
    os.seteuid(user)
    os.rmdir(folder)


def test_a_file_that_is_overwritten_after_it_was_loaded_changes_no_adapter(tmp_path):
    path, loaded = tmp_path / "a.safetensors", model()
    fastlora.save_adapter(model(), path)
    fastlora.load_adapter(loaded, path)
    before = state(loaded)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), state(loaded).values()))


def test_another_model_of_the_same_shapes_is_told(tmp_path, recwarn):
    """By the weights that no adapter updates; those that are merged into play no part."""
    saved, path = model(), tmp_path / "a.safetensors"
    fastlora.save_adapter(saved, path)
    fastlora.merge(saved)
    fastlora.load_adapter(saved, path)
    fastlora.load_adapter(model(), path)
    assert not [warning for warning in recwarn if "was saved over" in str(warning.message)]
    other = model()
    other[1].bias.data[0] += 1
    with pytest.warns(RuntimeWarning, match="a.safetensors was saved over other weights than those of this Sequential"):
        fastlora.load_adapter(other, path)
    assert torch.equal(other[0].gate, read_adapter(path).tensors["0.gate"])  # it may be meant


def test_a_file_without_a_frame_is_loaded(tmp_path, recwarn):
    """Written before there was one, or over weights that were not there."""
    path = tmp_path / "a.safetensors"
    fastlora.save_adapter(model(), path)
    rewrite(path, format="fastlora.adapter/1", frame=None, sha256=None)
    fastlora.load_adapter(model(), path)
    assert not [warning for warning in recwarn if "was saved over" in str(warning.message)]


def test_a_file_that_is_replaced_while_it_is_read_is_one_or_the_other(tmp_path, monkeypatch):
    """Not the header of one and the tensors of the other, which has another checksum."""
    path, first = tmp_path / "a.safetensors", model()
    fastlora.save_adapter(first, path)
    load = tensor_file.load
    monkeypatch.setattr(tensor_file, "load", lambda content: fastlora.save_adapter(model(), path) or load(content))
    assert torch.equal(read_adapter(path).tensors["0.gate"], first[0].gate)


def test_missing_file_and_missing_adapters(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        fastlora.load_adapter(model(), tmp_path / "none.safetensors")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        fastlora.load_adapter(model(), tmp_path)
    with pytest.raises(ValueError, match="has no adapters to save"):
        fastlora.save_adapter(nn.Linear(2, 2), tmp_path / "a.safetensors")
