"""Every way of carrying out a step trains the same model."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.continual import CoDyRAConfig, LoRAConfig, Trainer
from fastlora.continual.config import ExpertPoolConfig, FullConfig, InfLoRAConfig, JointConfig, PerTaskConfig
from fastlora.continual.evaluation import evaluate
from fastlora.continual.features import image_features, text_features
from fastlora.continual.precision import computing_in
from fastlora.continual.step import training_step
from fastlora.continual.stream import Reference

CODYRA = CoDyRAConfig(rank=4, iterations=6, batch_size=10, lr=1e-2, kappa_max=0.3)
LORA = LoRAConfig(rank=2, iterations=4, batch_size=10)
HELD = LoRAConfig(rank=2, iterations=4, batch_size=10, distillation=1.0)


TEXTS = Reference(None, ["a", "a b", "c d e", "f"])


def trained(model, tokenizer, make_stream, method=CODYRA, tasks=(1, 2), **options):
    """(weights after the tasks, losses of all steps)."""
    trainer = Trainer(model, tokenizer, make_stream(reference=TEXTS), method, progress=False, log_every=1, **options)
    losses = []
    trainer._keeper.append_log = lambda row: losses.append(row[2])
    for number in tasks:
        trainer._train(number, trainer.stream.tasks[number - 1])
    return {key: value.clone() for key, value in model.state_dict().items()}, losses


def distance(a, b):
    return sum(float((a[key] - b[key]).square().sum()) for key in a) ** 0.5


def begun(model, tokenizer, make_stream, method=CODYRA, **options):
    """A trainer at the first task's first step, and the task's context and data."""
    trainer = Trainer(model, tokenizer, make_stream(reference=TEXTS), method, progress=False, **options)
    return trainer, *trainer.begin(1, trainer.stream.tasks[0])


def test_activation_checkpointing_has_the_same_bits(make_clip, tokenizer, make_stream):
    model = make_clip(layers=2)
    plain = trained(make_clip(layers=2), tokenizer, make_stream)
    again = trained(model, tokenizer, make_stream, activation_checkpointing=True)
    assert plain[1] == again[1] and distance(plain[0], again[0]) == 0
    assert not model.transformer.grad_checkpointing and not model.visual.transformer.grad_checkpointing


def test_activation_checkpointing_keeps_less(make_clip, tokenizer, make_stream):
    """What autograd holds after the forward pass of a step."""

    def bytes_held(checkpointing):
        sizes, options = {}, {"activation_checkpointing": checkpointing}
        trainer, ctx, source = begun(make_clip(layers=4), tokenizer, make_stream, LORA, **options)

        def keep(tensor):
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with training_step(trainer.method, ctx, trainer.config):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                image_features(ctx.model, source.batch(0).images)
        return sum(sizes.values())

    assert bytes_held(True) < 0.5 * bytes_held(False)


@pytest.mark.parametrize("method", [CODYRA, HELD], ids=["codyra", "distillation"])
@pytest.mark.parametrize("parts", [2, 3, 64])
def test_accumulation_is_the_step_of_the_whole_batch(make_clip, tokenizer, make_stream, method, parts):
    """Batches of 10 and 4 of 24 images, in parts of 5, of 4, 4 and 2, or of one image each."""
    whole = trained(make_clip(), tokenizer, make_stream, method)
    in_parts = trained(make_clip(), tokenizer, make_stream, method, accumulate=parts)
    assert in_parts[1] == pytest.approx(whole[1], rel=1e-5)
    assert distance(whole[0], in_parts[0]) < 1e-3 * distance(whole[0], make_clip().state_dict())


def test_accumulation_trains_text_over_a_frozen_image_tower(make_clip, tokenizer, make_stream):
    method = LoRAConfig(rank=2, iterations=4, batch_size=10, where="text")
    whole = trained(make_clip(), tokenizer, make_stream, method)
    in_parts = trained(make_clip(), tokenizer, make_stream, method, accumulate=2)
    assert in_parts[1] == pytest.approx(whole[1], rel=1e-5)


def test_both_passes_of_accumulation_drop_the_same_out(clip, tokenizer, make_stream, monkeypatch):
    clip.visual.ln_post = nn.Sequential(clip.visual.ln_post, nn.Dropout(0.5))
    passes = []

    def recording(model, images):
        passes.append(image_features(model, images))
        return passes[-1]

    monkeypatch.setattr("fastlora.continual.step.image_features", recording)
    trainer, ctx, source = begun(clip, tokenizer, make_stream, LORA, accumulate=2)
    with training_step(trainer.method, ctx, trainer.config) as step:
        step(0, source.batch(0))
    first, second = passes[:2], passes[2:]
    assert len(second) == 2 and not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "method", [CODYRA, HELD, InfLoRAConfig(rank=2, iterations=4), ExpertPoolConfig(rank=2, iterations=4)]
)
def test_half_precision_learns_the_same(make_clip, tokenizer, make_stream, method, dtype):
    """The loss falls as in float32, what is merged is close, and what was frozen keeps its bits."""
    model, before = make_clip(), make_clip().state_dict()
    whole, half = trained(make_clip(), tokenizer, make_stream, method), None
    half = trained(model, tokenizer, make_stream, method, dtype=dtype)
    assert half[1] == pytest.approx(whole[1], rel=0.05)
    assert {value.dtype for value in half[0].values() if value.is_floating_point()} == {torch.float32}
    changed = [key for key in before if not torch.equal(half[0][key], before[key])]
    assert changed == [key for key in before if not torch.equal(whole[0][key], before[key])]
    assert distance(whole[0], half[0]) <= 0.5 * distance(whole[0], before)


def test_adapters_are_float32_over_half_weights(clip, tokenizer, make_stream):
    trainer, ctx, source = begun(clip, tokenizer, make_stream, CODYRA, dtype="bfloat16")
    with training_step(trainer.method, ctx, trainer.config) as step:
        step(0, source.batch(0))
        assert {p.dtype for p in fastlora.adapter_parameters(clip)} == {torch.float32}
        assert clip.visual.conv1.weight.dtype == clip.attn_mask.dtype == torch.bfloat16
        assert clip.logit_scale.dtype == torch.float32 == ctx.step["image_features"].dtype == ctx.step["loss"].dtype
        assert {v.dtype for s in ctx.optimizer.state.values() for v in s.values()} == {torch.float32}
    assert clip.visual.conv1.weight.dtype == torch.float32


def test_weights_come_back_when_a_step_fails(clip, tokenizer, stream):
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    with pytest.raises(ZeroDivisionError), computing_in(torch.bfloat16, clip.requires_grad_(False)):
        assert clip.visual.conv1.weight.dtype == torch.bfloat16
        raise ZeroDivisionError
    assert all(torch.equal(value, before[key]) for key, value in clip.state_dict().items())


def test_a_float16_step_that_overflows_is_skipped(clip, tokenizer, make_stream):
    trainer, ctx, source = begun(clip, tokenizer, make_stream, CODYRA, dtype="float16")
    parameters = [p.detach().clone() for p in fastlora.adapter_parameters(clip)]
    with training_step(trainer.method, ctx, trainer.config) as step:
        step._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        assert torch.isfinite(step(0, source.batch(0)))
        assert all(torch.equal(p, q) for p, q in zip(fastlora.adapter_parameters(clip), parameters))
        assert step._scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("method", [FullConfig(), JointConfig(train="weights")])
def test_weights_that_train_are_not_rounded(clip, tokenizer, stream, method):
    with pytest.raises(ValueError, match=r"dtype is 'bfloat16', and \w+ trains the weights.*--dtype float32"):
        Trainer(clip, tokenizer, stream, method, dtype="bfloat16")
    with pytest.raises(ValueError, match="positional_embedding trains, and is no adapter"):
        with computing_in(torch.bfloat16, clip):
            pass
    assert clip.visual.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize("method", [LORA, PerTaskConfig(rank=2, iterations=4, batch_size=10)])
def test_whole_run_in_bfloat16(clip, tokenizer, stream, method):
    record = Trainer(clip, tokenizer, stream, method, dtype="bfloat16", progress=False).fit()
    assert len(record.own) == 4 and record.metrics()["learning"] > 30


def test_evaluation_in_half_precision(clip, tokenizer, stream):
    """Features close to those of float32; weights untouched."""
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    images, tokens = stream.tasks[0].test.images, tokenizer(["a b", "c"])
    with torch.no_grad(), computing_in(torch.bfloat16, clip):
        halves = image_features(clip, images), text_features(clip, tokens)
    with torch.no_grad():
        for half, whole in zip(halves, (image_features(clip, images), text_features(clip, tokens))):
            assert half.dtype == torch.float32 and float((half * whole).sum(-1).min()) > 0.999
    result = evaluate(clip, tokenizer, stream, dtype=torch.bfloat16)
    assert result.own == pytest.approx(evaluate(clip, tokenizer, stream).own, abs=20)
    assert all(torch.equal(value, before[key]) for key, value in clip.state_dict().items())


class Reads(TorchDispatchMode):
    """Counts the operations that bring a value to the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func) or "nonzero.default" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [CODYRA, LORA, HELD], ids=["codyra", "lora", "distillation"])
def test_a_step_reads_no_value_back(clip, tokenizer, make_stream, method):
    """On a GPU each would wait for the device. The first step makes the optimizer's state."""
    trainer, ctx, source = begun(clip, tokenizer, make_stream, method)
    with training_step(trainer.method, ctx, trainer.config) as step:
        batches = [source.batch(i) for i in range(3)]
        step(0, batches[0])
        with Reads() as reads:
            for i in (1, 2):
                step(i, batches[i])
    assert reads.found == []
    with Reads() as reads:
        float(torch.ones(()))
    assert reads.found, "the counter sees a read"


def test_compiled_steps(make_clip, tokenizer, make_stream):
    """By torch's own compiler, which takes a minute for a model of one block."""
    method = LoRAConfig(rank=2, iterations=3, batch_size=12)
    plain = trained(make_clip(), tokenizer, make_stream, method, tasks=(1,))
    compiled = trained(make_clip(), tokenizer, make_stream, method, tasks=(1,), compile="default")
    assert compiled[1] == pytest.approx(plain[1], rel=1e-5)
    assert distance(plain[0], compiled[0]) < 1e-3 * distance(plain[0], make_clip().state_dict())


def test_compiled_steps_of_several_tasks(make_clip, tokenizer, make_stream, monkeypatch):
    """As traced, without code generation: adapters of full rank stay, and each task compiles what it needs once."""
    compiled_for, compile = [], torch.compile

    def traced(function, mode):
        compiled_for.append((function.__name__, mode))
        return compile(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    plain = trained(make_clip(), tokenizer, make_stream)
    compiled = trained(make_clip(), tokenizer, make_stream, compile="max-autotune")
    assert compiled[1] == pytest.approx(plain[1], rel=1e-4)
    assert distance(plain[0], compiled[0]) < 0.01 * distance(plain[0], make_clip().state_dict())
    mode = "max-autotune-no-cudagraphs"
    assert compiled_for == 2 * [("image_features", mode), ("text_features", mode)]


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"accumulate": 2}], ids=str)
def test_clipping_bounds_the_norm_of_all_gradients(clip, tokenizer, make_stream, options):
    """Also behind a loss that is scaled, or whose gradient comes in parts; short gradients are left alone."""
    norms = {}
    for largest in (0.0, 1e-3, 1e3):
        method = LoRAConfig(rank=2, iterations=4, batch_size=10, clip_norm=largest)
        trainer, ctx, source = begun(clip, tokenizer, make_stream, method, **options)
        with training_step(trainer.method, ctx, trainer.config) as step:
            step(0, source.batch(0))
        gradients = [p.grad for p in fastlora.adapter_parameters(clip) if p.grad is not None]
        norms[largest] = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
        fastlora.remove(clip)
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3) and norms[0.0] > 2e-3
    assert norms[1e3] == pytest.approx(norms[0.0], rel=1e-4)


def test_clipping_keeps_dead_ranks(clip, tokenizer, make_stream):
    """The norm is over all gradients, also of ranks that have died."""
    method = CoDyRAConfig(rank=4, iterations=6, batch_size=10, lr=1e-2, kappa_max=0.9, clip_norm=1.0)
    trainer, ctx, _ = begun(clip, tokenizer, make_stream, method)
    for _, adapter in fastlora.adapters(clip):
        adapter.gate.data[0] = 0.0
    trainer.method.drop_dead(ctx)
    assert {adapter.gate.numel() for _, adapter in fastlora.adapters(clip)} == {4}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dtype", "half", r"dtype is 'half'; accepted: float32, bfloat16, float16"),
        ("accumulate", 0, r"accumulate is 0; it must be an integer >= 1"),
        ("activation_checkpointing", "yes", r"activation_checkpointing is 'yes'; it must be true or false"),
        ("compile", "max", r"compile is 'max'; accepted: no, default, max-autotune"),
    ],
)
def test_wrong_options(clip, tokenizer, stream, option, value, message):
    with pytest.raises(ValueError, match=message):
        Trainer(clip, tokenizer, stream, LORA, **{option: value})
