"""Installations that lack something: compiled parts, Triton, a GPU, the packages of the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
from faults.case import Outcome, group
from faults.judge import refused, right, worst
from faults.models import operands, trained
from faults.runs import trainer

import fastlora
from fastlora.ops import backend, rank_lora_linear

processes = group("process")
ENVIRONMENT = {"PYTHONPATH": str(Path(fastlora.__file__).parent.parent), "OMP_NUM_THREADS": "1", "PATH": os.defpath}

COMPUTE = """
import torch, fastlora
torch.manual_seed(0)
layer = fastlora.FusedRankLoRALinear(12, 10, rank=4, kappa=0.3)
layer.lora_b.data.normal_()
x = torch.randn(5, 12, requires_grad=True)
y = layer(x)
y.square().sum().backward()
fastlora.optim.ProxAdamW(layer, lr=0.01).step()
found = {"y": y.tolist(), "dx": x.grad.tolist(), "gate": layer.gate.tolist()}
layer.merge_()
found["merged"] = layer.weight.tolist()
"""
WITHOUT = """
import json, sys
sys.modules["triton"] = sys.modules["fastlora._C"] = None
exec(sys.argv[1])
layer.backend = "triton"
try:
    layer(x)
except RuntimeError as error:
    found["error"] = str(error)
print(json.dumps(found | {"reason": fastlora.build_info()["extension_reason"]}))
"""


@processes("the same results in PyTorch; Triton asked for by name is refused, and says what is missing")
def no_triton_and_no_compiled_extension() -> Outcome:
    """Neither Triton nor the C++ extension can be imported: layer, backward, optimizer step and merge."""
    command = [sys.executable, "-c", WITHOUT, COMPUTE]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    if done.returncode:
        return Outcome("unclear error", done.stderr[-200:])
    bare, names = json.loads(done.stdout.splitlines()[-1]), {}
    exec(COMPUTE, names)
    whole = names["found"]
    alike = all(torch.allclose(torch.tensor(bare[key]), torch.tensor(value), atol=1e-6) for key, value in whole.items())
    told = "Triton is not installed" in bare["error"] and 'backend="auto"' in bare["error"] and bare["reason"]
    return right(alike and told, f"alike: {alike}, told: {bare['error'][:80]}")


@processes("an error that says why and what to pass instead")
def kernels_without_a_gpu() -> Outcome:
    """A Triton variant is asked for by name, and there is no GPU and no interpreter; a device that is not there."""
    layer = trained(backend="one_pass")
    with mock.patch.object(backend, "interpreting", lambda: False):
        variant = refused(lambda: layer(torch.randn(3, 6)), "one_pass", "need a CUDA or ROCm device", 'backend="auto"')
    outcomes = [variant, refused(lambda: rank_lora_linear(*operands(), backend="cuda"), "backend 'cuda' is unknown")]
    if not torch.cuda.is_available():
        outcomes.append(refused(lambda: trainer(Path("unused"), device="cuda:0"), "cuda:0", "no GPU"))
    return worst(outcomes)


@processes("exit code 1 and the command that installs it; no traceback")
def package_of_the_trainer_missing(folder: Path) -> Outcome:
    """jsonargparse is not installed, and `fastlora train` is called."""
    code = "import sys; sys.modules['jsonargparse'] = None; from fastlora import cli; sys.exit(cli.main(['train']))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=folder, timeout=120)
    clear = done.returncode == 1 and "pip install 'fastlora[train]'" in done.stderr and "Traceback" not in done.stderr
    return Outcome("survived" if clear else "unclear error", done.stderr[-200:].strip())
