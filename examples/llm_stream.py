"""A language model learns a sequence of text tasks, one after the other: plain LoRA against CoDyRA.

    python examples/llm_stream.py [--steps 150] [--seed 0]

The protocol is TRACE's (arXiv 2310.06762): train on a task, merge, evaluate all tasks; then overall performance (OP) and
backward transfer (BWT). Model and tasks are small enough for one core and half a minute: a random Llama of two layers, and
strings of digits to be copied, incremented, sorted and reversed, after a word that names the task. Put a model and
tokenizer of your own in the place of `random_llama` and `rows`; the rest stays.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
import transformers
from torch import Tensor

import fastlora
from fastlora.continual.metrics import summarize, trace
from fastlora.interop.hf_trainer import KappaCallback, prox_adamw

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda digits: digits,
    "add one": lambda digits: (digits + 1) % 10,
    "sort": lambda digits: digits.sort(dim=1).values,
    "reverse": lambda digits: digits.flip(1),
}
DIGITS = 4
# tokens: 0 to 9 are digits; then a word for each task; then "="
EQUALS = 10 + len(TASKS)
BATCH = 64


def random_llama(seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=EQUALS + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, initializer_range=0.1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def rows(task: str, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Token ids "sort 3 1 4 1 = 1 1 3 4", with labels on the answer alone."""
    digits = torch.randint(10, (count, DIGITS), generator=torch.Generator().manual_seed(seed))
    word = torch.full((count, 1), 10 + list(TASKS).index(task))
    ids = torch.cat([word, digits, torch.full((count, 1), EQUALS), TASKS[task](digits)], dim=1)
    labels = ids.clone()
    labels[:, :-DIGITS] = -100
    return [{"input_ids": row, "labels": answer} for row, answer in zip(ids, labels)]


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: str) -> float:
    """Share of right digits in the answers, percent, on strings that are drawn apart from those of the training."""
    ids = torch.stack([row["input_ids"] for row in rows(task, 512, seed=10_000)])
    predicted = model.eval()(ids[:, :-1]).logits[:, -DIGITS:].argmax(-1)
    return 100 * float((predicted == ids[:, -DIGITS:]).float().mean())


def train(model: torch.nn.Module, method: str, task: str, steps: int, seed: int) -> float:
    """Trains the adapters on one task, drops the dead ranks, and merges; returns the mean rank that was kept."""
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=5e-3, adam_beta2=0.9999,
            lr_scheduler_type="cosine", max_grad_norm=0.0, use_cpu=True, seed=seed,
            report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model,
            args,
            train_dataset=rows(task, BATCH * steps, seed),
            optimizers=(prox_adamw(model, args), None),
            # without it kappa stays 0, and no rank is dropped
            callbacks=[KappaCallback()] if method == "CoDyRA" else [],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    kept = fastlora.prune(model)
    fastlora.merge(model)
    return sum(kept.values()) / len(kept)


def stream(method: str, steps: int, seed: int) -> tuple[list[list[float]], list[float]]:
    """The accuracy matrix (row i after task i, a column for each task), and the mean rank that each task kept."""
    model = random_llama(seed)
    fastlora.inject(model, rank=16, where=["model.layers.*"], gate_init="normal" if method == "CoDyRA" else "ones")
    if method == "LoRA":
        for _, adapter in fastlora.adapters(model):
            adapter.gate.requires_grad_(False)
    matrix, kept = [], []
    for number, task in enumerate(TASKS):
        kept.append(train(model, method, task, steps, seed=1000 * seed + number))
        matrix.append([accuracy(model, each) for each in TASKS])
    return matrix, kept


def show(method: str, matrix: list[list[float]], kept: list[float]) -> None:
    figures, learning = trace(matrix), summarize(matrix)["learning"]
    print(f"\n{method + ', after':<16}" + "".join(f"{task:>10}" for task in TASKS) + f"{'kept rank':>12}")
    for task, row, rank in zip(TASKS, matrix, kept):
        print(f"{task:<16}" + "".join(f"{value:10.1f}" for value in row) + f"{rank:12.1f}")
    # what learns nothing forgets nothing: learning belongs beside the two
    print(f"OP {figures['op']:.1f}   BWT {figures['bwt']:.1f}   learning {learning:.1f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps a task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    transformers.utils.logging.set_verbosity_error()
    for method in ("LoRA", "CoDyRA"):
        show(method, *stream(method, options.steps, options.seed))


if __name__ == "__main__":
    main()
