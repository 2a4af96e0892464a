"""The released CoDyRA algorithm in plain PyTorch, op for op: its own layers, its own loop, nothing of fastlora's.

What differs from the fast path on purpose, because the published code does it so: q, k and v are separate products; the
update is x A^T, times the gate, times B^T, added; the whole context is encoded, of seen classes too; seen columns are set
to -inf; the proximal step is a loop over gates with boolean masks; the merge adds (B * w) A.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class TwinLinear(nn.Module):
    def __init__(self, weight, bias, rank, generator):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.gate = nn.Parameter(torch.empty(1, rank).normal_(generator=generator))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + (x @ self.lora_A.t()).mul(self.gate) @ self.lora_B.t()

    @torch.no_grad()
    def merge(self):
        self.weight += (self.lora_B * self.gate) @ self.lora_A


class TwinAttention(nn.Module):
    def __init__(self, plain, rank, generator):
        super().__init__()
        self.heads = plain.num_heads
        self.returns_weights = isinstance(plain, nn.MultiheadAttention)  # open_clip 4 has an attention of its own
        weights, biases = plain.in_proj_weight.detach().chunk(3), plain.in_proj_bias.detach().chunk(3)
        self.q, self.k, self.v = (TwinLinear(w, b, rank, generator) for w, b in zip(weights, biases))
        self.out = TwinLinear(plain.out_proj.weight.detach(), plain.out_proj.bias.detach(), rank, generator)

    def forward(self, q_x, k_x, v_x, need_weights=False, attn_mask=None):
        batch, length, width = q_x.shape
        q, k, v = (
            project(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for project, x in ((self.q, q_x), (self.k, k_x), (self.v, v_x))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)
        if attn_mask is not None:
            scores = scores + attn_mask
        mixed = scores.softmax(dim=-1) @ v
        out = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return (out, None) if self.returns_weights else out


def blocks_of(model):
    """Vision tower first, as the model lists it."""
    return [*model.visual.transformer.resblocks, *model.transformer.resblocks]


def adapt(model, rank, generator):
    """Wrap all six matrices of every block; returns the wrapped layers in drawing order."""
    layers = []
    for block in blocks_of(model):
        plain = (block.attn, block.mlp.c_fc, block.mlp.c_proj)
        block.attn = TwinAttention(block.attn, rank, generator)
        block.mlp.c_fc, block.mlp.c_proj = (
            TwinLinear(linear.weight.detach(), linear.bias.detach(), rank, generator) for linear in plain[1:]
        )
        layers += [block.attn.q, block.attn.k, block.attn.v, block.attn.out, block.mlp.c_fc, block.mlp.c_proj]
        block.plain = [plain]  # in a list, so that it is no submodule
    return layers


def restore(model):
    """The plain modules back; they share the weights that were merged into."""
    for block in blocks_of(model):
        block.attn, block.mlp.c_fc, block.mlp.c_proj = block.plain[0]
        del block.plain


def released_prox(gate, kappa):
    gate.data[gate.data > kappa] -= kappa
    gate.data[gate.data < -kappa] += kappa
    gate.data[gate.data.abs() < kappa] = 0.0


def exact_prox(gate, kappa):
    w = gate.data
    gate.data = (w.abs() > kappa).to(w.dtype) * (w - w.sign() * kappa)


def loss_of(model, images, labels, prompts, seen):
    image = F.normalize(model.encode_image(images), dim=-1)
    text = F.normalize(model.encode_text(prompts), dim=-1)
    scale = model.logit_scale.exp()
    everything = text if seen is None else torch.cat([seen, text])
    offset = 0 if seen is None else len(seen)
    per_image = scale * image @ everything.t()
    per_text = scale * everything @ image.t()
    per_image[:, :offset] = float("-inf")
    targets = torch.zeros(len(everything), len(images))
    targets[labels + offset, torch.arange(len(images))] = 1.0
    text_loss = -(targets * F.log_softmax(per_text, dim=-1)).sum(dim=-1).mean()
    return F.cross_entropy(per_image, labels + offset) + text_loss


def train(model, tokenizer, tasks, *, rank, iterations, lr, kappa_max, operator, generators, data):
    """`tasks`: (classes, template); `generators`: one a task; `data`: one iterator of (images, labels) a task.

    Returns:
        Per task: losses, and the gates [modules][rank] before dead components are dropped.
    """
    prox = {"released": released_prox, "exact": exact_prox}[operator]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    ramp, dense = torch.linspace(0, kappa_max, 50, dtype=torch.float64).tolist(), iterations // 2
    history, seen_prompts = [], []
    model.train()
    for (classes, template), generator, batches in zip(tasks, generators, data):
        layers = adapt(model, rank, generator)
        parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B, layer.gate)]
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.9999), weight_decay=0.0, foreach=False)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        prompts = tokenizer([template.format(name) for name in classes])
        with torch.no_grad():
            seen = F.normalize(model.encode_text(torch.cat(seen_prompts)), dim=-1) if seen_prompts else None
        losses = []
        for iteration in range(iterations):
            images, labels = next(batches)
            loss = loss_of(model, images, labels, prompts, seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if iteration > dense:
                # the published ramp advances every 5 of its 250 sparse iterations: here, in proportion
                step = min(1 + (iteration - dense) * len(ramp) // (iterations - dense), len(ramp) - 1)
                for layer in layers:
                    prox(layer.gate, ramp[step])
        for layer in layers:
            layer.merge()
        history.append((losses, [layer.gate.detach().flatten().clone() for layer in layers]))
        restore(model)
        seen_prompts.append(prompts)
    return history
