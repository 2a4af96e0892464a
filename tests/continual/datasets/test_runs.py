"""Whole runs over generated images, from the command line, with a CLIP of one narrow block per tower."""

import csv
import dataclasses
import json
import re
import shutil

import open_clip
import pytest
import torch
import yaml
from continual.datasets import layouts
from helpers import run
from safetensors.torch import save_file

from fastlora.continual import restore
from fastlora.continual.benchmarks import benchmark
from fastlora.continual.config import run_config
from fastlora.continual.saved_run import read_run

pytest.importorskip("jsonargparse")

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """--model and --pretrained of a model of random weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "narrow_for_tests.json").write_text(json.dumps(MODEL))
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(MODEL)))
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / "narrow.safetensors")
    return ["--model", str(folder / "narrow_for_tests.json"), "--pretrained", str(folder / "narrow.safetensors")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastlora.continual.report.write_report", lambda path: None)


@pytest.fixture
def mine(tmp_path):
    for name, classes in (("colours", ("red", "green", "blue")), ("warmth", ("warm", "cold"))):
        for number, cls in enumerate(classes):
            for i in range(10):
                layouts.put(tmp_path / "data" / name / cls / f"{i}.jpg", number)
    return tmp_path / "data"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_folders(capsys, mine, weights, tmp_path):
    """Train, evaluate again, train the same again; then the classes change, and the run is not evaluated."""
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "benchmark": "folders",
                "method": {"name": "lora", "rank": 8, "iterations": 60, "batch_size": 8, "lr": 0.02},
                "data": {"root": "data", "tasks": ["colours", {"path": "warmth", "templates": ["{}"]}], "split": 0.7},
            }
        )
    )
    code, out, err = run(capsys, "train", "--config", "run.yaml", *weights, "--data.workers=2", "--out=first")
    assert code == 0, err
    learned = rows_of("first/accuracy.csv")
    assert learned[0] == ["after_task", "colours", "warmth"] and len(learned) == 4
    assert float(learned[2][1]) > float(learned[1][1]) and float(learned[2][1]) == 100  # three plain colours
    config = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert config["data"]["split"] == 0.7 and config["data"]["verify"] == "headers" and config["data"]["shots"] == 0
    manifest = json.loads((tmp_path / "first" / "manifest.json").read_text())
    assert manifest["benchmark"] == "folders" and manifest["training"]["colours"]["images"] == 21
    assert manifest["class_names"] == {"colours": ["blue", "green", "red"], "warmth": ["cold", "warm"]}

    code, out, err = run(capsys, "eval", "first")
    assert code == 0 and "equal to the recorded row" in out, err

    code, _, err = run(capsys, "train", "--config", "first/config.yaml", "--data.workers=1", "--out=second")
    assert code == 0, err
    for file in ("accuracy.csv", "log.csv"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()

    (mine / "colours" / "green").rename(mine / "colours" / "lime")
    code, _, err = run(capsys, "eval", "first")
    assert code == 1 and "'colours' is now without 'green' and with 'lime'" in err


def test_a_cache_on_disk_changes_no_bit(capsys, mine, weights, tmp_path, monkeypatch):
    """A run without, one that fills the cache, and one that decodes nothing; then the cache cannot be one."""
    arguments = ["--benchmark=folders", "--data.root=data", "--data.tasks=[colours, warmth]", "--data.split=0.5"]
    arguments += [*weights, "--data.workers=2", "--method=lora", "--method.iterations=4", "--method.batch_size=8"]
    cache = ["--data.cache_dir=cache", "--data.cache_crops=true"]
    for out, more in (("without", []), ("cold", cache), ("warm", cache)):
        code, _, err = run(capsys, "train", *arguments, *more, "--data.cache_gb=0", f"--out={out}")
        assert code == 0, err
        if out == "cold":
            for name in ("fitted", "cut"):
                monkeypatch.setattr(f"fastlora.continual.datasets.transforms.Transforms.{name}", None)
    for file in ("accuracy.csv", "accuracy_union.csv", "log.csv", "ranks.csv"):
        assert len({(tmp_path / out / file).read_bytes() for out in ("without", "cold", "warm")}) == 1
    code, out, err = run(capsys, "train", *arguments, *cache, "--dry-run")
    assert code == 0 and "in data.cache_dir: training crops, at most" in out, err
    code, _, err = run(capsys, "train", *arguments, "--data.cache_dir=data", "--out=other")
    assert code == 2 and "data.cache_dir is 'data', which holds 'colours', 'warmth' and is no cache" in err
    code, _, err = run(capsys, "train", *arguments, "--data.cache_dir=without/log.csv", "--out=other")
    assert code == 2 and "data.cache_dir is 'without/log.csv', which is no directory" in err
    code, _, err = run(capsys, "train", *arguments, "--data.cache_crops=true", "--out=other")
    assert code == 2 and "no cache to keep crops in. Give --data.cache_dir DIR" in err
    assert not (tmp_path / "other").exists()


def test_a_run_goes_on_with_its_own_training_images_alone(capsys, mine, weights):
    arguments = ["--benchmark=folders", "--data.root=data", "--data.tasks=[colours]", "--data.split=0.5"]
    assert run(capsys, "train", *arguments, *weights, "--data.shots=2", "--method=zero_shot", "--out=run")[0] == 0
    saved = read_run("run")
    config = run_config(saved.config)
    restore.check_same_data(saved.path, saved.manifest, benchmark("folders").load(config).stream)
    other = benchmark("folders").load(dataclasses.replace(config, seed=1)).stream
    restore.check_same_tests(saved, other)
    with pytest.raises(ValueError, match="so it cannot go on: 'colours' has other training images"):
        restore.check_same_data(saved.path, saved.manifest, other)


def test_another_test_image_is_another_benchmark(capsys, mine, weights, tmp_path):
    arguments = ["--benchmark=folders", "--data.root=data", "--data.tasks=[colours]", "--data.split=0.5"]
    assert run(capsys, "train", *arguments, *weights, "--method=zero_shot", "--out=run")[0] == 0
    layouts.put(mine / "colours" / "red" / "99.jpg")
    code, _, err = run(capsys, "eval", "run")
    assert code == 1 and "'colours' has other test images" in err


def test_xtail(capsys, roots, weights, tmp_path):
    arguments = ["--benchmark=xtail", f"--data.root={roots['coop']}", "--data.shots=1", "--data.workers=2"]
    method = ["--method.rank=2", "--method.iterations=1", "--method.batch_size=4"]
    code, out, err = run(capsys, "train", *arguments, *weights, *method, "--eval_batch_size=512", "--out=run")
    assert code == 0, err
    table = rows_of("run/accuracy_union.csv")
    assert len(table) == 12 and table[0][1:] == [name for name in layouts.MAKERS if name != "CIFAR100"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["finished_tasks"] == 10
    assert sum(len(names) for names in manifest["class_names"].values()) == 1100


def test_damaged_images_stop_a_run_before_it_starts(capsys, mine, weights, tmp_path):
    (mine / "colours" / "red" / "0.jpg").write_bytes(b"no image")
    arguments = ["--benchmark=folders", "--data.root=data", "--data.tasks=[colours, warmth]", "--data.split=0.5"]
    code, _, err = run(capsys, "train", *arguments, *weights, "--out=run")
    assert code == 1 and "data/colours/red/0.jpg: cannot identify" in err and not (tmp_path / "run").exists()


def test_missing_everything_is_told(capsys, mine, weights):
    shutil.rmtree(mine / "warmth")
    arguments = ["--benchmark=folders", "--data.root=data", "--data.tasks=[colours, warmth]"]
    code, _, err = run(capsys, "train", *arguments, *weights, "--out=run")
    assert code == 1 and err.startswith("fastlora train: 2 of 2 data sets cannot be used:\ntask 'colours': ")
    code, _, err = run(capsys, "train", "--benchmark=mtil", "--data.root=data", *weights, "--out=run")
    assert code == 1 and re.search("11 of 11 data sets cannot be used:\nAircraft: .*fgvc_aircraft/images/", err)


def test_a_run_needs_a_root(capsys):
    code, _, err = run(capsys, "train", "--benchmark=xtail", "--out=run")
    assert code == 2 and "say where with --data.root DIR" in err
