"""Several threads at once: each gets the bits that it gets alone, no update is lost or merged twice."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from faults.models import module_lists, ours

import fastlora
from fastlora.ops import dispatch, merge_, new_residuals, rank_lora_linear, unmerge_
from fastlora.optim import ProxAdamW

THREADS, ROUNDS = 4, 6


@pytest.fixture(autouse=True)
def often_switched():
    """Threads take turns every 10 microseconds: what is not safe shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(works):
    """What each gives, all begun at the same moment in threads of their own."""
    barrier, results = threading.Barrier(len(works)), [None] * len(works)

    def run(place):
        torch.set_num_threads(1)  # a setting of the thread
        barrier.wait()
        try:
            results[place] = works[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def same(these, those):
    return len(these) == len(those) and all(torch.equal(a, b) for a, b in zip(these, those))


# ---- forward and gradients


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def call(seed):
    def work():
        operands = drawn(seed, (5, 24), (20, 24), (20,), (4, 24), (20, 4), (4,))
        leaves = [operands[i].requires_grad_() for i in (0, 3, 4, 5)]
        y = rank_lora_linear(*operands, 0.2, 0.5, backend="torch")
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    return work


def test_calls_of_the_op():
    expected = [call(seed)() for seed in range(THREADS)]
    for _ in range(ROUNDS):
        assert all(map(same, together([call(seed) for seed in range(THREADS)]), expected))


def test_one_layer_in_all_threads():
    layer = ours()[0]
    layer.kappa = 0.3
    parameters = [layer.lora_a, layer.lora_b, layer.gate]

    def work(seed):
        x = drawn(seed, (7, layer.in_features))[0]
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]

    works = [lambda seed=seed: work(seed) for seed in range(THREADS)]
    expected = [each() for each in works]
    for _ in range(ROUNDS):
        assert all(map(same, together(works), expected))


# ---- merges


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["extension", "torch"])
def test_merges_of_different_weights(dtype):
    lists = [module_lists(dtype=dtype) for _ in range(THREADS)]

    def work(given):
        weights = [weight.clone() for weight in given[0]]
        residuals = new_residuals(weights)
        merge_(weights, *given[1:], residuals=residuals)
        unmerge_(weights, *given[1:], residuals=residuals)
        merge_(weights, *given[1:], residuals=residuals)
        return [*weights, *residuals]

    expected = [work(given) for given in lists]
    for _ in range(ROUNDS):
        assert all(map(same, together([lambda given=given: work(given) for given in lists]), expected))


def test_merges_of_the_same_weight():
    """Sums of small whole numbers: exact in any order."""
    weight = torch.zeros(64, 96)
    lists = [[torch.full((2, 96), float(i))] + [torch.ones(64, 2)] + [torch.ones(2)] for i in range(1, THREADS + 1)]

    def work(a, b, gate):
        for _ in range(20):
            merge_([weight], [a], [b], [gate])

    together([lambda given=given: work(*given) for given in lists])
    assert torch.equal(weight, torch.full_like(weight, 20 * 2 * sum(range(1, THREADS + 1))))


def by_layer(model):
    for layer in (model[0], model[2]):
        layer.merge_()


@pytest.mark.parametrize("work", [fastlora.merge, fastlora.unmerge, by_layer], ids=["merge", "unmerge", "layers"])
def test_one_model_is_merged_once(work):
    """The second thread finds fresh adapters, which add nothing."""
    for _ in range(3 * ROUNDS):
        model = ours()
        alone = copy.deepcopy(model)
        work(alone)
        together([lambda: work(model)] * THREADS)  # noqa: B023
        assert same([layer.weight for layer in (model[0], model[2])], [layer.weight for layer in (alone[0], alone[2])])
        assert not any(adapter.lora_b.count_nonzero() for _, adapter in fastlora.adapters(model))


# ---- optimizers


def steps(seed):
    def work():
        model = ours(size=0.1 + seed)
        optimizer = ProxAdamW(model, lr=0.01)
        optimizer.param_groups[1]["kappa"] = 0.01
        for step in range(8):
            for place, parameter in enumerate(fastlora.adapter_parameters(model)):
                parameter.grad = drawn(100 * seed + 10 * step + place, parameter.shape)[0]
            optimizer.step()
        return [*(p.detach() for p in fastlora.adapter_parameters(model)), optimizer.kept_counts()]

    return work


def test_steps_of_different_optimizers(monkeypatch):
    started = [ours(size=0.1 + seed) for seed in range(THREADS)]  # torch.manual_seed, in `ours`, is the process's own
    monkeypatch.setattr(sys.modules[__name__], "ours", lambda size: copy.deepcopy(started[round(size - 0.1)]))
    expected = [steps(seed)() for seed in range(THREADS)]
    for _ in range(ROUNDS):
        assert all(map(same, together([steps(seed) for seed in range(THREADS)]), expected))


# ---- what a first call makes


def test_look_ups_of_tiles_in_tables_not_read_yet():
    def work():
        return [
            dispatch.lookup(role, "NVIDIA H200", m, 768, k, 16, torch.bfloat16)
            for role in ("fwd", "dx") for m in (1, 100, 16384) for k in (768, 3072)
        ]  # fmt: skip

    for _ in range(ROUNDS):
        dispatch.reload()
        first, *others = together([work] * THREADS)
        for other in others:
            assert all(a is b for a, b in zip(first, other))


FIRST = """
import json, sys, threading
import torch
sys.setswitchinterval(1e-5)
import fastlora
barrier, told = threading.Barrier(4), []

def work():
    torch.set_num_threads(1)
    a = [torch.arange(float(r * c)).reshape(r, c) / 100 for r, c in ((5, 24), (20, 24), (4, 24), (20, 4))]
    barrier.wait()
    try:
        info = fastlora.build_info()
        leaves = [t.clone().requires_grad_() for t in (a[0], a[2], a[3], torch.ones(4))]
        y = fastlora.ops.rank_lora_linear(leaves[0], a[1], None, *leaves[1:], 0.2, 0.5)
        grads = torch.autograd.grad(y.sum(), leaves)
        weight = a[1].clone()
        fastlora.ops.merge_([weight], [a[2]], [a[3]], [torch.ones(4)])
        layer = fastlora.FusedRankLoRALinear(24, 20, 4)
        layer.lora_b.data.fill_(0.5), layer.lora_a.data.fill_(0.25), layer.gate.data.fill_(1.0)
        optimizer = fastlora.optim.ProxAdamW(layer, lr=0.01)
        torch.autograd.backward(torch.nn.functional.linear(a[0], layer.lora_a).sum() + layer.lora_b.sum() + layer.gate.sum())
        optimizer.step()
        sums = [float(t.double().sum()) for t in (y, *grads, weight, layer.lora_a, layer.lora_b, layer.gate)]
        told.append(json.dumps([info, sums, layer.gate.tolist()]))
    except BaseException as error:
        told.append(repr(error))

threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
barrier = threading.Barrier(1)
work()
print(json.dumps(told))
"""


def test_first_calls_of_a_process():
    """Lazy imports, the extension, the record of the build, backends: four threads need all of it at the same moment."""
    root = str(Path(fastlora.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told) == 5 and len(set(told)) == 1, told
    info, sums, gates = json.loads(told[0])
    assert info["version"] == fastlora.__version__ and gates == pytest.approx([0.99] * 4) and sums[0] != 0
