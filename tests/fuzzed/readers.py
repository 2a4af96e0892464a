"""Every reader of files that come from elsewhere: what it is given when all is well, and how it is called."""

from __future__ import annotations

import functools
import gzip
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from continual.datasets import layouts
from continual.resume.cases import CONFIGS
from continual.tiny import tiny_clip, tiny_stream, tokenize
from faults.models import ours, two_linears
from fuzzed.contract import Part, Reader
from fuzzed.packing import archive_with, pickle_of, sealed, with_length, without_length
from journal.cases import Net, write_tasks
from safetensors.torch import save_file

import fastlora
from fastlora.adapter_file import read_adapter
from fastlora.continual import Trainer
from fastlora.continual.arguments import parse_train
from fastlora.continual.compare import comparison_text, group_runs
from fastlora.continual.config import UsageError
from fastlora.continual.datasets.catalogue import SOURCES
from fastlora.continual.datasets.coop import coop_split
from fastlora.continual.datasets.disk_cache import DiskCache
from fastlora.continual.datasets.split import check_split
from fastlora.continual.report import _page
from fastlora.continual.restore import _load_checkpoint
from fastlora.continual.run_state import read_state
from fastlora.continual.saved_run import read_run
from fastlora.files import write_atomically
from fastlora.interop import export_peft, import_codyra, import_peft, import_sora
from fastlora.journal import Journal
from fastlora.merge_files import merge_files
from fastlora.ops import MergeError
from fastlora.ops.dispatch_table import Entry, Key, format_table, read_table

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = ("manifest.json", "config.yaml", "accuracy.csv", "metrics.json", "ranks.csv", "log.csv", "selection.json")


def in_two_ways(path: str, read: Callable[[Path], Any], pack: Callable[[bytes], bytes] = sealed) -> tuple[Part, ...]:
    """A safetensors file, and one whose length and checksum are made right again."""
    return Part(path, read), Part(path, read, pack, without_length)


# ---- adapters and weights


@functools.cache
def a_model() -> torch.nn.Module:
    return ours()


def adapter(folder: Path) -> None:
    fastlora.save_adapter(ours(), folder / "adapter.safetensors")


def journal(folder: Path) -> None:
    write_tasks(folder / "journal", count=2)


def rebuild(folder: Path) -> None:
    written = Journal(folder / "journal")
    list(written)
    written.rebuild(Net())


def weights(folder: Path) -> None:
    adapter(folder)
    save_file(two_linears().state_dict(), folder / "base.safetensors")


def merged(folder: Path) -> None:
    merge_files(folder / "base.safetensors", [folder / "adapter.safetensors"], folder / "merged", force=True)


def checkpoint(folder: Path) -> None:
    save_file(two_linears().state_dict(), folder / "task_01.safetensors")


def peft(folder: Path) -> None:
    model = ours()
    fastlora.prune(model)
    export_peft(model, folder / "peft")


def released_tensors(infix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"0": (8, 6), "2": (5, 8)}
    parts = {n: {"lora_A": torch.randn(2, k), "lora_B": torch.randn(o, 2), "gate": torch.randn(1, 2)} for n, (o, k) in sizes.items()}  # fmt: skip
    return {f"{name}.{infix}{key}": tensor for name, each in parts.items() for key, tensor in each.items()}


def codyra(folder: Path) -> None:
    old = {"0.old_lora_A": torch.randn(3, 6), "0.old_lora_B": torch.randn(8, 3)}
    ranks = {"0": {"rank": 2, "old_rank": 3}, "2": {"rank": 2, "old_rank": 0}}
    torch.save({"state_dict": released_tensors() | old, "lora_ranks": ranks}, folder / "codyra.pth")
    save_file(released_tensors(), folder / "codyra.safetensors")
    torch.save(released_tensors("lora."), folder / "sora.bin")


@functools.cache
def released_archive(maker: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        codyra(Path(folder))
        return (Path(folder) / maker).read_bytes()


def released(path: str, read: Callable[[Path], Any]) -> tuple[Part, Part]:
    """The file, and the pickle in it."""
    return Part(path, read), Part(path, read, lambda inner: archive_with(inner, released_archive(path)), pickle_of)


# ---- runs


@functools.cache
def a_run() -> Path:
    """A finished run of three tasks on a tiny model, with everything that is drawn."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-run-")) / "run"
    method, options = CONFIGS["codyra"], {"seed": 1, "progress": False, "log_every": 2}
    Trainer(tiny_clip(), tokenize, tiny_stream(), method, out=path, **options).fit()
    comparison = {"name": "seeds", "jaccard": 0.5, "chance": 0.4, "towers": {"visual": [0.5, 0.4]}}
    (path / "selection.json").write_text(json.dumps({"comparisons": [comparison]}))
    return path


def run(folder: Path) -> None:
    shutil.copytree(a_run(), folder / "run")


def shown(folder: Path) -> None:
    """What `fastlora report`, `compare` and `eval` make of a run, but for the drawings."""
    found = read_run(folder / "run")
    _page(found, ())
    comparison_text(group_runs([found]))
    found.run_config  # noqa: B018


def state(folder: Path) -> None:
    shutil.copy(a_run() / "checkpoints" / "state.safetensors", folder)


def recipe(folder: Path) -> None:
    shutil.copy(ROOT / "recipes" / "mtil5_codyra.yaml", folder / "recipe.yaml")


def table(folder: Path) -> None:
    key = Key("NVIDIA H200", "fwd", 16, 768, 768, 16, True, 1, "bfloat16")
    tile = {"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 3}
    entries = {key: Entry("fwd", "split", tile, "a device", 4.5), key._replace(role="dx"): Entry("dx", "library", None, "not measured")}  # fmt: skip
    write_atomically(folder / "dispatch.json", format_table(entries))


# ---- data sets


def pixels(folder: Path) -> None:
    """MNIST and CIFAR-100 of a few bytes."""
    raw, cifar = folder / "MNIST" / "raw", folder / "cifar-100-python"
    raw.mkdir(parents=True)
    cifar.mkdir()
    for side in ("train", "t10k"):
        (raw / f"{side}-images-idx3-ubyte").write_bytes(layouts.idx(np.zeros((10, 2, 2), np.uint8)))
        (raw / f"{side}-labels-idx1-ubyte").write_bytes(layouts.idx(np.arange(10, dtype=np.uint8)))
    for side in ("train", "test"):
        content = {"data": np.zeros((1, 3072), np.uint8), "fine_labels": [0], "coarse_labels": [0]}
        (cifar / side).write_bytes(pickle.dumps(content, protocol=2))
    (cifar / "meta").write_bytes(pickle.dumps({"fine_label_names": layouts.FINE}, protocol=2))


def packed_pixels(folder: Path) -> None:
    pixels(folder)
    path = folder / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()


def laid_out(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            layouts.MAKERS[name](folder, "coop")

    return make


def split(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        source = SOURCES[name]
        check_split(name, source.published(folder), source.classes)

    return read


def coop(name: str) -> Callable[[Path], None]:
    return lambda folder: check_split(name, coop_split(SOURCES[name], folder))


def label_file(name: str, path: str, read: Callable[[Path], Any] | None = None, **options: Any) -> Part:
    return Part(path, read or split(name), called=(name, path.partition("/")[0]), **options)


def image_cache(folder: Path) -> None:
    cache = DiskCache(folder / "cache", 10**6)
    cache.put(bytes(32), torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5))


def cached(folder: Path) -> None:
    DiskCache(folder / "cache", 10**6).get(bytes(32))


_PEFT, _ENTRY = "peft/adapter_model.safetensors", f"cache/00/{'00' * 31}"
_GZIP = "MNIST/raw/t10k-labels-idx1-ubyte.gz"

READERS: dict[str, Reader] = {
    "adapter": Reader("adapter files: `load_adapter`", adapter, (
        *in_two_ways("adapter.safetensors", lambda folder: fastlora.load_adapter(a_model(), folder / "adapter.safetensors")),
        Part("adapter.safetensors", lambda folder: read_adapter(folder / "adapter.safetensors"), with_length, without_length))),
    "journal": Reader("journals: listed, and rebuilt", journal, in_two_ways("journal/task_01.safetensors", rebuild), (MergeError,)),
    "weights": Reader("weights of `fastlora merge`", weights, in_two_ways("base.safetensors", merged, with_length), (MergeError,)),
    "checkpoint": Reader("checkpoints of a run", checkpoint, in_two_ways(
        "task_01.safetensors", lambda folder: _load_checkpoint(two_linears(), folder / "task_01.safetensors"), with_length)),
    "peft": Reader("PEFT's directories: `import_peft`", peft, (
        *in_two_ways(_PEFT, lambda folder: import_peft(two_linears(), folder / "peft"), with_length),
        Part("peft/adapter_config.json", lambda folder: import_peft(two_linears(), folder / "peft")))),
    "released": Reader("released checkpoints of CoDyRA and SoRA", codyra, (
        *released("codyra.pth", lambda folder: import_codyra(two_linears(), folder / "codyra.pth")),
        *released("sora.bin", lambda folder: import_sora(two_linears(), folder / "sora.bin", alpha=16)),
        *in_two_ways("codyra.safetensors", lambda folder: import_codyra(two_linears(), folder / "codyra.safetensors"), with_length))),
    "state": Reader("commit points of a run", state, in_two_ways(
        "state.safetensors", lambda folder: read_state(folder / "state.safetensors"))),
    "run": Reader("run directories: tables, report, comparison", run, tuple(
        Part(f"run/{name}", shown, called=("/run",)) for name in RUN_FILES)),
    "recipe": Reader("recipes: `fastlora train --config`", recipe, (
        Part("recipe.yaml", lambda folder: parse_train(["--config", str(folder / "recipe.yaml")])),), (UsageError,)),
    "table": Reader("dispatch tables", table, (
        Part("dispatch.json", lambda folder: read_table(folder / "dispatch.json", "the user's table"), called=("it",)),)),
    "idx": Reader("idx files of MNIST, also packed", packed_pixels, (
        label_file("MNIST", "MNIST/raw/train-images-idx3-ubyte"), label_file("MNIST", "MNIST/raw/train-labels-idx1-ubyte"),
        label_file("MNIST", _GZIP), label_file("MNIST", _GZIP, pack=functools.partial(gzip.compress, mtime=0), unpack=gzip.decompress))),
    "pickle": Reader("pickles of CIFAR", pixels, tuple(
        label_file("CIFAR100", f"cifar-100-python/{name}", lambda folder: SOURCES["CIFAR100"].published(folder)) for name in ("train", "meta"))),
    "lists": Reader("label lists of Aircraft, DTD and OxfordPet", laid_out("Aircraft", "DTD", "OxfordPet"), (
        label_file("Aircraft", "fgvc_aircraft/variants.txt"), label_file("Aircraft", "fgvc_aircraft/images_variant_test.txt"),
        label_file("DTD", "dtd/labels/test1.txt"), label_file("OxfordPet", "oxford_pets/annotations/test.txt"))),
    "json": Reader("JSON of Food and of CoOp's splits", laid_out("Food", "EuroSAT"), (
        label_file("Food", "food-101/meta/test.json"),
        label_file("EuroSAT", "eurosat/split_zhou_EuroSAT.json", coop("EuroSAT")))),
    "cache": Reader("the cache of prepared images", image_cache, (Part(_ENTRY, cached), Part("cache/lock", cached))),
}  # fmt: skip
