import pytest
import torch
from open_clip.transformer import LayerNorm

from fastlora.continual.text import cut_context, encode_text, why_uncut

PROMPTS = ["a photo of a red square", "dog", "the cat in a large picture of the sea"]


@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"pool_type": "eos", "eos_id": 63}, {"proj_bias": True}, {"proj_type": "none"}],
    ids=["argmax", "eos", "linear_projection", "no_projection"],
)
def test_cut_is_exact(make_clip, tokenizer, custom_text, options):
    """Against the model's own encode_text over the whole context; only the order of float32 sums differs."""
    model, tokens = make_clip(custom_text, layers=3, **options).eval(), tokenizer(PROMPTS)
    cut = cut_context(model, tokens)
    assert cut.shape == (3, 10) and tokens.shape == (3, 16)
    expected = model.encode_text(tokens)
    error = (encode_text(model, cut) - expected).abs().max()
    assert error <= 2e-6 * expected.abs().max()
    torch.testing.assert_close(encode_text(model, tokens), expected, rtol=0, atol=1e-5)


def test_one_token_less_is_seen(make_clip, tokenizer):
    model, tokens = make_clip(layers=3).eval(), tokenizer(PROMPTS)
    cut = cut_context(model, tokens)[:, :-1]
    assert (encode_text(model, cut) - model.encode_text(tokens)).abs().max() > 1e-2


def test_gradient_is_exact(make_clip, tokenizer):
    model, tokens = make_clip(layers=2), tokenizer(PROMPTS)
    weight = model.transformer.resblocks[0].mlp.c_fc.weight
    (expected,) = torch.autograd.grad(model.encode_text(tokens).square().sum(), weight)
    (got,) = torch.autograd.grad(encode_text(model, cut_context(model, tokens)).square().sum(), weight)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"no_causal_mask": True, "pool_type": "argmax"}, "not causal"),
        ({"pool_type": "last"}, "pools with 'last'"),
        ({"embed_cls": True}, "class token"),
    ],
)
def test_what_cannot_be_cut_is_left_whole(make_clip, tokenizer, options, reason):
    model, tokens = make_clip(custom_text=True, **options).eval(), tokenizer(PROMPTS)
    assert reason in why_uncut(model)
    assert cut_context(model, tokens) is tokens
    torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens), rtol=0, atol=0)


def test_another_library_is_left_whole(tokenizer):
    assert "not one of open_clip's" in why_uncut(torch.nn.Linear(2, 2))


def test_too_many_tokens(clip):
    with pytest.raises(ValueError, match=r"tokens has shape \[1, 17\]; this model has 16 positions"):
        encode_text(clip, torch.zeros(1, 17, dtype=torch.long))


def test_norm_acts_on_rows():
    """encode_text pools before the final norm; that is the same only while the norm looks at one row at a time."""
    norm, x = LayerNorm(8), torch.randn(4, 5, 8)
    torch.testing.assert_close(norm(x)[:, 2], norm(x[:, 2]), rtol=0, atol=0)
