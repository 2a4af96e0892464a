"""Runs of transformers' Trainer with CoDyRA's optimizer and callback, of a tiny language model."""

from __future__ import annotations

import torch
from interop.tiny import language_model, token_ids, transformers

import fastlora
from fastlora.interop.hf_trainer import KappaCallback, prox_adamw

STEPS = 10
RAMP = {"steps": 4, "dense": 0.4}


class Recorder(transformers.TrainerCallback):
    """Gates and kappa after every optimizer step."""

    def __init__(self):
        self.gates, self.kappas = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gates.append(gates_of(model))
        self.kappas.append(optimizer.optimizer.kappa)


def gates_of(model):
    return torch.cat([adapter.gate.detach().clone() for _, adapter in fastlora.adapters(model)])


def injected():
    model = language_model()
    fastlora.inject(model, rank=4, where=["*.q_proj", "*.v_proj", "*.down_proj"])
    return model


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 0.02,
        "adam_beta2": 0.9999, "lr_scheduler_type": "cosine", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "train_sampling_strategy": "sequential", "logging_steps": 1000,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **options})


def examples(count=64):
    """Rows of different lengths, padded; what is padded has no label."""
    rows = []
    for number, ids in enumerate(token_ids(count, 9)):
        labels = ids.clone()
        labels[: number % 4] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def train(folder, model=None, callback=None, resume=None, **options):
    model, recorder = model or injected(), Recorder()
    args = arguments(folder, **options)
    trainer = transformers.Trainer(
        model, args, train_dataset=examples(), optimizers=(prox_adamw(model, args), None),
        callbacks=[callback or KappaCallback(0.65, **RAMP), recorder],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return model, recorder


def in_one_of_several(rank, folder):
    """The same run under DistributedDataParallel, which the Trainer starts where the environment tells of others."""
    model, recorder = train(folder / str(rank), per_device_train_batch_size=1, ddp_backend="gloo")
    return recorder.gates, {key: value.detach().clone() for key, value in model.state_dict().items()}
