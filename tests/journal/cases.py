"""A small model, what tasks teach it, and the journal of that."""

import torch
from torch import nn

import fastlora
from fastlora.adapter_file import read_adapter

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Net(nn.Module):
    """A packed attention, two linear layers of which one is adapted, and a norm."""

    def __init__(self, width=8, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.attn = nn.MultiheadAttention(width, 2)
        self.fc, self.norm, self.head = nn.Linear(width, 12), nn.LayerNorm(width), nn.Linear(12, 3)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.fc(self.norm(x + self.attn(x, x, x)[0])))


def learn(model, task):
    """Adapters as after training on a task: about half of the gates live."""
    fastlora.inject(model, rank=6, where=["attn", "fc"], kappa=0.6, scaling=0.7)
    generator = torch.Generator().manual_seed(task)
    for _, adapter in fastlora.adapters(model):
        adapter.reset_adapter_(generator)
        adapter.lora_b.data.normal_(generator=generator)
    return model


def settle(model):
    fastlora.merge(model)
    return fastlora.remove(model)


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def write_tasks(directory, dtype=torch.float32, count=3, **options):
    """The journal of a model that learned `count` tasks, and its states: 0 is the base."""
    model, journal = Net(dtype=dtype, **options), fastlora.Journal(directory)
    states = [state(model)]
    for task in range(1, count + 1):
        journal.append(learn(model, task), f"name {task}")
        states.append(state(settle(model)))
    return journal, states


def rewrite(path, model):
    """A file with a right checksum, written by something else than a journal."""
    header = read_adapter(path).header
    fastlora.save_adapter(model, path, {key: header[key] for key in ("task", "task_name", "base", "merge")})


def not_finite(path):
    model = learn(Net(), 2)
    model.attn.k.lora_a.data[0, 0] = float("nan")
    rewrite(path, model)
