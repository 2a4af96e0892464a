import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora import adapter_parameters
from fastlora.modules.attention import (
    PARTS,
    FusedRankLoRAAttention,
    FusedRankLoRAMultiheadAttention,
    adapt_attention,
)

open_clip_transformer = pytest.importorskip("open_clip.transformer")
WIDTH, HEADS = 16, 4


def open_clip_attention():
    torch.manual_seed(1)
    attention = open_clip_transformer.Attention(WIDTH, HEADS)
    attention.in_proj_bias.data.normal_()
    return attention.eval()


def multihead(**options):
    torch.manual_seed(1)
    attention = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options})
    if attention.in_proj_bias is not None:
        attention.in_proj_bias.data.normal_()
    return attention.eval()


def train_adapters(attention):
    for name, parameter in attention.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_()


MASKS = {
    "none": {},
    "causal": {"attn_mask": torch.full((5, 5), float("-inf")).triu(1)},
    "boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "per head": {"attn_mask": torch.randn(3 * HEADS, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])},
    "both": {
        "attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]),
    },
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": False}])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_a_fresh_adapter_computes_multihead_attention(mask, need_weights, options):
    plain = multihead(**options)
    adapted = adapt_attention(copy.deepcopy(plain), PARTS, rank=3)
    x = torch.randn(3, 5, WIDTH)
    x = x if plain.batch_first else x.transpose(0, 1)
    expected, weights = plain(x, x, x, need_weights=need_weights, **MASKS[mask])
    out, ours = adapted(x, x, x, need_weights=need_weights, **MASKS[mask])
    torch.testing.assert_close(out, expected)
    assert (ours is None) == (weights is None)
    if need_weights:
        torch.testing.assert_close(ours, weights)


def test_unbatched_cross_attention_and_weights_per_head():
    plain = multihead()
    adapted = adapt_attention(copy.deepcopy(plain), PARTS, rank=3)
    query, key, value = torch.randn(4, WIDTH), torch.randn(6, WIDTH), torch.randn(6, WIDTH)
    expected = plain(query, key, value, average_attn_weights=False)
    for ours, theirs in zip(adapted(query, key, value, average_attn_weights=False), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mask", [None, torch.full((5, 5), float("-inf")).triu(1)])
def test_a_fresh_adapter_computes_open_clips_attention(mask):
    plain = open_clip_attention()
    adapted = adapt_attention(copy.deepcopy(plain), PARTS, rank=3)
    assert isinstance(adapted, FusedRankLoRAAttention)
    x = torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(adapted(x, attn_mask=mask), plain(x, attn_mask=mask))


class _Products(TorchDispatchMode):
    """Counts the products whose result is as wide as one or three projections of the test's 10 rows."""

    def __init__(self):
        super().__init__()
        self.widths: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.widths.append(out.shape[-1])
        return out


@pytest.mark.parametrize("make", [multihead, open_clip_attention])
@pytest.mark.parametrize("parts", [("q", "k", "v"), ("q", "v"), ("k",)])
def test_self_attention_projects_in_one_product_and_equals_three(make, parts):
    adapted = adapt_attention(make(), parts, rank=3)
    train_adapters(adapted)
    for index, part in enumerate(parts):  # each with its own rank and threshold
        adapter = getattr(adapted, part)
        adapter.gate.data[:index] = 0.0
        adapter.kappa = 0.1 * (index + 1)
        adapter.prune_()
    x = torch.randn(2, 5, WIDTH, requires_grad=True)

    def outputs(*inputs):
        out = adapted(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *adapter_parameters(adapted)])]

    with _Products() as products:
        packed = outputs(x, x, x)
    assert products.widths.count(3 * WIDTH) == 1
    with _Products() as products:
        separate = outputs(x, x.view_as(x), x.view_as(x))  # another tensor object: keys that are not the queries
    assert 3 * WIDTH not in products.widths
    for ours, expected in zip(packed, separate):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_options_that_differ_or_dropout_take_three_calls():
    adapted = adapt_attention(multihead(), PARTS, rank=3)
    x = torch.randn(2, 5, WIDTH)
    adapted.q.scaling = 2.0
    with _Products() as products:
        adapted(x, x, x, need_weights=False)
    assert 3 * WIDTH not in products.widths
    adapted = adapt_attention(multihead(), PARTS, rank=3, dropout=0.5).train()
    with _Products() as products:
        adapted(x, x, x, need_weights=False)
    assert 3 * WIDTH not in products.widths


@pytest.mark.parametrize("make", [multihead, open_clip_attention])
@pytest.mark.parametrize("parts", [PARTS, ("q", "v"), ("out",), ("k",)])
def test_every_adapter_trains_and_merges_into_its_own_rows(make, parts):
    adapted = adapt_attention(make(), parts, rank=3)
    train_adapters(adapted)
    x = torch.randn(2, 5, WIDTH)

    def run():
        out = adapted(x, x, x)
        return out[0] if isinstance(out, tuple) else out

    run().square().sum().backward()
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    modules = {part if part != "out" else "out_proj" for part in parts}
    assert trainable == {f"{m}.{p}" for m in modules for p in ("lora_a", "lora_b", "gate")}
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
    before, packed = run().detach(), adapted.in_proj_weight.detach().clone()
    for module in modules:
        getattr(adapted, module).merge_()
    torch.testing.assert_close(run(), before, atol=1e-5, rtol=1e-5)
    changed = [not torch.equal(a, b) for a, b in zip(packed.chunk(3), adapted.in_proj_weight.chunk(3))]
    assert changed == [part in parts for part in "qkv"]


@pytest.mark.parametrize("make", [multihead, open_clip_attention])
def test_base_keys_stay_and_the_plain_module_comes_back(make):
    plain = make()
    kind, keys, weight = type(plain), list(plain.state_dict()), plain.in_proj_weight
    adapted = adapt_attention(plain, PARTS, rank=3)
    assert set(keys) <= set(adapted.state_dict())
    back = adapted.to_plain()
    assert type(back) is kind and list(back.state_dict()) == keys and back.in_proj_weight is weight
    x = torch.randn(2, 5, WIDTH)
    arguments = (x, x, x) if make is multihead else (x,)
    for ours, theirs in zip(back(*arguments), make()(*arguments)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own_weights(duplicate):
    adapted = adapt_attention(multihead(), PARTS, rank=3)
    train_adapters(adapted)
    twin = duplicate(adapted)
    before = adapted.in_proj_weight.detach().clone()
    twin.q.merge_()
    assert torch.equal(adapted.in_proj_weight, before)
    assert not torch.equal(twin.in_proj_weight, before)
    assert twin.q.weight.untyped_storage().data_ptr() == twin.in_proj_weight.untyped_storage().data_ptr()


def test_dtype_moves_with_the_module_and_gates_stay():
    adapted = adapt_attention(multihead(), PARTS, rank=3).to(torch.bfloat16)
    assert adapted.q.weight.dtype == torch.bfloat16 and adapted.q.gate.dtype == torch.float32
    x = torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)
    assert adapted(x, x, x)[0].dtype == torch.bfloat16
    assert adapted.to_plain()(x, x, x)[0].dtype == torch.bfloat16


def test_transformer_encoder_does_not_bypass_the_adapters_in_evaluation():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).eval()
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        base = layer(x)
        layer.self_attn = adapt_attention(layer.self_attn, PARTS, rank=3)
        torch.testing.assert_close(layer(x), base, atol=1e-5, rtol=1e-5)
        train_adapters(layer)
        assert not torch.allclose(layer(x), base)


def test_what_is_not_supported_is_refused_by_name():
    with pytest.raises(ValueError, match="separate key and value widths"):
        adapt_attention(multihead(kdim=8, vdim=8), PARTS, rank=3)
    with pytest.raises(ValueError, match="bias_k / bias_v"):
        adapt_attention(multihead(add_bias_kv=True), PARTS, rank=3)
    with pytest.raises(ValueError, match="scaled cosine"):
        adapt_attention(open_clip_transformer.Attention(WIDTH, HEADS, scaled_cosine=True), PARTS, rank=3)
    with pytest.raises(ValueError, match=r"attention targets \['query'\] were given; accepted: any of \['q', 'k'"):
        FusedRankLoRAMultiheadAttention(multihead(), ("query",))
    with pytest.raises(TypeError, match="a Linear was given"):
        adapt_attention(nn.Linear(3, 3), PARTS, rank=3)
