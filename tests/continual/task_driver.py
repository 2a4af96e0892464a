"""Training on some tasks of a stream alone, and going on from what a method's state_dict holds."""

import torch

from fastlora.continual import Trainer


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(a, b):
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def train_tasks(model, tokenizer, stream, config, numbers, method_state=None, seed=0):
    """Train on the tasks `numbers` (from 1); a method that starts from `method_state` is a fresh object.

    Returns:
        The method.
    """
    trainer = Trainer(model, tokenizer, stream, config, seed=seed, progress=False)
    if method_state is not None:
        trainer.method.load_state_dict(method_state)
    for number in numbers:
        trainer._train(number, stream.tasks[number - 1])
    return trainer.method


def check_going_on_after_task_2(make_clip, tokenizer, make_stream, config):
    """Three tasks at once, and two, then the third by fresh objects over the saved tensors: the same bits."""
    whole_model = make_clip()
    whole = train_tasks(whole_model, tokenizer, make_stream(), config, (1, 2, 3))

    first_model = make_clip()
    first = train_tasks(first_model, tokenizer, make_stream(), config, (1, 2))
    weights, method_state = state_of(first_model), {k: v.clone() for k, v in first.state_dict().items()}

    second_model = make_clip()
    second_model.load_state_dict(weights)
    torch.manual_seed(77)  # the caller's generator plays no part
    second = train_tasks(second_model, tokenizer, make_stream(), config, (3,), method_state)

    assert_same_state(state_of(second_model), state_of(whole_model))
    assert_same_state(second.state_dict(), whole.state_dict())
    return method_state
