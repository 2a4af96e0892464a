"""inject, merge, remove and what users do between, on language models and CLIP as transformers builds them."""

import copy
import warnings

import pytest
import torch
from helpers import relative_error
from interop.tiny import LANGUAGE_MODELS, clip_model, language_model, token_ids, transformers
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora.merge_files import merge_files

# what users type
PROJECTIONS = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj", "*.gate_proj", "*.up_proj", "*.down_proj"]
CONV1D = ["*.c_attn", "*.c_proj", "*.c_fc"]
FAMILIES = [*LANGUAGE_MODELS, "gpt2"]


def patterns(family):
    return CONV1D if family == "gpt2" else PROJECTIONS


def train_adapters(model):
    for _, adapter in fastlora.adapters(model):
        adapter.lora_b.data.normal_(std=0.05)


def adapted(family="llama", rank=4, where=None, **options):
    """A model with adapters that do something."""
    model = language_model(family, **options)
    fastlora.inject(model, rank=rank, where=where or patterns(family))
    train_adapters(model)
    return model


def kinds_keys_and_storages(model):
    return [type(m) for m in model.modules()], {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_by_glob(family):
    model, ids = language_model(family), token_ids()
    before, plain = model(ids).logits, kinds_keys_and_storages(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fastlora.inject(model, rank=4, where=patterns(family))
    assert len(report) == (8 if family == "gpt2" else 14)
    assert torch.equal(model(ids).logits, before), "fresh adapters changed an output"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{name}.{key}" for name in report.names for key in ("lora_a", "lora_b", "gate")
    }
    train_adapters(model)
    trained = model(ids, labels=ids)
    trained.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in fastlora.adapter_parameters(model))
    assert relative_error(trained.logits, before) > 0.01
    fastlora.merge(model)
    assert fastlora.remove(model) is model and kinds_keys_and_storages(model) == plain
    assert relative_error(model(ids).logits, trained.logits) < 2e-6
    assert len(fastlora.inject(model, rank=2, where=patterns(family))) == len(report)  # and it can be adapted again


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_remove_without_merge_restores_every_bit(family):
    model, ids = language_model(family), token_ids()
    before = model(ids).logits
    fastlora.inject(model, rank=4, where=patterns(family))
    train_adapters(model)
    assert not torch.equal(model(ids).logits, before)
    assert torch.equal(fastlora.remove(model)(ids).logits, before)


def test_clip_of_transformers_by_glob():
    model, ids = clip_model(), token_ids(length=12)
    pixels = torch.randn(2, 3, 16, 16)
    before = model(input_ids=ids, pixel_values=pixels).logits_per_image
    assert len(fastlora.inject(model, rank=4, where=["vision_model.*.self_attn.*"])) == 8
    assert len(fastlora.inject(model, rank=4, where=["text_model.*.mlp.fc?", "*_projection"])) == 6
    train_adapters(model)
    trained = model(input_ids=ids, pixel_values=pixels).logits_per_image
    assert relative_error(trained, before) > 0.01
    fastlora.merge(model)
    merged = fastlora.remove(model)(input_ids=ids, pixel_values=pixels).logits_per_image
    assert relative_error(merged, trained) < 2e-6


def test_patterns_that_match_nothing_name_what_is_near():
    with pytest.raises(ValueError, match=r"near: \['model\.layers\.\d\.self_attn\.q_proj'.*e\.g\. '\*\.q_proj'"):
        fastlora.inject(language_model(), rank=4, where=["q_proj"])
    with pytest.raises(ValueError, match=r"glob patterns, e\.g\. where=\['\*\.q_proj', '\*\.v_proj'\]"):
        fastlora.inject(language_model(), rank=4)


def test_a_tied_head_stays_tied_and_is_merged_only_on_request(tmp_path):
    model, ids = language_model("gemma"), token_ids()
    with pytest.warns(
        UserWarning, match="lm_head is one tensor under 2 names .model.embed_tokens.weight, lm_head.weight"
    ):
        fastlora.inject(model, rank=4, where=["lm_head", *PROJECTIONS])
    train_adapters(model)
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = copy.deepcopy(model.state_dict())
    for work in (fastlora.merge, fastlora.unmerge):
        with pytest.raises(ValueError, match="a merge would change them all. Pass allow_tied=True"):
            work(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    delta = model.lm_head.delta_weight()
    fastlora.merge(model, allow_tied=True)
    torch.testing.assert_close(model.get_input_embeddings().weight, before["lm_head.weight"] + delta)
    fastlora.remove(model).save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_heads_that_are_not_tied_are_merged_as_any_layer():
    model, ids = language_model("llama"), token_ids()
    fastlora.inject(model, rank=4, where=["lm_head"])
    train_adapters(model)
    trained = model(ids).logits
    fastlora.merge(model)
    assert relative_error(model(ids).logits, trained) < 2e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_models_with_float32_adapters(family):
    model, ids = language_model(family).to(torch.bfloat16), token_ids()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    fastlora.inject(model, rank=4, where=patterns(family))
    train_adapters(model)
    trained = model(ids, labels=ids)
    trained.loss.backward()
    assert trained.logits.dtype == torch.bfloat16
    assert {p.dtype for p in fastlora.adapter_parameters(model)} == {torch.float32}
    assert {p.grad.dtype for p in fastlora.adapter_parameters(model)} == {torch.float32}
    exact = copy.deepcopy(model).double()
    truth = exact(ids).logits
    # the plain model's own rounding is the measure
    plain, plain_truth = (
        language_model(family).to(torch.bfloat16)(ids).logits,
        fastlora.remove(copy.deepcopy(exact))(ids).logits,
    )
    limit = 2 * relative_error(plain, plain_truth)
    assert relative_error(trained.logits, truth) < limit
    fastlora.merge(model)
    fastlora.remove(model)
    assert relative_error(model(ids).logits, truth) < limit
    changed = {
        name.removesuffix(".weight") for name, p in model.named_parameters() if not torch.equal(p, weights[name])
    }
    assert changed == set(dict(fastlora.adapters(exact)))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_bit(family, reentrant):
    model, ids = adapted(family).train(), token_ids()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            # reentrant checkpoints pass gradients on only where an input has one, and the embedding is frozen
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in fastlora.adapter_parameters(model)])
    assert model.is_gradient_checkpointing
    assert all(torch.equal(one, two) for one, two in zip(*gradients))


def test_compile_makes_one_graph_and_a_new_kappa_none():
    torch.compiler.reset()
    model, ids = adapted(num_hidden_layers=1), token_ids()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for kappa in (0.0, 0.1, 0.2):
        for _, adapter in fastlora.adapters(model):
            adapter.kappa = kappa
        assert relative_error(compiled(ids).logits, model(ids).logits) < 1e-6
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_generation_is_the_same_with_and_without_cache_and_merged(family):
    model, ids = adapted(family), token_ids(length=4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(ids, use_cache=True, **options)
    assert generated.shape == (3, 12) and torch.equal(model.generate(ids, use_cache=False, **options), generated)
    fastlora.merge(model)
    assert torch.equal(fastlora.remove(model).generate(ids, use_cache=True, **options), generated)


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_adapters_and_merged_models_on_disk(family, tmp_path):
    model, ids = adapted(family), token_ids()
    for _, adapter in fastlora.adapters(model):
        adapter.gate.data[1:3] = 0.0
    fastlora.prune(model)
    trained = model(ids).logits
    fastlora.save_adapter(model, tmp_path / "task.safetensors")
    again = language_model(family)
    again.save_pretrained(tmp_path / "base")
    fastlora.inject(again, rank=4, where=patterns(family))
    fastlora.load_adapter(again, tmp_path / "task.safetensors")
    assert torch.equal(again(ids).logits, trained)
    fastlora.merge(model)
    fastlora.remove(model).save_pretrained(tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(merged) is type(model) and torch.equal(merged(ids).logits, model(ids).logits)
    # the same without a model; a square Conv1D would take its update transposed as well
    weights = tmp_path / "base" / "model.safetensors"
    merge_files(weights, [tmp_path / "task.safetensors"], weights, force=True)
    ours, theirs = load_file(weights), load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_journal_rebuilds_a_model_of_conv1d_bit_for_bit(tmp_path):
    base = language_model("gpt2")
    model, journal = copy.deepcopy(base), fastlora.Journal(tmp_path / "adapters")
    fastlora.inject(model, rank=4, where=CONV1D)
    for task in ("reverse", "sort"):
        train_adapters(model)
        journal.append(model, task)
        fastlora.merge(model)
    journal.rebuild(base)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), fastlora.remove(model).parameters()))
