import copy

import pytest
import torch
from helpers import relative_error
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastlora
from fastlora import FusedRankLoRALinear
from fastlora.modules.adapter import RankAdapter

open_clip = pytest.importorskip("open_clip")

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2},
}


def tiny_clip(**cfg):
    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy({**TINY, **cfg})).eval()


def features(model):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    tokens = torch.randint(1, 50, (4, 8), generator=generator)
    return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


def train_adapters(model):
    for _, adapter in fastlora.adapters(model):
        adapter.lora_b.data.normal_(std=0.1)


def test_vit_b_16_has_144_modules_and_4425984_trainable_parameters():
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-16", pretrained=None, device="meta")
        report = fastlora.inject(model, rank=16)
    assert len(report) == 144
    assert report.trainable_parameters == 4_425_984
    assert sum(p.numel() for p in fastlora.adapter_parameters(model)) == 4_425_984
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_425_984
    assert str(report) == "144 adapters, 4,425,984 trainable parameters"


def test_fresh_adapters_change_no_feature():
    model = tiny_clip()
    before = features(model)
    report = fastlora.inject(model, rank=4)
    assert len(report) == 24 and report.names == tuple(name for name, _ in fastlora.adapters(model))
    for ours, theirs in zip(features(model), before):
        torch.testing.assert_close(ours, theirs)


def test_compile_of_an_injected_model_breaks_no_graph_and_recompiles_nothing():
    torch.compiler.reset()
    model = tiny_clip()
    fastlora.inject(model, rank=4)
    train_adapters(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = [
        torch.compile(encode, fullgraph=True, backend=counter, dynamic=True)
        for encode in (model.encode_image, model.encode_text)
    ]
    frames = set()
    for batch, kappa in ((6, 0.1), (5, 0.2), (7, 0.0)):
        for _, adapter in fastlora.adapters(model):
            adapter.kappa = kappa
        images, tokens = torch.randn(batch, 3, 16, 16), torch.randint(1, 50, (batch, 8))
        image_features, text_features = (encode(x) for encode, x in zip(compiled, (images, tokens)))
        torch.testing.assert_close(image_features, model.encode_image(images), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(text_features, model.encode_text(tokens), atol=1e-5, rtol=1e-4)
        (image_features.sum() + text_features.sum()).backward()
        frames.add(counter.frame_count)
    assert len(frames) == 1, "another batch or kappa recompiled the model"


def test_gradient_reaches_all_six_targets_in_both_towers_and_nothing_else():
    model = tiny_clip()
    fastlora.inject(model, rank=4)
    train_adapters(model)
    image, text = features(model)
    (image @ image.t()).square().sum().backward()
    (text @ text.t()).square().sum().backward()
    suffixes = {".attn.q", ".attn.k", ".attn.v", ".attn.out_proj", ".mlp.c_fc", ".mlp.c_proj"}
    for tower in ("visual.transformer.resblocks.1", "transformer.resblocks.1"):
        names = {name for name, _ in fastlora.adapters(model) if name.startswith(tower)}
        assert {name.removeprefix(tower) for name in names} == suffixes
    for name, adapter in fastlora.adapters(model):
        for key in ("lora_a", "lora_b", "gate"):
            gradient = getattr(adapter, key).grad
            assert gradient is not None and gradient.abs().sum() > 0, f"{name}.{key} gets no gradient"
    assert all(
        p.grad is None for name, p in model.named_parameters() if not name.endswith(("lora_a", "lora_b", "gate"))
    )
    assert not model.logit_scale.requires_grad


def test_merge_and_remove_give_back_a_plain_model_that_computes_the_same():
    model = tiny_clip()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    fastlora.inject(model, rank=4, scaling=0.5)
    train_adapters(model)
    before = features(model)
    report = fastlora.merge(model)
    assert len(report) == 24
    plain = fastlora.remove(model)
    assert plain is model and list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == storages
    for ours, theirs in zip(features(model), before):
        assert relative_error(ours, theirs) < 1e-5
    fresh = tiny_clip()
    fresh.load_state_dict(model.state_dict())
    for ours, theirs in zip(features(fresh), features(model)):
        torch.testing.assert_close(ours, theirs)


def test_remove_without_merge_restores_the_original():
    model = tiny_clip()
    before = features(model)
    fastlora.inject(model, rank=4)
    train_adapters(model)
    assert not torch.allclose(features(model)[0], before[0])
    fastlora.remove(model)
    for ours, theirs in zip(features(model), before):
        torch.testing.assert_close(ours, theirs)
    assert fastlora.inject(model, rank=2).names  # and it can be adapted again


def test_prune_changes_no_feature_and_reports_ranks():
    model = tiny_clip()
    fastlora.inject(model, rank=4, kappa=0.5)
    train_adapters(model)
    before, active = features(model), {name: a.active_rank() for name, a in fastlora.adapters(model)}
    assert fastlora.prune(model) == active and min(active.values()) < 4
    for ours, theirs in zip(features(model), before):
        assert relative_error(ours, theirs) < 1e-5
    rows = fastlora.rank_report(model)
    assert [row.rank for row in rows] == [row.active_rank for row in rows] == list(active.values())
    assert rows.mean_active == sum(active.values()) / 24
    assert "transformer.resblocks.0.attn.q" in str(rows) and "mean active rank" in str(rows)
    fastlora.merge(model)
    assert all(row.rank == 4 and row.delta_norm == 0 for row in fastlora.rank_report(model))


def test_a_nan_in_the_second_of_many_merges_nothing():
    model = tiny_clip()
    fastlora.inject(model, rank=4)
    train_adapters(model)
    name, second = list(fastlora.adapters(model))[1]
    second.lora_b.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(fastlora.MergeError, match=name.replace(".", r"\.")):
        fastlora.merge(model)
    after = model.state_dict()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    second.gate.data[0] = float("nan")
    for change in (fastlora.merge, fastlora.prune):
        with pytest.raises(ValueError, match=rf"{name}\.gate holds 1 non-finite"):
            change(model)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"where": "vision"}, 12),
        ({"where": "text"}, 12),
        ({"targets": ("q", "v")}, 8),
        ({"targets": ("fc1",), "where": "vision"}, 2),
        ({"where": ["visual.*.mlp.c_fc"]}, 2),
        ({"where": ["*.attn"], "targets": ("out",)}, 4),
        ({"where": lambda name, module: isinstance(module, nn.Linear) and "c_proj" in name}, 4),
        ({"where": ["*"]}, 24),
    ],
)
def test_where_and_targets(options, count):
    assert len(fastlora.inject(tiny_clip(), rank=2, **options)) == count


def test_custom_text_tower_and_custom_blocks():
    text = {**TINY["text_cfg"], "hf_model_name": None}
    text.pop("hf_model_name")
    model = open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=TINY["vision_cfg"], text_cfg=text).eval()
    before = features(model)
    assert len(fastlora.inject(model, rank=2)) == 24
    assert len(fastlora.inject(fastlora.remove(model), rank=2, where="text")) == 12
    torch.testing.assert_close(features(model)[1], before[1])


def test_any_module_by_glob():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    report = fastlora.inject(model, rank=2, where=["2"], gate_init="ones", kappa=0.1)
    assert report.names == ("2",) and isinstance(model[2], FusedRankLoRALinear) and type(model[0]) is nn.Linear
    assert model[2].kappa == 0.1 and model[2].gate.eq(1).all()
    assert fastlora.inject(model, rank=2, where=["0"]).names == ("0",)  # the adapter of "2" goes on training
    assert model[2].gate.requires_grad and not model[0].weight.requires_grad


def test_transformer_encoder_by_glob_trains_and_evaluates_alike():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    with pytest.raises(ValueError, match="whose fast path for evaluation reads its weight without"):
        fastlora.inject(model, rank=2, where=["*.linear1"])
    assert len(fastlora.inject(model, rank=2, where=["*.linear1", "*.self_attn"])) == 10
    train_adapters(model)
    model.eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        evaluated = model(x)
    torch.testing.assert_close(evaluated, model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ("query",)}, ValueError, r"targets \['query'\] were given; accepted: any of \['q', 'k'"),
        ({"targets": ()}, ValueError, r"targets \[\] were given"),
        ({"where": "visoin"}, ValueError, "where='visoin' is no tower"),
        ({"where": ["*.c_fcc"]}, ValueError, r"match none of the \d+ linear and attention modules; near: .*c_fc"),
        ({"where": lambda name, module: False}, ValueError, "the predicate selected none"),
        ({"where": ["*.out_proj"]}, ValueError, "an adapter there would never train"),
        ({"where": ["*.attn"], "targets": ("fc1",)}, ValueError, "targets name none of its parts"),
        ({"rank": 0}, ValueError, "rank is 0"),
        ({"kappa": -1.0}, ValueError, "kappa is -1.0"),
        ({"colour": 1}, TypeError, "colour"),
    ],
)
def test_bad_injections_are_refused_and_leave_the_model_alone(options, error, message):
    model = tiny_clip()
    kinds = [type(m) for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        fastlora.inject(model, **{"rank": 2, **options})
    assert [type(m) for m in model.modules()] == kinds
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_module_in_two_places_is_refused():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(ValueError, match="0 and 2 are one module in several places"):
        fastlora.inject(model, rank=2, where=["*"])
    assert model[0] is model[2] is shared and shared.weight.requires_grad


def test_a_model_that_is_itself_a_layer():
    for layer in (nn.Linear(4, 4), nn.MultiheadAttention(4, 2)):
        with pytest.raises(ValueError, match="the model is itself a .* Put it into nn.Sequential.*from_linear"):
            fastlora.inject(layer, rank=2, where=["*"])
        assert all(parameter.requires_grad for parameter in layer.parameters())


def test_no_memory_for_the_second_adapter_leaves_the_model_alone(monkeypatch):
    model = tiny_clip()
    kinds, calls, fresh_tensors = [type(m) for m in model.modules()], [], RankAdapter.fresh_tensors
    before = {name: parameter for name, parameter in model.named_parameters()}

    def no_memory(self, generator=None):
        calls.append(1)
        if len(calls) == 8:  # the first is a trial; in the second of two attentions
            raise RuntimeError("can't allocate memory")
        return fresh_tensors(self, generator)

    monkeypatch.setattr(RankAdapter, "fresh_tensors", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        fastlora.inject(model, rank=2)
    assert [type(m) for m in model.modules()] == kinds
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_injecting_twice_is_refused():
    model = tiny_clip()
    fastlora.inject(model, rank=2)
    with pytest.raises(ValueError, match="is adapted already"):
        fastlora.inject(model, rank=2)
    with pytest.raises(ValueError, match="adapters are in place already"):
        fastlora.inject(model, rank=2, targets=("q",))
    with pytest.raises(ValueError, match="is adapted already"):
        fastlora.inject(model, rank=2, where=["*.mlp.c_fc"])


def test_working_on_a_model_without_adapters_is_refused():
    for work in (fastlora.merge, fastlora.prune):
        with pytest.raises(ValueError, match=r"Linear has no adapters; call fastlora.inject\(model, rank=...\) first"):
            work(nn.Linear(2, 2))
    assert len(fastlora.rank_report(nn.Linear(2, 2))) == 0
