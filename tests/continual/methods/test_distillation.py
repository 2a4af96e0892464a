"""Distillation beside any method with adapters: which images and texts, which teacher, what it holds."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastlora.continual.config import ExpertPoolConfig, InfLoRAConfig, LoRAConfig
from fastlora.continual.stream import InMemoryImages, Reference, TaskStream
from fastlora.continual.trainer import Trainer

QUICK = {"iterations": 4, "batch_size": 8, "lr": 1e-3, "rank": 2}
TEXTS = tuple(f"a {word} one" for word in ("grey", "dim", "odd", "old", "new", "flat", "soft"))


class Forbidden(InMemoryImages):
    """Images that nobody may look at."""

    def __getitem__(self, index):
        raise AssertionError("a reference image was opened")


def reference(kind=InMemoryImages, images=20):
    pixels = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    return Reference(kind(pixels, torch.zeros(images, dtype=torch.long)), TEXTS)


@pytest.fixture
def make_trainer(make_clip, make_task, tokenizer):
    def make(config, data, tasks=2):
        parts = [make_task(colour, 2 + i, shots=4, seed=i) for i, colour in enumerate(("red", "green", "blue")[:tasks])]
        return Trainer(make_clip(), tokenizer, TaskStream("held", parts, reference=data), config, progress=False)

    return make


def watch_losses(trainer, seen):
    """Call `seen(ctx, loss)` on every term of distillation, with the plain models before each task in `before`."""
    before, begin = [], trainer.begin

    def watched_begin(number, task):
        before.append(copy.deepcopy(trainer.model).eval())
        ctx, source = begin(number, task)
        loss = ctx.distillation.loss

        def watched_loss(ctx):
            value = loss(ctx)
            seen(ctx, value)
            return value

        ctx.distillation.loss = watched_loss
        return ctx, source

    trainer.begin = watched_begin
    return before


def noted(items, taken):
    for item in items:
        taken.append(item)
        yield item


@pytest.mark.parametrize("where", ["all", "vision", "text"])
@pytest.mark.parametrize("distil_on", ["task", "reference"])
@pytest.mark.parametrize("teacher", ["previous", "base"])
def test_loss_by_hand(teacher, distil_on, where, make_trainer, make_clip):
    """Every step of two tasks, against both models run in full on the images and texts of the step."""
    config = LoRAConfig(**QUICK, where=where, distillation=0.5, temperature=3.0, teacher=teacher, distil_on=distil_on)
    data, base, checked = reference(), make_clip().eval(), []
    trainer = make_trainer(config, data)

    def check(ctx, loss):
        part = ctx.distillation
        texts = part.reference.tokens[drawn[ctx.number, "texts"][-1]]
        texts = F.pad(texts, (0, 16 - texts.shape[1]))
        pixels = ctx.step["images"]
        if distil_on == "reference":
            pixels = data.images.images[part.reference.chosen[drawn[ctx.number, "images"][-1]]]
        model = base if teacher == "base" else before[ctx.number - 1]
        of = [
            (m.encode_image(pixels, normalize=True), m.encode_text(texts, normalize=True)) for m in (model, ctx.model)
        ]
        teacher_logits, student_logits = (model.logit_scale.exp() * image @ text.t() for image, text in of)
        expected = 0
        for t, s in ((teacher_logits, student_logits), (teacher_logits.t(), student_logits.t())):
            expected -= 0.5 * 9 * ((t / 3).softmax(dim=1) * (s / 3).log_softmax(dim=1)).sum(dim=1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        checked.append(ctx.number)

    before, drawn, begin = watch_losses(trainer, check), {}, trainer.begin

    def watched_begin(number, task):
        ctx, source = begin(number, task)
        for kind, draws in ctx.distillation.draws.items():
            drawn[number, kind] = []
            ctx.distillation.draws[kind] = noted(draws, drawn[number, kind])
        return ctx, source

    trainer.begin = watched_begin
    trainer.fit()
    assert checked == [1] * 4 + [2] * 4
    assert drawn[1, "texts"][0].tolist() != drawn[2, "texts"][0].tolist()
    assert ((1, "images") in drawn) == (distil_on == "reference")


def test_the_images_of_the_task_need_no_others(make_trainer):
    config = InfLoRAConfig(**QUICK, distillation=1.0)
    make_trainer(config, reference(Forbidden)).fit()
    make_trainer(config, Reference(None, TEXTS)).fit()


@pytest.mark.parametrize(
    "distil_on, given, message",
    [
        (
            "task",
            None,
            r"'held' has no reference data.*lora distils on texts of no task.*--data.captions FILE .*None, texts",
        ),
        ("reference", Reference(None, TEXTS), "reference data without images.*distils on images and texts.*--data.ref"),
    ],
)
def test_missing_reference_data_are_told_at_once(distil_on, given, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(LoRAConfig(**QUICK, distillation=1.0, distil_on=distil_on), given)


def test_no_reference_data_are_needed_without_distillation(make_trainer):
    make_trainer(LoRAConfig(**QUICK), None).fit()


@pytest.mark.parametrize("distil_on", ["task", "reference"])
def test_it_holds_what_the_base_model_says(distil_on, make_trainer, make_clip, tokenizer):
    """The similarities of reference images and texts move less with it than without."""
    data, moved = reference(), []
    for factor in (0.0, 20.0):
        config = LoRAConfig(**QUICK | {"iterations": 30}, distillation=factor, distil_on=distil_on, teacher="base")
        trainer = make_trainer(config, data)
        trainer.fit()
        similarities = [
            model.encode_image(data.images.images, normalize=True)
            @ model.encode_text(tokenizer(TEXTS), normalize=True).t()
            for model in (make_clip().eval(), trainer.model.eval())
        ]
        moved.append((similarities[1] - similarities[0]).norm().item())
    assert moved[1] < 0.7 * moved[0]


def test_no_more_reference_data_than_asked_for(make_trainer):
    config = LoRAConfig(**QUICK, distillation=1.0, distil_on="reference", references=3)
    trainer, sizes = make_trainer(config, reference()), set()
    watch_losses(trainer, lambda ctx, _: sizes.add(tuple(len(part) for part in ctx.distillation.features.values())))
    trainer.fit()
    assert sizes == {(3, 3)}


@pytest.mark.parametrize(
    "config, options, message",
    [
        (LoRAConfig, {"distillation": -1.0}, "distillation is -1.0; it must be a finite number >= 0"),
        (LoRAConfig, {"teacher": "best"}, "teacher is 'best'; accepted: previous, base"),
        (LoRAConfig, {"distil_on": "images"}, "distil_on is 'images'; accepted: task, reference"),
        (LoRAConfig, {"temperature": 0.0}, "temperature is 0.0"),
        (LoRAConfig, {"references": 0}, "references is 0"),
        (ExpertPoolConfig, {"teacher": "base"}, "a pool stays beside the weights"),
    ],
)
def test_bad_options(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
