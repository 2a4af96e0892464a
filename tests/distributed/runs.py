"""What several processes do together, and what one process does alone to compare it with."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal

import torch
from continual.conftest import tiny_clip, tiny_task, tokenize
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Subset

import fastlora
from fastlora.continual import CoDyRAConfig, LoRAConfig, Trainer
from fastlora.continual.config import (
    ExpertPoolConfig,
    InfLoRAConfig,
    JointConfig,
    LwFConfig,
    PathCreditConfig,
    SDLoRAConfig,
    SoRAConfig,
    ZSCLConfig,
)
from fastlora.continual.demo import demo_stream
from fastlora.continual.distributed import join
from fastlora.continual.step import training_step
from fastlora.continual.stream import InMemoryImages, Reference, TaskStream

# 24 and 32 images in batches of 7: the fourth has 3, the fifth 4, so that of 4 processes one has none
QUICK = {"iterations": 4, "batch_size": 7, "lr": 1e-2}
CODYRA = CoDyRAConfig(rank=4, kappa_max=0.3, **QUICK | {"iterations": 6})
# what a loss or a hook may look at: adapters, all images of the step, a teacher's features of them, reference data, inputs
METHODS = {
    "penalty": (SoRAConfig(rank=2, penalty=0.1, **QUICK), {}),
    "teacher of the batch": (LwFConfig(**QUICK | {"lr": 1e-3}), {}),
    "distillation": (LoRAConfig(rank=2, distillation=1.0, **QUICK), {}),
    "distillation in parts": (LoRAConfig(rank=2, distillation=1.0, **QUICK), {"accumulate": 2}),
    "reference images": (ZSCLConfig(average_every=2, **QUICK | {"lr": 1e-3}), {}),
    "inputs of layers": (InfLoRAConfig(rank=2, **QUICK), {}),
    "gradient hooks": (SDLoRAConfig(rank=2, **QUICK), {}),
    "credits": (PathCreditConfig(rank=2, **QUICK), {}),
    "several sources": (JointConfig(rank=2, **QUICK), {}),
    "a pool": (ExpertPoolConfig(rank=2, **QUICK), {}),
    "text alone": (LoRAConfig(rank=2, where="text", **QUICK), {"accumulate": 3}),
    "images alone": (LoRAConfig(rank=2, where="vision", clip_norm=0.1, **QUICK), {"accumulate": 64}),
}


def make_trainer(method=CODYRA, out=None, tasks=2, layers=1, custom_text=False, **options):
    parts = [tiny_task(name, classes, seed=classes) for name, classes in (("red", 3), ("green", 4), ("blue", 2))]
    texts = tuple(f"a {word} picture" for word in ("grey", "dim", "odd", "old", "new"))
    pixels = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    reference = Reference(InMemoryImages(pixels, torch.zeros(9).long()), texts)
    stream = TaskStream("tiny", parts[:tasks], held_out=tiny_task("grey", 5, seed=4), reference=reference)
    options = {"seed": 1, "progress": False, "log_every": 1, "device": "cpu"} | options
    return Trainer(tiny_clip(custom_text, layers), tokenize, stream, method, out=out, **options)


def train(rank, method=CODYRA, out=None, options=None):
    """Record, weights, what the method keeps; of each task the adapters before they are merged; losses as they were."""
    trainer = make_trainer(method, out, **options or {})
    adapters, losses, end_task = [], [], trainer.method.end_task

    def watched(ctx):
        adapters.append(adapters_of(ctx.model))
        return end_task(ctx)

    trainer.method.end_task = watched
    append_log = trainer._keeper.append_log
    trainer._keeper.append_log = lambda row: (losses.append(row[2]), append_log(row))
    record = trainer.fit()
    return {
        "record": (record.own, record.union, record.held_out),
        "ranks": [(entry.module, entry.active_rank) for entry in record.ranks],
        "weights": {key: value.clone() for key, value in trainer.model.state_dict().items()},
        "kept": {key: value.clone() for key, value in trainer.method.state_dict().items()},
        "adapters": adapters,
        "losses": losses,
    }


def adapters_of(model):
    return {
        f"{name}.{part}": getattr(adapter, part).detach().clone()
        for name, adapter in fastlora.adapters(model)
        for part in ("lora_a", "lora_b", "gate")
    }


def train_all(rank, options=None):
    """Name -> what `train` gives, of every method."""
    return {name: train(rank, method, None, own | (options or {})) for name, (method, own) in METHODS.items()}


def relative(found, expected):
    """||found - expected|| / ||expected|| over the tensors of two mappings."""
    assert found.keys() == expected.keys()
    assert all(found[key].shape == value.shape for key, value in expected.items())
    total = sum(float((found[key].double() - value.double()).square().sum()) for key, value in expected.items())
    size = sum(float(value.double().square().sum()) for value in expected.values())
    return (total / size) ** 0.5 if size else total


def assert_same_bits(runs):
    """In every process: the record, the weights, the adapters with their gates, the losses."""
    first, *others = runs
    for other in others:
        assert other["record"] == first["record"] and other["losses"] == first["losses"]
        for key in ("weights", "kept"):
            assert all(torch.equal(other[key][name], value) for name, value in first[key].items())
        for one, two in zip(first["adapters"], other["adapters"], strict=True):
            assert one.keys() == two.keys() and all(torch.equal(two[name], value) for name, value in one.items())


def assert_same_run(found, expected):
    """But for rounding in float32: the accuracy matrix and the ranks are equal; adapters, losses and weights close."""
    assert found["record"] == expected["record"] and found["ranks"] == expected["ranks"]
    for one, two in zip(found["adapters"], expected["adapters"], strict=True):
        if two:
            assert relative(one, two) < 3e-5
    losses = list(zip(found["losses"], expected["losses"], strict=True))
    assert max((abs(one - two) / two for one, two in losses), default=0) < 1e-5


def talk(rank):
    """Everything that a world says, with 5 rows for 3 processes and with 2; raises where it is wrong."""
    world = join("cpu")
    assert (world.rank, world.size, world.first, world.local_rank) == (rank, 3, rank == 0, rank)
    everything = torch.arange(10.0).view(5, 2)
    rows = everything[world.part(5)].clone().requires_grad_()
    gathered = world.gather(rows, 5)
    assert torch.equal(gathered, everything)
    # two parameters: one that every process uses alike, one by way of its own rows
    common, own = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    few = world.gather(own * everything[world.part(2)], 2)
    assert torch.equal(few, 2 * everything[:2])
    loss = (gathered * gathered).sum() + common * common + (few * few).sum()
    loss.backward()
    assert torch.equal(rows.grad / world.size, 2 * everything[world.part(5)])
    world.average_gradients([common, own, torch.zeros(3)])
    assert float(common.grad) == 6 and float(own.grad) == float(4 * (everything[:2] ** 2).sum())

    assert torch.equal(world.gather(torch.tensor([7 + rank]), 3), torch.tensor([7, 8, 9]))
    assert torch.equal(world.sum(torch.tensor([rank, 1])), torch.tensor([3, 3]))
    assert world.from_first(lambda: {"told by": rank}) == {"told by": 0}
    values = torch.full((2, 3), float(rank)).t()  # not contiguous
    world.broadcast_([values])
    assert torch.equal(values, torch.zeros(3, 2))
    shares = [world.share(total) for total in (0, 1, 2, 7)]
    return shares, [world.part(total) for total in (1, 2, 7)]


def disagree(rank):
    """The messages of the checks that the processes compute the same."""
    world, messages = join("cpu"), []
    swapped = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 3.0])]
    checks = [
        lambda: world.check_equal([torch.zeros(2), swapped[rank == 1]], "the gates"),
        lambda: world.check_equal([torch.tensor([0.0 if rank < 2 else -0.0])], "the signs"),
        lambda: world.check_equal([torch.zeros(2 + (rank > 0))], "the ranks"),
        lambda: world.check_same({"rank": 0}, "nothing"),
        lambda: world.from_first(_full_disk),
    ]
    for check in checks:
        try:
            check()
            messages.append("")
        except (RuntimeError, OSError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def _full_disk():
    raise OSError("the disk is full")


def train_sharded(rank):
    """The run of CODYRA with whole and with sharded weights; name -> the pair, for ways of carrying out a step."""
    held = LoRAConfig(rank=2, distillation=1.0, **QUICK)
    ways = {
        "plain": (CODYRA, {}),
        "again in backward": (CODYRA, {"activation_checkpointing": True, "accumulate": 3}),
        "bfloat16": (CODYRA, {"dtype": "bfloat16"}),
        "a teacher": (held, {"custom_text": True}),
    }
    return {
        name: [train(rank, method, None, options | {"parallel": way, "layers": 2}) for way in ("ddp", "fsdp")]
        for name, (method, options) in ways.items()
    }


def look_at_shards(rank):
    """Elements of frozen weights that a process holds while a task trains and after it was stopped, and their bits."""
    trainer = make_trainer(parallel="fsdp")
    start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    towers = trainer.model.transformer, trainer.model.visual.transformer
    seen = {"whole": sum(p.numel() for tower in towers for p in tower.parameters())}

    def frozen(towers):
        kept = {id(parameter) for parameter in fastlora.adapter_parameters(trainer.model)}
        return [p for tower in towers for p in tower.parameters() if id(p) not in kept]

    def stop(ctx):
        shards = frozen((ctx.model.transformer, ctx.model.visual.transformer))
        seen["held"] = sum(shard.to_local().numel() for shard in shards)
        seen["held beside"] = sum(weight.numel() for weight in frozen(towers))
        seen["adapters"] = {type(parameter) for parameter in fastlora.adapter_parameters(ctx.model)}
        raise KeyboardInterrupt

    trainer.method.after_step = stop
    try:
        trainer.fit()
    except KeyboardInterrupt:
        pass
    after = trainer.model.state_dict()
    seen["same"] = list(after) == list(start) and all(torch.equal(after[key], value) for key, value in start.items())
    return seen


def train_demo(rank):
    """Two tasks of the embedded benchmark, one shot a class, a few test images."""
    demo, whole = fastlora.open_clip_demo(), demo_stream(seed=0, shots=1)
    parts = [
        dataclasses.replace(
            whole.tasks[i], train=whole.open_task(i), test=Subset(whole.tasks[i].test, range(0, 180, 4))
        )
        for i in (1, 2)
    ]
    config = CoDyRAConfig(rank=4, iterations=4, batch_size=9, kappa_max=0.3)
    trainer = Trainer(demo.model, demo.tokenizer, TaskStream("two", parts), config, progress=False, device="cpu")
    adapters, end_task = [], trainer.method.end_task
    trainer.method.end_task = lambda ctx: (adapters.append(adapters_of(ctx.model)), end_task(ctx))[1]
    record = trainer.fit()
    return {"record": (record.own, record.union), "adapters": adapters}


def stop_in_task(number, how, ranks, trainer):
    """In these processes `how` is called before the third step of task `number` is taken."""
    hook = trainer.method.after_step

    def after_step(ctx):
        if ctx.number == number and ctx.step["iteration"] == 1 and trainer.world.rank in ranks:
            how()
        hook(ctx)

    trainer.method.after_step = after_step


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("a broken image")


def train_and_stop(rank, out, how, ranks, method=CODYRA):
    """What was raised, in words; nothing where this process was killed."""
    trainer = make_trainer(method, out)
    stop_in_task(2, how, ranks, trainer)
    try:
        trainer.fit()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing stopped it")


def resume(rank, out, method=CODYRA):
    return train(rank, method, out, {"resume": True})


def count_a_step(rank, way):
    """Bytes of the collectives of a step with 7 images and 3 classes, and the sizes that they follow from."""
    import many_processes

    trainer, counted = make_trainer(parallel=way, layers=2), {}
    ctx, source = trainer.begin(1, trainer.stream.tasks[0])
    batch = source.batch(0)
    parameters = sum(parameter.numel() for parameter in fastlora.adapter_parameters(ctx.model))
    sizes = many_processes.counts_of(ctx.model, parameters)
    with training_step(trainer.method, ctx, trainer.config) as step, many_processes.counting(counted):
        step(0, batch)
    return counted, sizes


def know_tiny():
    """The benchmark of seconds for the command line, and no plots."""
    from cli.tiny import tiny

    from fastlora.continual import benchmarks, report

    benchmarks.BENCHMARKS["tiny"] = benchmarks.Benchmark(tiny, presets={"codyra": {"kappa_max": 0.4}})
    report.write_report = lambda path: None


def command(rank, arguments):
    """A command of `fastlora`: (exit code, stdout, stderr)."""
    from fastlora import cli

    know_tiny()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


def adapted_clip(dtype=torch.float32, scale=1.0):
    """Two blocks a tower, whose 12 matrices have updates of rank 3, one of which is dead."""
    model = tiny_clip(layers=2).to(dtype)
    fastlora.inject(model, 3, kappa=0.1)
    generator = torch.Generator().manual_seed(5)
    for _, adapter in fastlora.adapters(model):
        adapter.lora_b.data = scale * torch.randn(adapter.lora_b.shape, generator=generator)
        adapter.gate.data = torch.tensor([0.8, 0.05, -1.2])
    return model


def shard(model, whole_adapters=True):
    """The first block of each tower by itself, the second one with its tower, whose weights stay gathered after a run."""
    ignored = set(fastlora.adapter_parameters(model)) if whole_adapters else None
    mesh = init_device_mesh("cpu", (join("cpu").size,))
    for tower in (model.transformer, model.visual.transformer):
        for module in (tower.resblocks[0], tower):
            fully_shard(module, mesh=mesh, ignored_params=ignored)


def full_state(model):
    """Every entry of the state_dict, gathered."""
    state = model.state_dict()
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def merge_everywhere(rank, dtype, whole_adapters):
    """merge, and unmerge of the same with residuals, of a sharded model."""
    torch.manual_seed(rank)
    join("cpu")
    model = adapted_clip(dtype)
    shard(model, whole_adapters)
    model.encode_image(torch.zeros(1, 3, 16, 16, dtype=dtype))
    assert not isinstance(model.visual.transformer.resblocks[1].attn.in_proj_weight, DTensor)
    report = fastlora.merge(model)
    merged = full_state(model)
    model = adapted_clip(dtype)
    shard(model, whole_adapters)
    merge_and_unmerge(model)
    return list(report), merged, full_state(model)


def merge_and_unmerge(model):
    """By residuals; the weights are then as they were where no element moved far above its own size."""
    adapters, residuals = full_state(model), {}
    fastlora.merge(model, residuals=residuals)
    with torch.no_grad():
        for name, adapter in fastlora.adapters(model):
            adapter._set(*(adapters[f"{name}.{part}"].clone() for part in ("lora_a", "lora_b", "gate")))
    fastlora.unmerge(model, residuals=residuals)


def refuse_to_merge(rank):
    """The messages of merges that must not happen, and whether a weight changed."""
    join("cpu")
    messages = []
    for break_, options in (
        (lambda model: model.transformer.resblocks[0].mlp.c_fc.lora_b.data.__setitem__((0, 1), float("nan")), {}),
        (lambda model: model.transformer.resblocks[1].attn.k.gate.data.__setitem__(0, float("inf")), {}),
        (lambda model: model.transformer.resblocks[1].attn.k.lora_b.data.__setitem__((31, 0), 1e9), {}),
        (lambda model: None, {"rounding": "stochastic"}),
    ):
        model = adapted_clip(torch.float16)
        break_(model)
        shard(model)
        before = full_state(model)
        try:
            fastlora.merge(model, **options)
            messages.append("")
        except (RuntimeError, ValueError) as error:
            after = full_state(model)
            weights = [key for key in before if not key.endswith(("lora_a", "lora_b", "gate"))]
            assert all(torch.equal(before[key], after[key]) for key in weights)
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def train_by_hand(rank, whole_adapters):
    """Three steps over the same images in every process, and the merge; None: without FSDP, in one process."""
    model = adapted_clip()
    if whole_adapters is not None:
        join("cpu")
        shard(model, whole_adapters)
    optimizer = fastlora.optim.ProxAdamW(model, lr=1e-2)
    for step in range(3):
        step_by_hand(model, optimizer, seed=3, kappa=0.02 * step)
    state = full_state(model)
    gates = {key: value.clone() for key, value in state.items() if key.endswith("gate")}
    fastlora.merge(model)
    state = full_state(model)
    weights = {key: value for key, value in state.items() if not key.endswith(("lora_a", "lora_b", "gate"))}
    return {"gates": gates, "weights": weights}


def step_by_hand(model, optimizer, seed, kappa):
    """Over the same images in every process."""
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    loss = (model.encode_image(images) @ model.encode_text(tokenize(["a b", "c d e", "f"])).t()).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.kappa = kappa
    optimizer.step()


def prune_sharded(rank):
    join("cpu")
    model = adapted_clip()
    shard(model, whole_adapters=False)
    try:
        fastlora.prune(model)
    except ValueError as error:
        return str(error)
    return ""
