"""The captured step: its bookkeeping with a capture that only remembers, the graph itself on a GPU."""

import pytest
import torch

from fastlora.continual import CoDyRAConfig, LoRAConfig, Trainer
from fastlora.continual.config import DecayBConfig, JointConfig, RunConfig, SoRAConfig, ZSCLConfig
from fastlora.continual.graphed_step import GraphedStep, check_capture
from fastlora.continual.methods import build_method
from fastlora.continual.step import training_step

CODYRA = CoDyRAConfig(rank=4, iterations=12, batch_size=10, lr=1e-2, kappa_max=0.3)
CUDA = torch.device("cuda")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def remembers(work):
    """What a capture is to the host: nothing is carried out until the replay, which reads the same tensors again."""
    return work


def steps(trainer, capture=None, graphed=False, iterations=12):
    """Losses of a task whose learning rate and kappa change at every step, as in the trainer."""
    ctx, source = trainer.begin(1, trainer.stream.tasks[0])
    ctx.fixed_shapes, losses = True, []
    with training_step(trainer.method, ctx, trainer.config) as step:
        step = GraphedStep(step, ctx, CODYRA.batch_size, capture) if graphed else step
        for iteration in range(iterations):
            for group in ctx.optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + iteration)
            ctx.optimizer.kappa = 0.01 * iteration
            losses.append(step(iteration, source.batch(iteration)))
            assert ctx.step["iteration"] == iteration
    state = {key: value.detach().clone() for key, value in trainer.model.state_dict().items()}
    return [float(loss) for loss in losses], state


@pytest.mark.parametrize(
    ("device", "capture"), [("cpu", remembers), pytest.param("cuda", None, marks=gpu)], ids=["cpu", "cuda"]
)
def test_replays_train_as_steps_do(make_clip, tokenizer, make_stream, device, capture):
    """24 images in batches of 10, 10 and 4: the short ones are not replayed."""
    eager = steps(Trainer(make_clip(), tokenizer, make_stream(), CODYRA, progress=False, device=device))
    trainer = Trainer(make_clip(), tokenizer, make_stream(), CODYRA, progress=False, device=device)
    graphed = steps(trainer, capture, graphed=True)
    assert graphed[0] == pytest.approx(eager[0], rel=1e-6 if device == "cpu" else 1e-4)
    for key, value in eager[1].items():
        torch.testing.assert_close(graphed[1][key], value, rtol=1e-4, atol=1e-5)


def test_what_is_captured_runs_once_per_full_batch(clip, tokenizer, stream):
    """Two of three batches of an epoch are full; the first three of these come before the capture."""
    captured, replayed = [], []

    def capture(work):
        captured.append(work)
        return lambda: replayed.append(work())

    steps(Trainer(clip, tokenizer, stream, CODYRA, progress=False), capture, graphed=True, iterations=9)
    assert len(captured) == 1 and len(replayed) == 6 - 3


@pytest.mark.parametrize(
    ("options", "method", "device", "message"),
    [
        ({}, CODYRA, torch.device("cpu"), "the device is cpu; a graph needs a CUDA device. Give --cuda_graph false"),
        ({"dtype": "float16"}, CODYRA, CUDA, "reads whether it overflowed. Give --dtype bfloat16"),
        ({"accumulate": 2}, CODYRA, CUDA, "restore random states on the host. Give --accumulate 1"),
        ({}, JointConfig(), CUDA, "one task after the other. Give another --method"),
        ({}, LoRAConfig(distillation=1.0), CUDA, "draws its texts on the host. Give --method.distillation 0"),
        ({}, DecayBConfig(), CUDA, "decay_b does something at each step that a replay would leave out"),
        ({}, SoRAConfig(), CUDA, "sora does something at each step"),
        ({}, ZSCLConfig(), CUDA, "zscl does something at each step"),
    ],
)
def test_what_cannot_be_captured(options, method, device, message):
    config = RunConfig(method=method, cuda_graph=True, **options)
    with pytest.raises(ValueError, match=f"cuda_graph was asked for, and .*{message}"):
        check_capture(config, build_method(method), device)


@pytest.mark.parametrize("method", [CODYRA, LoRAConfig()])
def test_what_can(method):
    for options in ({"dtype": "bfloat16"}, {"compile": "max-autotune"}, {"activation_checkpointing": True}):
        check_capture(RunConfig(method=method, cuda_graph=True, **options), build_method(method), CUDA)


def test_the_trainer_refuses_before_anything_is_made(clip, tokenizer, stream, tmp_path):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        Trainer(clip, tokenizer, stream, CODYRA, cuda_graph=True, device="cpu", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@gpu
def test_whole_run_with_graphs(make_clip, tokenizer, make_stream):
    """Every task has a graph of its own, and the run ends where the eager one does."""
    records = [
        Trainer(make_clip(), tokenizer, make_stream(), CODYRA, progress=False, device="cuda", cuda_graph=graphed).fit()
        for graphed in (False, True)
    ]
    assert records[1].metrics()["learning"] == pytest.approx(records[0].metrics()["learning"], abs=8)
