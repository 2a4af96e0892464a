"""Full fine-tuning, WiSE-FT, LwF and ZSCL: the property that defines each."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F

from fastlora.continual.annealing import cosine
from fastlora.continual.batches import batches
from fastlora.continual.config import FullConfig, LwFConfig, WiSEFTConfig, ZSCLConfig
from fastlora.continual.losses import contrastive_loss
from fastlora.continual.methods.distillation import endless
from fastlora.continual.methods.weights import interpolate_, other_weights, snapshot, trainable
from fastlora.continual.plots import training_curves
from fastlora.continual.restore import restore
from fastlora.continual.saved_run import read_run
from fastlora.continual.stream import InMemoryImages, Reference, TaskStream
from fastlora.continual.trainer import Trainer

QUICK = {"iterations": 4, "batch_size": 8, "lr": 1e-3}
WORDS = ("grey", "dim", "odd", "old", "new", "flat", "soft")


def reference(images=20):
    pixels = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    return Reference(InMemoryImages(pixels, torch.zeros(images, dtype=torch.long)), [f"a {word} one" for word in WORDS])


@pytest.fixture
def make_trainer(make_clip, make_task, tokenizer):
    def make(config, tasks=2, with_reference=True, **options):
        parts = [make_task(colour, 2 + i, shots=4, seed=i) for i, colour in enumerate(("red", "green", "blue")[:tasks])]
        stream = TaskStream("full", parts, reference=reference() if with_reference else None)
        return Trainer(make_clip(), tokenizer, stream, config, progress=False, **options)

    return make


def plain_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def fitted(trainer):
    trainer.fit()
    return plain_state(trainer.model)


def assert_same(a, b):
    for key in a:
        assert torch.equal(a[key], b[key]), key


def differ(a, b):
    return {key for key in a if not torch.equal(a[key], b[key])}


def noted(items, taken):
    for item in items:
        taken.append(item)
        yield item


def watch(trainer, hook, seen):
    """Call `seen(ctx, result)` after each call of the method's hook."""
    original = getattr(trainer.method, hook)

    def watched(ctx):
        result = original(ctx)
        seen(ctx, result)
        return result

    setattr(trainer.method, hook, watched)


# ---- weights


def test_which_weights_train(make_clip):
    model = make_clip()
    everything = set(dict(model.named_parameters()))
    assert set(trainable(model, "all", "all")) == everything - {"logit_scale"}
    vision, text = (set(trainable(model, where, "all")) for where in ("vision", "text"))
    assert vision == {name for name in everything if name.startswith("visual.")}
    assert text == everything - vision - {"logit_scale"}
    matrices = {"attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    towers = {"vision": "visual.transformer.resblocks.0", "text": "transformer.resblocks.0"}
    for where, block in towers.items():
        assert set(trainable(model, where, "matrices")) == {f"{block}.{name}" for name in matrices}


def test_custom_text_towers_are_told_apart_too(make_clip):
    model = make_clip(custom_text=True)
    assert {name.split(".")[0] for name in trainable(model, "text", "all")} == {"text"}


def test_a_model_without_blocks_of_open_clip_says_so():
    model = torch.nn.Module()
    model.visual = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Module has no matrices weights to train in where='vision'.*parameters=all"):
        trainable(model, "vision", "matrices")


def test_other_weights_are_lent_and_returned(clip):
    own, half = plain_state(clip), {key: value / 2 for key, value in snapshot(clip).items()}
    with pytest.raises(OSError), other_weights(clip, half):
        assert_same(half, clip.state_dict())
        raise OSError
    assert_same(own, clip.state_dict())


def test_interpolation_by_hand():
    theta, anchor = {"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([3.0, 1.0])}
    interpolate_(theta, anchor, 0.25)
    assert theta["w"].tolist() == [2.5, 2.0]
    interpolate_(theta, anchor, 1.0)
    assert theta["w"].tolist() == [2.5, 2.0]


# ---- full


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_full_is_adamw_on_every_weight(decay, make_trainer, make_clip, tokenizer):
    """Against a loop in plain PyTorch over the same batches."""
    trainer = make_trainer(FullConfig(**QUICK, weight_decay=decay), tasks=1)
    task, data, model = trainer.stream.tasks[0], make_trainer(FullConfig(), tasks=1).stream.open_task(0), make_clip()
    got = fitted(trainer)
    trained = [p for name, p in model.named_parameters() if name != "logit_scale"]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), weight_decay=decay)
    tokens = tokenizer([task.templates[0].format(name) for name in task.classes])
    for iteration, (images, labels) in zip(range(4), batches(data, 8, 0, 1)):
        optimizer.param_groups[0]["lr"] = cosine(1e-3, iteration, 4)
        features = F.normalize(model.encode_image(images), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)
        loss = contrastive_loss(*features, labels, model.logit_scale.detach().exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert differ(got, make_clip().state_dict()) == set(got) - {"logit_scale"}
    for key, value in model.state_dict().items():
        a, b = got[key], value
        if key.endswith("in_proj_bias"):  # a bias of the keys cancels in the softmax: its gradient is rounding alone
            a, b = (torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_full_trains_the_chosen_matrices_alone(make_trainer, make_clip):
    trainer = make_trainer(FullConfig(**QUICK, where="text", parameters="matrices"))
    expected = set(trainable(trainer.model, "text", "matrices"))
    assert differ(fitted(trainer), make_clip().state_dict()) == expected


def test_merge_scale_goes_that_far_from_the_previous_weights(make_trainer, make_clip):
    base = plain_state(make_clip())
    whole, third = (fitted(make_trainer(FullConfig(**QUICK, merge_scale=s), tasks=1)) for s in (1.0, 0.3))
    for key, start in base.items():
        torch.testing.assert_close(third[key], start + 0.3 * (whole[key] - start), rtol=1e-5, atol=1e-7)


def test_a_run_of_full_weights_is_restored_from_checkpoints_alone(make_trainer, make_clip, tmp_path):
    trainer = make_trainer(FullConfig(**QUICK), out=tmp_path / "run")
    after = fitted(trainer)
    run, model = read_run(tmp_path / "run"), make_clip()
    assert restore(model, run, 0) == "the base model"
    with pytest.raises(FileNotFoundError, match="full leaves no adapters .* task 1 from.*Train with --checkpoints all"):
        restore(model, run, 1)
    assert restore(model, run, 2) == "checkpoints/task_02.safetensors"
    assert_same(after, model.state_dict())
    (axes,) = training_curves(run).axes  # of the loss alone: there is no rank and no threshold
    assert [text.get_text().strip() for text in axes.texts] == ["red", "green"]


# ---- WiSE-FT


def test_wise_ft_with_the_previous_weights_is_a_merge_scale(make_trainer):
    wise = fitted(make_trainer(WiSEFTConfig(**QUICK, alpha=0.8, anchor="previous")))
    assert_same(wise, fitted(make_trainer(FullConfig(**QUICK, merge_scale=0.8))))


def test_wise_ft_goes_back_towards_the_base_model_at_every_task(make_trainer, make_clip):
    base, tuned, left = plain_state(make_clip()), [], []
    trainer = make_trainer(WiSEFTConfig(**QUICK, alpha=0.3))
    original = trainer.method.end_task

    def end_task(ctx):
        tuned.append(plain_state(ctx.model))
        original(ctx)
        left.append(plain_state(ctx.model))

    trainer.method.end_task = end_task
    trainer.fit()
    for before, after in zip(tuned, left, strict=True):
        for key, start in base.items():
            torch.testing.assert_close(after[key], 0.7 * start + 0.3 * before[key], rtol=1e-5, atol=1e-7)


def test_wise_ft_at_its_ends(make_trainer, make_clip):
    """alpha 0 is the zero-shot model, alpha 1 full fine-tuning."""
    assert_same(fitted(make_trainer(WiSEFTConfig(**QUICK, alpha=0.0))), make_clip().state_dict())
    full = fitted(make_trainer(FullConfig(**QUICK)))
    assert_same(fitted(make_trainer(WiSEFTConfig(**QUICK, alpha=1.0))), full)


# ---- LwF


def test_lwf_has_nothing_to_keep_in_the_first_task(make_trainer):
    lwf = make_trainer(LwFConfig(**QUICK), tasks=1)
    watch(lwf, "extra_loss", lambda ctx, loss: seen.append(loss))
    seen = []
    assert_same(fitted(lwf), fitted(make_trainer(FullConfig(**QUICK), tasks=1)))
    assert seen == [None] * 4


@pytest.mark.parametrize("texts", ["teacher", "student"])
def test_lwf_is_distillation_over_the_classes_of_earlier_tasks(texts, make_trainer, tokenizer):
    """By hand, from a copy of the model before the task; at the first step of a task there is no gradient yet."""
    trainer = make_trainer(LwFConfig(**QUICK, distillation=0.7, temperature=3.0, text_features=texts), tasks=3)
    prompts = [
        "a photo of a reda",
        "a photo of a redb",
        "a photo of a greena",
        "a photo of a greenb",
        "a photo of a greenc",
    ]
    teachers, checked = {}, []
    watch(trainer, "begin_task", lambda ctx, _: teachers.update({ctx.number: copy.deepcopy(ctx.model).eval()}))

    def check(ctx, loss):
        if ctx.number != 3:
            return
        images, teacher, tokens = ctx.step["images"], teachers[3], tokenizer(prompts)
        own = teacher if texts == "teacher" else ctx.model
        scale = ctx.model.logit_scale.exp()
        logits = [
            scale * F.normalize(one.encode_image(images), dim=-1) @ F.normalize(other.encode_text(tokens), dim=-1).t()
            for one, other in ((teacher, teacher), (ctx.model, own))
        ]
        target, log_own = (logits[0] / 3).softmax(dim=1), (logits[1] / 3).log_softmax(dim=1)
        expected = 0.7 * 9 * -(target * log_own).sum(dim=1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        leaves = list(ctx.model.visual.parameters())
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        size = sum(float(g.abs().sum()) for g in gradients if g is not None)
        assert size < 1e-2 if ctx.step["iteration"] == 0 else size > 0.1
        checked.append(size)

    watch(trainer, "extra_loss", check)
    trainer.fit()
    assert len(checked) == 4


def test_lwf_keeps_what_was_said_of_earlier_classes(make_trainer, tokenizer):
    """A large factor: the images' similarities to earlier classes move less."""
    moved = []
    for factor in (0.0, 30.0):
        trainer = make_trainer(LwFConfig(**QUICK | {"iterations": 20}, distillation=factor, text_features="student"))
        tokens, said = tokenizer(["a photo of a reda", "a photo of a redb"]), []

        def says(ctx, _=None, tokens=tokens, said=said):
            with torch.no_grad():
                images = ctx.train.images
                said.append(
                    ctx.model.encode_image(images, normalize=True) @ ctx.model.encode_text(tokens, normalize=True).t()
                )

        watch(trainer, "begin_task", says)
        watch(trainer, "end_task", says)
        trainer.fit()
        moved.append(float(((said[3] - said[2])[:, 0] - (said[3] - said[2])[:, 1]).norm()))
    assert moved[1] < 0.5 * moved[0]


# ---- ZSCL


def test_zscl_needs_reference_data(make_trainer):
    """Told before anything is evaluated."""
    with pytest.raises(
        ValueError, match=r"has no reference data.*--data.reference DIR .*TaskStream\(..., reference=Ref"
    ):
        make_trainer(ZSCLConfig(**QUICK), with_reference=False)


@pytest.mark.parametrize("texts", ["teacher", "student"])
def test_zscl_is_distillation_from_the_base_model_in_both_directions(texts, make_trainer, make_clip, tokenizer):
    """By hand, in the second task too, for each batch of reference images and texts."""
    trainer = make_trainer(ZSCLConfig(**QUICK, distillation=0.5, text_features=texts))
    base, data, drawn, losses = make_clip().eval(), reference(), {"images": [], "texts": []}, []

    def watch_draws(ctx, _):
        method = trainer.method
        method.drawn = {kind: noted(draws, drawn[kind]) for kind, draws in method.drawn.items()}

    def check(ctx, loss):
        method, images, texts_drawn = trainer.method, drawn["images"][-1], drawn["texts"][-1]
        pixels = data.images.images[method.reference.chosen[images]]
        tokens = method.reference.tokens[texts_drawn]
        tokens = F.pad(tokens, (0, 16 - tokens.shape[1]))
        features = {"base": (base.encode_image(pixels), base.encode_text(tokens))}
        features["own"] = (ctx.model.encode_image(pixels), ctx.model.encode_text(tokens))
        image, text = (F.normalize(part, dim=-1) for part in features["base"])
        own_image, own_text = (F.normalize(part, dim=-1) for part in features["own"])
        teacher = base.logit_scale.exp() * image @ text.t()
        student = base.logit_scale.exp() * own_image @ (text if texts == "teacher" else own_text).t()
        expected = 0
        for t, s in ((teacher, student), (teacher.t(), student.t())):
            expected -= 0.5 * 4 * ((t / 2).softmax(dim=1) * (s / 2).log_softmax(dim=1)).sum(dim=1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        losses.append(loss)

    watch(trainer, "begin_task", watch_draws)
    watch(trainer, "extra_loss", check)
    trainer.fit()
    assert len(losses) == 8 and {len(part) for part in drawn["images"]} == {8, 4} and len(drawn["texts"][0]) == 7
    assert len({tuple(part.tolist()) for part in drawn["images"]}) > 4


@pytest.mark.parametrize("texts", ["teacher", "student"])
def test_zscl_holds_the_text_tower_only_by_the_student_s_texts(texts, make_trainer):
    trainer, reached = make_trainer(ZSCLConfig(**QUICK, text_features=texts)), []

    def check(ctx, loss):
        gradient = torch.autograd.grad(loss, ctx.model.text_projection, retain_graph=True, allow_unused=True)[0]
        reached.append(gradient is not None)

    watch(trainer, "extra_loss", check)
    trainer.fit()
    assert set(reached) == {texts == "student"}


def test_zscl_leaves_the_mean_of_the_weights_of_a_task(make_trainer):
    """Every second step and the start, by hand; in the second task the mean starts anew from what the first one left."""
    trainer, path, left = make_trainer(ZSCLConfig(**QUICK, average_every=2)), {1: [], 2: []}, []
    watch(trainer, "begin_task", lambda ctx, _: path[ctx.number].append(plain_state(ctx.model)))
    watch(trainer, "after_step", lambda ctx, _: path[ctx.number].append(plain_state(ctx.model)))
    watch(trainer, "end_task", lambda ctx, _: left.append(plain_state(ctx.model)))
    trainer.fit()
    for number, after in enumerate(left, start=1):
        states = [path[number][i] for i in (0, 2, 4)]
        for key in after:
            mean = torch.stack([state[key] for state in states]).double().mean(dim=0)
            torch.testing.assert_close(after[key].double(), mean, rtol=1e-5, atol=1e-6)
    assert differ(left[0], path[1][-1]) and not differ(left[0], path[2][0])


def test_zscl_without_its_parts_is_full_fine_tuning(make_trainer):
    bare = ZSCLConfig(**QUICK, distillation=0.0, average_every=0)
    assert_same(fitted(make_trainer(bare)), fitted(make_trainer(FullConfig(**QUICK))))


def test_zscl_consolidation_is_the_squared_distance_from_the_previous_weights(make_trainer):
    trainer = make_trainer(ZSCLConfig(**QUICK, distillation=0.0, consolidation=0.25))
    before, losses = {}, []
    watch(trainer, "begin_task", lambda ctx, _: before.update(plain_state(ctx.model)))

    def check(ctx, loss):
        expected = sum(float((value - before[key]).square().sum()) for key, value in ctx.model.state_dict().items())
        losses.append((loss.item(), 0.25 * expected))

    watch(trainer, "extra_loss", check)
    trainer.fit()
    assert all(got == pytest.approx(want, rel=1e-4) for got, want in losses) and losses[-1][0] > 0


def test_zscl_draws_by_seed_and_task_alone():
    def first(*purpose):
        torch.manual_seed(len(drawn))
        drawn.append([part.tolist() for part in itertools.islice(endless(20, 8, *purpose), 5)])
        return drawn[-1]

    drawn = []
    assert first(0, "images", 1) == first(0, "images", 1) != first(0, "images", 2)
    assert first(1, "images", 1) != drawn[0] != first(0, "texts", 1)
    assert sorted(sum(drawn[0][:3], [])) == list(range(20)) and len(drawn[0][3]) == 8


def test_zscl_uses_no_more_reference_data_than_asked_for(make_trainer):
    trainer = make_trainer(ZSCLConfig(**QUICK, references=5))
    trainer.fit()
    assert {kind: len(part) for kind, part in trainer.method.features.items()} == {"images": 5, "texts": 5}


# ---- options


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (FullConfig, {"weight_decay": -1.0}, "weight_decay is -1.0; it must be a finite number >= 0"),
        (FullConfig, {"parameters": "some"}, "parameters is 'some'; accepted: all, matrices"),
        (WiSEFTConfig, {"alpha": 1.5}, r"alpha is 1.5; it must be a finite number in \[0, 1\]"),
        (WiSEFTConfig, {"anchor": "zero"}, "anchor is 'zero'; accepted: zero_shot, previous. Did you mean 'zero_shot'"),
        (LwFConfig, {"distillation": -0.1}, "distillation is -0.1; it must be a finite number >= 0"),
        (LwFConfig, {"temperature": 0.0}, "temperature is 0.0; it must be a finite number > 0"),
        (LwFConfig, {"text_features": "both"}, "text_features is 'both'; accepted: teacher, student"),
        (ZSCLConfig, {"average_every": -1}, "average_every is -1; it must be an integer >= 0"),
        (ZSCLConfig, {"consolidation": float("nan")}, "consolidation is nan"),
        (ZSCLConfig, {"references": 0}, "references is 0; it must be an integer >= 1"),
    ],
)
def test_bad_options(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
