"""The Trainer of transformers with CoDyRA's optimizer, step by step against a plain loop with the same optimizer."""

import pytest
import torch
from distributed.processes import in_processes
from helpers import relative_error
from interop.hf_runs import (
    RAMP,
    STEPS,
    arguments,
    examples,
    gates_of,
    in_one_of_several,
    injected,
    train,
)
from interop.tiny import language_model, token_ids, transformers

pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'fastlora[dev]')")

import fastlora
from fastlora.interop.hf_trainer import KappaCallback, prox_adamw
from fastlora.optim import KappaSchedule, ProxAdamW


def plain_loop(model, accumulation=1, weight_decay=0.0, clip=0.0, bf16=False):
    """The same with nothing of accelerate, of the Trainer, or of fastlora.interop; the gates after every step."""
    gates = [adapter.gate for _, adapter in fastlora.adapters(model)]
    matrices = [p for _, a in fastlora.adapters(model) for p in (a.lora_a, a.lora_b)]
    optimizer = ProxAdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": gates, "prox": True, "weight_decay": 0.0}], 0.02
    )
    schedule = KappaSchedule.for_shrink(0.65, total=STEPS, **RAMP)
    rate = transformers.get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    rows, seen = examples(), []
    batches = [{key: torch.stack([row[key] for row in rows[i : i + 2]]) for key in rows[0]} for i in range(0, 64, 2)]
    batches = batches * 2  # the Trainer's next epochs
    for step in range(STEPS):
        parts = batches[step * accumulation : (step + 1) * accumulation]
        predicted = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(part["input_ids"]).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="sum"
            )
            (losses / predicted).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(fastlora.adapter_parameters(model), clip)
        optimizer.kappa = schedule.kappa(step)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        seen.append(gates_of(model))
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulation": 3}, {"bf16": True}, {"weight_decay": 0.5}, {"clip": 0.05, "accumulation": 2}],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_gates_are_those_of_a_plain_loop_at_every_step(options, tmp_path):
    names = {"accumulation": "gradient_accumulation_steps", "clip": "max_grad_norm"}
    _, recorder = train(tmp_path, **{names.get(key, key): value for key, value in options.items()})
    expected = plain_loop(injected(), **options)
    assert len(recorder.gates) == len(expected) == STEPS
    # bit for bit on one machine; a sum in another order is all that may differ
    errors = [relative_error(ours, theirs) for ours, theirs in zip(recorder.gates, expected)]
    assert max(errors) < 1e-6, errors
    dead = [int((gates == 0).sum()) for gates in recorder.gates]
    assert dead[3] == 0 and 0 < dead[-1] < len(expected[0]), dead
    assert [bool((a == 0).ne(b == 0).any()) for a, b in zip(recorder.gates, expected)] == [False] * STEPS


def test_two_processes_are_one_with_the_batch_of_both(tmp_path):
    """Under DistributedDataParallel, which averages the gradients and knows nothing of gates; ranks die alike."""
    model, recorder = train(tmp_path)
    found = in_processes(2, in_one_of_several, tmp_path)
    for gates, state in found:
        errors = [relative_error(ours, theirs) for ours, theirs in zip(gates, recorder.gates, strict=True)]
        assert max(errors) < 1e-5, errors
        assert all(torch.equal(ours == 0, theirs == 0) for ours, theirs in zip(gates, recorder.gates))
        assert all(relative_error(state[key], value) < 1e-4 for key, value in model.state_dict().items())
        assert all(torch.equal(state[key], value) for key, value in found[0][1].items())


def test_kappa_follows_the_schedule_over_the_steps_of_the_run(tmp_path):
    callback = KappaCallback(kappa_max=0.05, **RAMP)
    _, recorder = train(tmp_path, callback=callback, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=3)
    assert callback.schedule == KappaSchedule(0.05, total=11, **RAMP)  # 64 rows, 2 a batch, 3 batches a step
    assert recorder.kappas == [callback.schedule.kappa(step) for step in range(11)]
    assert recorder.kappas[:5] == [0.0] * 5 and recorder.kappas[-1] == pytest.approx(0.05)


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_left_alone(tmp_path):
    whole, recorder = train(tmp_path / "whole", save_strategy="steps", save_steps=7, gradient_accumulation_steps=2)
    other = injected()
    for parameter in fastlora.adapter_parameters(other):
        parameter.data.normal_()
    checkpoint = str(tmp_path / "whole" / "checkpoint-7")
    resumed, rest = train(tmp_path / "rest", model=other, resume=checkpoint, gradient_accumulation_steps=2)
    assert len(rest.gates) == 3 and rest.kappas == recorder.kappas[7:] and rest.kappas[0] > 0
    assert all(torch.equal(one, two) for one, two in zip(rest.gates, recorder.gates[7:]))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))


def test_a_step_that_the_float16_scaler_skips_shrinks_no_gate(tmp_path):
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    model, callback = injected(), KappaCallback(kappa_max=0.05, **RAMP)
    optimizer = prox_adamw(model, arguments(tmp_path))
    Accelerator(cpu=True)  # makes the state that the wrapper looks at
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
    state = transformers.TrainerState(max_steps=STEPS, global_step=STEPS - 1)
    callback.on_train_begin(None, state, None, optimizer=optimizer)
    before = gates_of(model)
    for overflow in (True, False):
        scaler.scale(model(token_ids(), labels=token_ids()).loss).backward()
        if overflow:
            next(fastlora.adapter_parameters(model)).grad[0, 0] = float("inf")
        callback.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == overflow and optimizer.optimizer.kappa == pytest.approx(0.05)
        # lora_b was 0, so the gates had no gradient, and all that moves them is the proximal step
        expected = before if overflow else torch.sign(before) * (before.abs() - 0.05).clamp(min=0)
        torch.testing.assert_close(gates_of(model), expected, atol=1e-7, rtol=0)


def test_what_else_trains_has_its_groups_and_gates_no_decay(tmp_path):
    model = transformers.LlamaForSequenceClassification(language_model().config)
    fastlora.inject(model, rank=4, where=["model.*.q_proj", "model.*.v_proj"])
    head, norm = model.score.requires_grad_(True), model.model.norm.requires_grad_(True)
    args = arguments(tmp_path, weight_decay=0.1, adam_epsilon=1e-6, adam_beta1=0.8, learning_rate=3e-4)
    matrices, vectors, gates = prox_adamw(model, args, operator="released").param_groups
    adapters = [adapter for _, adapter in fastlora.adapters(model)]
    directions = [p for adapter in adapters for p in (adapter.lora_a, adapter.lora_b)]
    assert {*map(id, matrices["params"])} == {*map(id, [*directions, head.weight])} and matrices["weight_decay"] == 0.1
    assert vectors["params"] == [norm.weight] and vectors["weight_decay"] == 0.0 and not vectors["prox"]
    assert [*map(id, gates["params"])] == [id(a.gate) for a in adapters]
    assert gates["prox"] and gates["weight_decay"] == gates["kappa"] == 0.0
    assert all((g["lr"], g["betas"], g["eps"]) == (3e-4, (0.8, 0.9999), 1e-6) for g in (matrices, vectors, gates))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_after_training_dead_ranks_go_and_the_merged_model_computes_the_same(tmp_path):
    model, _ = train(tmp_path, gradient_checkpointing=True)
    trained, kept = model.eval()(token_ids()).logits, int((gates_of(model) != 0).sum())
    assert sum(fastlora.prune(model).values()) == kept < 24
    fastlora.merge(model)
    assert relative_error(fastlora.remove(model)(token_ids()).logits, trained) < 2e-6


def test_wrong_use_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no trainable adapter; call fastlora\.inject"):
        prox_adamw(language_model(), arguments(tmp_path))
    with pytest.raises(ValueError, match="total_shrink=0.5 and kappa_max=0.1 were given"):
        KappaCallback(0.5, kappa_max=0.1)
    with pytest.raises(ValueError, match="kappa is -1"):
        KappaCallback(kappa_max=-1.0)
    trainer = transformers.Trainer(
        injected(), arguments(tmp_path), train_dataset=examples(), callbacks=[KappaCallback(**RAMP)]
    )
    with pytest.raises(ValueError, match=r"optimizer is AdamW, which takes no proximal step; pass optimizers=\(prox_"):
        trainer.train()
    with pytest.raises(ValueError, match="leaves none for the proximal step; lower dense"):
        train(tmp_path, max_steps=1)
