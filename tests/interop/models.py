"""Small models of three kinds, adapters on them as training would leave them, and comparisons in float64."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import nn

import fastlora


class Case(NamedTuple):
    """A plain model, how to run it (any dtype), and where `inject` finds its layers."""

    plain: nn.Module
    run: object
    options: dict

    def copy(self):
        return copy.deepcopy(self.plain)


@functools.cache
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)).eval()
    tokens = torch.randint(0, 64, (2, 7))
    return Case(model, lambda model: model(input_ids=tokens).logits, {"where": ["*_proj"]})


@functools.cache
def gpt2():
    """Conv1D alone: its weights are stored [K, N], and c_proj of the attention is square."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, bos_token_id=1, eos_token_id=2, **sizes)).eval()
    tokens = torch.randint(0, 64, (2, 7))
    return Case(model, lambda model: model(input_ids=tokens).logits, {"where": ["*.c_*"]})


@functools.cache
def sequential():
    """Names that end in each other: 0 and 2.0."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)))
    x = torch.randn(5, 8)
    return Case(model, lambda model: model(x.to(next(model.parameters()).dtype)), {"where": ["0", "2.*"]})


@functools.cache
def clip():
    """nn.MultiheadAttention, with adapters on all but its out_proj."""
    demo = fastlora.open_clip_demo()
    torch.manual_seed(2)
    images, texts = torch.randn(3, 3, 32, 32), demo.tokenizer(["a red circle", "two blue squares"])

    def run(model):
        image_features = model.encode_image(images.to(model.logit_scale.dtype))
        return torch.cat([image_features, model.encode_text(texts)])

    return Case(demo.model.eval(), run, {"targets": ["q", "k", "v", "fc1", "fc2"]})


class _Block(nn.Module):
    def __init__(self):
        from open_clip.transformer import Attention

        super().__init__()
        self.attn, self.fc = Attention(16, 4), nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(self.attn(x))


@functools.cache
def custom_attention():
    """open_clip's own attention, which calls its out_proj; block.attn is the end of tower.block.attn."""
    torch.manual_seed(3)
    model = nn.Sequential()
    model.tower = nn.Sequential()
    model.tower.block = _Block()
    model.block = _Block()
    x = torch.randn(2, 5, 16)
    return Case(model.eval(), lambda model: model(x.to(next(model.parameters()).dtype)), {"where": ["*attn", "*.fc"]})


CASES = {"llama": llama, "gpt2": gpt2, "sequential": sequential, "clip": clip, "custom_attention": custom_attention}


def adapted(case, rank=8, kappa=0.3, scaling=0.7, **options):
    """With gates on both sides of kappa, so that modules differ in rank, and every fifth module dead."""
    model = case.copy()
    fastlora.inject(model, rank, kappa=kappa, scaling=scaling, **{**case.options, **options})
    generator = torch.Generator().manual_seed(7)
    for index, (_, adapter) in enumerate(fastlora.adapters(model)):
        adapter.lora_b.data.normal_(0, 0.2, generator=generator)
        adapter.gate.data.normal_(generator=generator)
        if index % 5 == 4:
            adapter.gate.data.mul_(1e-3)
    return model


def load(case, directory, plain=None, quiet=None):
    """What PEFT makes of a directory; a warning of its own about it is an error, but for those that begin with `quiet`."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(adapter|pattern|module|target|peft).*")
        if quiet:
            warnings.filterwarnings("ignore", message=quiet)
        return PeftModel.from_pretrained(case.copy() if plain is None else plain, directory).eval()


@torch.no_grad()
def outputs(case, model):
    """In float64, of a copy: what differs is what was stored."""
    return case.run(copy.deepcopy(model).eval().double())


def error(case, one, other):
    """Largest difference of the outputs, relative to the largest effect of the update."""
    plain, first, second = (outputs(case, model) for model in (case.plain, one, other))
    effect = (first - plain).abs().max()
    assert effect > 1e-3, "the adapter does next to nothing"
    return float((first - second).abs().max() / effect)


def content(model):
    """Names, classes and values of everything in a model, to be compared after a failure."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    return kinds, {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    kinds, values = content(model)
    return (
        kinds == before[0]
        and values.keys() == before[1].keys()
        and all(torch.equal(values[name], before[1][name]) for name in values)
    )


def saved(case, directory, config, train=None):
    """An adapter by PEFT with every tensor drawn, on disk."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(case.copy(), config)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name and "out_proj" not in name:
                parameter.data.normal_(0, 0.3, generator=generator)
        if train is not None:
            train(model)
        model.save_pretrained(directory)
    return directory


def refused(load, model, path, message, error=ValueError, **kwargs):
    """The call raises, and everything in the model is as it was."""
    before = content(model)
    with pytest.raises(error, match=message):
        load(model, path, **kwargs)
    assert unchanged(model, before)


def rewrite(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
