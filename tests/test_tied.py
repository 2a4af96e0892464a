import pytest
import torch
from torch import nn

import fastlora
from fastlora.tied import ties


class Head(nn.Module):
    """An embedding and a head over the same matrix, as a language model has them, and a layer of its own."""

    def __init__(self, tie):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)
        tie(self)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)))


def same_parameter(model):
    model.head.weight = model.embed.weight


def same_memory(model):
    model.head.weight.data = model.embed.weight.data


def part_of_it(model):
    model.embed.weight = nn.Parameter(torch.randn(12, 6))
    model.head.weight.data = model.embed.weight.data[1:11]


def not_tied(model):
    """Parameters side by side in one flat buffer, as optimizers of other projects lay them."""
    flat = torch.randn(10 * 6 + 6 * 6 + 10 * 6)
    sizes = [(model.embed, (10, 6)), (model.layer, (6, 6)), (model.head, (10, 6))]
    start = 0
    for module, (n, k) in sizes:
        module.weight.data = flat[start : start + n * k].view(n, k)
        start += n * k


@pytest.mark.parametrize("tie", [same_parameter, same_memory, part_of_it])
def test_a_tied_weight_is_named_at_injection_and_refused_at_the_merge(tie):
    model = Head(tie)
    with pytest.warns(
        UserWarning, match=r"the weight of head is one tensor under 2 names \(embed.weight, head.weight\)"
    ):
        fastlora.inject(model, rank=2, where=["head", "layer"])
    assert ties(model, dict(fastlora.adapters(model))) == {"head": ["embed.weight", "head.weight"]}
    for adapter in (model.head, model.layer):
        adapter.lora_b.data.normal_()
    before = {name: p.clone() for name, p in model.named_parameters(remove_duplicate=False)}
    for work in (fastlora.merge, fastlora.unmerge):
        with pytest.raises(ValueError, match="one tensor under 2 names .*; a merge would change them all"):
            work(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(after[name], value) for name, value in before.items()), "something was merged"
    fastlora.merge(model, allow_tied=True)
    assert not torch.equal(model.embed.weight, before["embed.weight"])


def test_what_lies_apart_is_not_tied(recwarn):
    for model in (Head(not_tied), Head(lambda model: None)):
        fastlora.inject(model, rank=2, where=["head", "layer"])
        fastlora.merge(model)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    fastlora.inject(attention, rank=2, where=["*"])  # q, k and v are rows of one parameter, each its own
    fastlora.merge(attention)
    with torch.device("meta"):
        model = Head(same_parameter)
    fastlora.inject(model, rank=2, where=["head"])
    assert [str(w.message) for w in recwarn] == []


def test_a_module_that_has_two_names_is_one_owner(recwarn):
    model = Head(lambda model: None)
    fastlora.inject(model, rank=2, where=["head"])
    model.alias = nn.ModuleList([model.head])
    fastlora.merge(model)
    assert [str(w.message) for w in recwarn] == []
