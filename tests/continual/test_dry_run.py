import dataclasses

import pytest

import fastlora
from fastlora.continual import CoDyRAConfig, LoRAConfig, Task, TaskStream, Trainer, ZeroShotConfig, methods
from fastlora.continual.config import DataConfig, RunConfig
from fastlora.continual.dry_run import make_plan, plan_text
from fastlora.continual.stream import Reference

KEPT = ("checkpoints", "adapters")


class Counted:
    """A task's images, counted when they are looked at."""

    def __init__(self, data):
        self.data, self.seen = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.seen += 1
        return self.data[index]


@pytest.mark.parametrize(
    "config", [CoDyRAConfig(rank=3), LoRAConfig(rank=2, where="text", targets=("v",))], ids=["codyra", "lora"]
)
def test_sizes_are_those_of_the_run(make_clip, tokenizer, make_stream, tmp_path, config):
    """Trained with a gate that never dies, so that the adapters on disk are at full rank."""
    config = dataclasses.replace(
        config, iterations=5, batch_size=16, **({"kappa_max": 0.0} if config.rank == 3 else {})
    )
    plan = Trainer(make_clip(), tokenizer, make_stream(), config, progress=False).plan()
    seen = {}

    def watch(ctx):
        seen[ctx.number] = seen.get(ctx.number, 0) + len(ctx.step["images"])
        seen["optimizer"] = sum(
            value.numel() * value.element_size()
            for state in ctx.optimizer.state.values()
            for key, value in state.items()
            if key != "step"
        )

    model = make_clip()
    trainer = Trainer(model, tokenizer, make_stream(), config, out=tmp_path / "run", progress=False)
    trainer.method.after_step = watch
    trainer.fit()
    assert [task.images_seen for task in plan.tasks] == [seen[1], seen[2], seen[3]]
    assert [task.train_images for task in plan.tasks] == [24, 32, 16] and plan.held_out_images == 25
    assert plan.needs.optimizer == seen["optimizer"] and plan.needs.trained == plan.needs.optimizer // 2
    sizes = {folder: (tmp_path / "run" / folder / "task_03.safetensors").stat().st_size for folder in KEPT}
    assert plan.checkpoints <= sizes["checkpoints"] < plan.checkpoints + 10_000
    assert plan.needs.adapter_file <= sizes["adapters"] < plan.needs.adapter_file + 20_000
    assert plan.weights == sum(value.numel() * value.element_size() for value in model.state_dict().values())


def test_parameters_and_modules_of_codyra(make_clip, tokenizer, make_stream):
    trainer = Trainer(make_clip(), tokenizer, make_stream(), CoDyRAConfig(rank=3), progress=False)
    plan = trainer.plan()
    assert plan.needs.adapters == {"vision": 6, "text": 6}
    model = make_clip()
    fastlora.inject(model, rank=3)
    assert plan.needs.parameters == sum(p.numel() for p in fastlora.adapter_parameters(model))
    assert not list(fastlora.adapters(trainer.model))  # the plain model again
    text = plan_text(plan)
    assert f"Trainable parameters: {plan.needs.parameters:,}. Adapters: 6 in vision, 6 in text." in text
    assert "Evaluation: 4 times, 280 images in all" in text  # 15 + 20 + 10 + 25 held-out


def test_the_teacher_of_distillation_is_a_model_more(make_clip, tokenizer, make_stream, make_task):
    stream = TaskStream("held", [make_task("red", 3)], reference=Reference(None, ("a dog", "two birds")))
    plan = make_plan(Trainer(make_clip(), tokenizer, stream, LoRAConfig(rank=2, distillation=1.0), progress=False))
    assert plan.needs.teacher == plan.weights > 0 and "teacher of distillation" in plan_text(plan)
    plan = make_plan(Trainer(make_clip(), tokenizer, make_stream(), LoRAConfig(rank=2), progress=False))
    assert plan.needs.teacher == 0 and "teacher" not in plan_text(plan)


def test_without_training(make_clip, tokenizer, make_stream):
    text = plan_text(Trainer(make_clip(), tokenizer, make_stream(), ZeroShotConfig(), progress=False).plan())
    assert "Trainable" not in text and "commit point  0.00" in text and "checkpoints   0.00" in text


def test_joint_training_sees_everything_with_the_first_task(make_clip, tokenizer, make_stream, monkeypatch):
    class JointConfig(LoRAConfig):
        name = "joint"

    class Joint(methods.LoRA):
        config_class, joint, journaled = JointConfig, True, False

    monkeypatch.setitem(methods.METHODS, "joint", Joint)
    config = JointConfig(rank=1, iterations=5, batch_size=16)
    plan = make_plan(Trainer(make_clip(), tokenizer, make_stream(), config, progress=False))
    first, *others = plan.tasks
    assert (first.train_images, first.iterations) == (72, 15) and first.images_seen == (24 * 2 + 16) + 16 * 5 + 16 * 5
    assert all((task.train_images, task.iterations, task.images_seen) == (0, 0, 0) for task in others)
    assert plan.state_file == plan.weights


def test_one_batch_is_looked_at_and_shared_names_are_told(make_clip, tokenizer, make_task):
    red, blue = make_task("red", 3), make_task("blue", 2)
    images = Counted(red.train)
    tasks = [dataclasses.replace(red, train=images), Task("blue", ("reda", "b"), ("{}",), blue.train, blue.test)]
    stream = TaskStream("shared", tasks)
    plan = Trainer(make_clip(), tokenizer, stream, LoRAConfig(rank=1, batch_size=8), progress=False).plan()
    assert images.seen == 8
    assert "Class names that tasks share: reda (red, blue)." in plan_text(plan)


class OnDisk(Counted):
    """Images that take 100 bytes each in data.cache_dir."""

    disk_bytes = 100


@pytest.mark.parametrize("crops", [False, True])
def test_the_cache_on_disk_is_in_the_plan(make_clip, tokenizer, make_stream, crops):
    tasks = [dataclasses.replace(task, train=task.test) for task in make_stream().tasks]
    first = dataclasses.replace(tasks[0], test=OnDisk(tasks[0].test))  # the others are in memory
    reference = Reference(OnDisk(tasks[1].test), ("a photo",))
    stream = TaskStream("one", [first, *tasks[1:]], reference=reference)
    config = RunConfig(method=LoRAConfig(rank=1, iterations=2, batch_size=4), data=DataConfig(cache_crops=crops))
    plan = Trainer(make_clip(), tokenizer, stream, config=config, progress=False).plan()
    assert plan.cached_tests == 100 * (len(tasks[0].test) + len(tasks[1].test))
    assert plan.cached_crops == (100 * 8 * len(tasks) if crops else 0)
    assert "in data.cache_dir: test and reference images" in plan_text(plan)
    assert ("in data.cache_dir: training crops, at most" in plan_text(plan)) == crops


def test_without_a_cache_on_disk_none_is_planned(make_clip, tokenizer, make_stream):
    config = RunConfig(method=LoRAConfig(rank=1), data=DataConfig(cache_crops=True))
    plan = Trainer(make_clip(), tokenizer, make_stream(), config=config, progress=False).plan()
    assert plan.cached_tests == plan.cached_crops == 0 and "cache" not in plan_text(plan)
