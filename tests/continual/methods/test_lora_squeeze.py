import pytest
import torch
from continual.task_driver import check_going_on_after_task_2

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.continual import Trainer
from fastlora.continual.config import method_config
from fastlora.continual.low_rank import smallest_rank, svd_of_product
from fastlora.continual.methods import build_method
from fastlora.continual.methods.lora_squeeze import squeeze_
from fastlora.optim import ProxAdamW


def config(**options):
    return method_config(
        "lora_squeeze", **{"rank": 6, "target_rank": 2, "iterations": 12, "batch_size": 16, "lr": 1e-2} | options
    )


def trained_layer(rank=6, steps=5):
    """A layer, its optimizer, and inputs and targets."""
    torch.manual_seed(0)
    layer = FusedRankLoRALinear(20, 12, rank, gate_init="ones")
    layer.gate.requires_grad_(False)
    optimizer = ProxAdamW(layer, lr=0.05)
    x, y = torch.randn(64, 20), torch.randn(64, 12)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    return layer, optimizer, x, y


def test_svd_of_product_without_the_product():
    torch.manual_seed(0)
    for n, r, k in ((12, 6, 20), (4, 6, 20), (12, 6, 3), (5, 1, 5)):
        lora_b, lora_a = torch.randn(n, r), torch.randn(r, k)
        u, s, vh = svd_of_product(lora_b, lora_a)
        product = lora_b.double() @ lora_a.double()
        torch.testing.assert_close((u * s) @ vh, product)
        torch.testing.assert_close(s, torch.linalg.svdvals(product)[: len(s)])


def test_smallest_rank():
    energies = torch.tensor([8.0, 4.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    assert [smallest_rank(energies, share) for share in (0.4, 0.5, 0.51, 0.75, 0.76, 0.95, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        4,
        4,
    ]
    assert smallest_rank(torch.zeros(3), 0.9) == 0


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_best_approximation_of_its_rank(rank):
    """Eckart and Young: what is lost is the norm of the singular values left out, and no rank-k matrix loses less."""
    layer, optimizer, _, _ = trained_layer()
    before = layer.delta_weight().double()
    values = torch.linalg.svdvals(before)
    squeeze_(layer, rank, 0.0, optimizer)
    after = layer.delta_weight().double()
    assert layer.active_rank() == rank == int(torch.linalg.matrix_rank(after, rtol=1e-5))
    torch.testing.assert_close((after - before).norm(), values[rank:].norm(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.lora_a.norm(dim=1), layer.lora_b.norm(dim=0))  # the values are shared evenly


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_the_share_of_energy_decides_the_rank(energy):
    layer, optimizer, _, _ = trained_layer()
    before = layer.delta_weight().double()
    squeeze_(layer, 1, energy, optimizer)
    kept, whole = layer.delta_weight().double().square().sum(), before.square().sum()
    assert kept >= energy * whole * (1 - 1e-6)
    values = torch.linalg.svdvals(before).square()
    assert values[: layer.active_rank() - 1].sum() < energy * whole


def test_first_moments_are_those_of_the_new_factors():
    """Moments are sums of gradients, and the gradient of a factor is linear in it: dB' = dW A'^T, dA' = B'^T dW."""
    layer, optimizer, _, _ = trained_layer(steps=3)
    weight_grad = torch.randn(12, 20)
    for parameter, grad in (
        (layer.lora_a, layer.lora_b.t() @ weight_grad),
        (layer.lora_b, weight_grad @ layer.lora_a.t()),
    ):
        optimizer.state[parameter]["exp_avg"] = grad.detach().clone()
    squeeze_(layer, 3, 0.0, optimizer)
    moments = [optimizer.state[parameter]["exp_avg"] for parameter in (layer.lora_a, layer.lora_b)]
    torch.testing.assert_close(moments[0], layer.lora_b.detach().t() @ weight_grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments[1], weight_grad @ layer.lora_a.detach().t(), rtol=1e-4, atol=1e-5)
    assert all(bool((optimizer.state[p]["exp_avg_sq"] >= 0).all()) for p in (layer.lora_a, layer.lora_b))


def test_training_goes_on_after_a_squeeze():
    layer, optimizer, x, y = trained_layer()
    squeeze_(layer, 3, 0.0, optimizer)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert not optimizer.why_not and losses == sorted(losses, reverse=True) and losses[-1] < 0.98 * losses[0]


def test_an_update_of_zero_is_squeezed_to_a_finite_one():
    layer, optimizer, x, _ = trained_layer(steps=0)
    squeeze_(layer, 2, 0.0, optimizer)
    assert layer.active_rank() == 2 and not layer.delta_weight().any()
    assert torch.isfinite(layer(x)).all()


def test_ranks_fall_in_equal_ratios():
    assert build_method(config(rank=16, target_rank=2, squeezes=3, iterations=100)).schedule == {25: 8, 50: 4, 75: 2}
    assert build_method(config(rank=3, target_rank=4, squeezes=1)).schedule == {6: 3}
    assert build_method(config()).schedule == {}


@pytest.mark.parametrize("squeezes", [0, 2])
def test_what_is_merged_has_the_target_rank(clip, tokenizer, stream, tmp_path, squeezes):
    record = Trainer(
        clip, tokenizer, stream, config(squeezes=squeezes), out=tmp_path / "run", progress=False, log_every=1
    ).fit()
    assert record.mean_rank() == 2.0
    assert all(set(entry.ranks.values()) == {2} for entry in fastlora.Journal(tmp_path / "run" / "adapters"))
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:13]
    ranks = [float(row.rsplit(",", 1)[1]) for row in rows]
    assert ranks == ([6.0] * 12 if squeezes == 0 else [6.0] * 3 + [3.0] * 4 + [2.0] * 5)


def test_energy_gives_each_layer_its_own_rank(clip, tokenizer, stream):
    record = Trainer(clip, tokenizer, stream, config(energy=0.9), progress=False).fit()
    assert len({entry.active_rank for entry in record.ranks}) > 1


def test_going_on_after_a_stop(make_clip, tokenizer, make_stream):
    assert check_going_on_after_task_2(make_clip, tokenizer, make_stream, config(squeezes=2)) == {}


def test_bad_options():
    with pytest.raises(ValueError, match="target_rank is 0; it must be an integer >= 1"):
        config(target_rank=0)
    with pytest.raises(ValueError, match=r"energy is 1.0; it must be a finite number in \[0, 1\)"):
        config(energy=1.0)
    with pytest.raises(ValueError, match="squeezes is 12 with 12 iterations"):
        config(squeezes=12)
