"""What a bug report is told by `fastlora doctor`: every fact on one line, whatever is broken."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import fastlora
from fastlora import doctor
from fastlora.build import build_info

TEMPLATE = Path(__file__).resolve().parent.parent / ".github" / "ISSUE_TEMPLATE" / "bug.md"


def told() -> dict[str, str]:
    return dict(doctor.examine())


def test_every_fact_is_on_a_line_of_its_own():
    lines = doctor.examine()
    assert all(subject and finding and "\n" not in finding for subject, finding in lines)
    found = dict(lines)
    assert len(found) == len(lines), "a subject twice"
    assert "cannot be told" not in str(found)
    assert str(Path(fastlora.__file__).parent) in found["fastlora"] and sys.executable in found["python"]
    assert "GiB" in found["cpu"] and "cores" in found["cpu"]
    assert f"numpy {numpy.__version__}," in found["packages"] and f"torch {torch.__version__}" not in found["packages"]
    assert found["torch"].startswith(f"{torch.__version__}, {torch.get_num_threads()} threads")


def test_the_build_is_that_of_the_extension():
    info = build_info()
    if not info["extension"]:
        assert told()["extension"] == f"not built: {info['extension_reason']}"
        return
    found = told()
    assert info["compiler"] in found["extension"] and info["cuda_reason"] in found["  cuda"]
    assert found["  simd"].startswith(f"{info['simd'][-1]} runs, of scalar")


def test_an_installation_without_the_extension(monkeypatch):
    monkeypatch.setattr(fastlora, "build_info", lambda: {"extension": False, "extension_reason": "no C++ compiler"})
    assert told()["extension"] == "not built: no C++ compiler"
    assert "  simd" not in told()


def test_what_is_broken_is_told_and_stops_nothing(monkeypatch):
    def broken():
        raise RuntimeError("the record of the build is unreadable")

    whole = told()
    monkeypatch.setattr(fastlora, "build_info", broken)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = told()
    assert found["extension"] == "cannot be told: RuntimeError: the record of the build is unreadable"
    assert found["torch"].startswith("cannot be told: ModuleNotFoundError")
    assert {key: found[key] for key in ("python", "cpu", "packages")} == {
        key: whole[key] for key in ("python", "cpu", "packages")
    }


def test_the_dispatch_tables(monkeypatch, tmp_path):
    from fastlora.ops.dispatch import SHIPPED

    monkeypatch.setenv("FASTLORA_TABLE", str(tmp_path / "mine.json"))
    assert told()["dispatch"].startswith(f"yours: none at {tmp_path / 'mine.json'}; shipped: ")
    (tmp_path / "mine.json").write_bytes(SHIPPED.read_bytes())
    yours, shipped = told()["dispatch"].split("; ")
    assert yours.removeprefix("yours: ") == shipped.removeprefix("shipped: ") and " entries for " in yours
    (tmp_path / "mine.json").write_text("{}")
    assert 'mine.json cannot be used: it is no object with "version" and "entries"' in told()["dispatch"]


def test_variables_that_change_behaviour_and_no_others(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HOME"):
        monkeypatch.setenv(name, "private")
    monkeypatch.setenv("FASTLORA_TABLE", "/tables/a b.json")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = told()["environment"]
    assert "FASTLORA_TABLE='/tables/a b.json'" in found and "OMP_NUM_THREADS='3'" in found
    assert "private" not in found
    for name in [name for name in doctor.os.environ if name in found]:
        monkeypatch.delenv(name)
    assert told()["environment"] == "none of the variables that change behaviour is set"


def test_a_gpu(monkeypatch):
    facts = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=139 * 2**30)
    torch_ = SimpleNamespace(cuda=SimpleNamespace(get_device_properties=lambda device: facts))
    files = {"/sys/module/nvidia/version": ["575.57.08"]}
    monkeypatch.setattr(doctor, "_lines", lambda path: files.get(path, []))
    expected = "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 139.0 GiB, nvidia driver 575.57.08"
    assert doctor._gpu(torch_, "cuda:0") == expected


@pytest.mark.parametrize("needed", ["fastlora doctor", "fastlora.explain", "config.yaml", "manifest.json"])
def test_the_issue_template_asks_for_it(needed):
    assert needed in TEMPLATE.read_text()
