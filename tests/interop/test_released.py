"""Checkpoints laid out as the released code of CoDyRA and SoRA lays them out, against the sums written down plainly."""

import copy
import re

import pytest
import torch
from interop.models import Case, adapted, clip, error, refused, sequential
from safetensors.torch import save_file
from torch import nn

import fastlora
from fastlora.interop import import_codyra, import_sora

LIMIT = torch.finfo(torch.float32).eps
RANK = 4


def drawn(*shape):
    return torch.randn(*shape) * 0.2


def codyra_module(n, k, old=0):
    """A layer after the last task, with dead gates, and what the tasks before it left (their gates in old_lora_A)."""
    tensors = {"lora_A": drawn(RANK, k), "lora_B": drawn(n, RANK), "gate": torch.randn(1, RANK)}
    tensors["gate"][0, 1] = 0.0
    if old:
        tensors |= {"old_lora_A": drawn(old, k), "old_lora_B": drawn(n, old)}
    return tensors


def delta(tensors):
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    sum_ = (tensors["lora_B"] * tensors["gate"]) @ tensors["lora_A"]
    return sum_ + tensors["old_lora_B"] @ tensors["old_lora_A"] if "old_lora_A" in tensors else sum_


def codyra():
    """(checkpoint, merged model in float64): all six matrices of two blocks, in both towers, the first after two tasks."""
    torch.manual_seed(4)
    merged = clip().copy().double()
    modules = {}
    for tower, old in (("visual.transformer", 3), ("transformer", 0)):
        block, name = merged.get_submodule(f"{tower}.resblocks.1"), f"{tower}.resblocks.1"
        for index, part in enumerate(("q_proj", "k_proj", "v_proj")):
            modules[f"{name}.attn.{part}"] = tensors = codyra_module(128, 128, old)
            block.attn.in_proj_weight.data[128 * index : 128 * (index + 1)] += delta(tensors)
        for part in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj"):
            layer = block.get_submodule(part)
            modules[f"{name}.{part}"] = tensors = codyra_module(layer.out_features, layer.in_features, old)
            layer.weight.data += delta(tensors)
    ranks = {name: {"rank": RANK, "old_rank": len(tensors.get("old_lora_A", ()))} for name, tensors in modules.items()}
    return {"state_dict": flat(modules), "lora_ranks": ranks}, merged


def flat(modules, infix=""):
    return {f"{name}{infix}.{key}": t for name, tensors in modules.items() for key, t in tensors.items()}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_codyra(tmp_path, suffix):
    """out_proj included, and earlier tasks beside the last; into the plain model or one adapted in these places."""
    checkpoint, merged = codyra()
    path = tmp_path / f"aircraft.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(
        checkpoint["state_dict"] if suffix == "safetensors" else checkpoint, path
    )
    model = clip().copy()
    assert len(import_codyra(model, path)) == 12
    assert error(clip(), model, merged) < LIMIT
    ranks = {name: a.gate.numel() for name, a in fastlora.adapters(model)}
    assert set(ranks.values()) == {RANK, RANK + 3} and ranks["visual.transformer.resblocks.1.attn.q"] == RANK + 3
    again = copy.deepcopy(model)
    fastlora.remove(again)
    fastlora.inject(again, 2, where=["*resblocks.1.attn", "*resblocks.1.mlp.*"])
    import_codyra(again, path)
    assert error(clip(), again, model) == 0
    assert set(fastlora.prune(again).values()) == {RANK - 1, RANK - 1 + 3}
    assert error(clip(), again, merged) < LIMIT
    fastlora.merge(model)
    assert error(clip(), model, merged) < 1e-6


def sora_case():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(6)
    config = RobertaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
    )
    tokens = torch.randint(3, 30, (2, 6))
    return Case(RobertaForSequenceClassification(config).eval(), lambda model: model(input_ids=tokens).logits, {})


def sora(case):
    """(checkpoint, merged model in float64): q and v of each layer, and the classifier that was trained with them."""
    merged = case.copy()
    for parameter in merged.classifier.parameters():
        parameter.data.normal_(0, 0.5)
    trained = {f"classifier.{name}": p.detach().clone() for name, p in merged.classifier.named_parameters()}
    merged.double()
    modules = {}
    for name, module in merged.named_modules():
        if name.endswith(("self.query", "self.value")):
            modules[name] = tensors = {
                "lora_A": drawn(RANK, 16),
                "lora_B": drawn(16, RANK),
                "gate": torch.randn(1, RANK),
            }
            module.weight.data += 6 / RANK * delta(tensors)
    return flat(modules, ".lora") | trained, merged


def test_sora(tmp_path):
    """Scaled by alpha / R; the classifier in the file is taken over."""
    case = sora_case()
    checkpoint, merged = sora(case)
    torch.save(checkpoint, tmp_path / "pytorch_model.bin")
    model = case.copy()
    assert len(import_sora(model, tmp_path / "pytorch_model.bin", alpha=6)) == 4
    assert error(case, model, merged) < LIMIT
    assert torch.equal(model.classifier.dense.weight, checkpoint["classifier.dense.weight"])


Q = "visual.transformer.resblocks.1.attn.q_proj"


def drop(key):
    return lambda checkpoint: checkpoint["state_dict"].pop(key)


def put(key, tensor):
    return lambda checkpoint: checkpoint["state_dict"].update({key: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{Q}.gate"), f"is incomplete: it lacks {Q}.gate"),
        (drop(f"{Q}.old_lora_A"), f"has one of old_lora_A and old_lora_B of {Q} alone"),
        (put(f"{Q}.gate", torch.ones(1, 3)), r"of shapes \[\[4, 128\], \[128, 4\], \[1, 3\]\]; \[R, K\], \[N, R\], \[1, R\]"),
        (put(f"{Q}.lora_A", torch.ones(4)), "of shapes"),
        (put(f"{Q}.lora_A", torch.ones(4, 64)), r"have shapes|takes \[4, 128\]"),
        (put(f"{Q}.old_lora_A", torch.ones(3, 64)), r"have shapes \[\[3, 64\], \[128, 3\]\]; \[\[3, 128\], \[128, 3\]\] would"),
        (put(f"{Q}.old_lora_B", torch.ones(64, 3)), "have shapes"),
        (put(f"{Q}.old_lora_A", torch.ones(())), "lora_ranks says|have shapes"),
        (put(f"{Q}.gate", torch.full((1, 4), float("nan"))), "attn.q holds non-finite values"),
        (put(f"{Q}.weight", torch.ones(128, 128)), f"holds {Q}.weight besides lora_A, lora_B, gate of modules"),
        (put(f"{Q}.old_lora_merged", torch.ones(1)), "holds .*old_lora_merged besides"),
        (lambda c: c["lora_ranks"][Q].update(rank=16), "has ranks 4 and, old, 3; lora_ranks says {'rank': 16"),
        (lambda c: c["state_dict"].clear(), "holds no module besides"),
        (lambda c: c.update(state_dict=[1]), "holds other things than tensors by name"),
        (lambda c: c["state_dict"].update(x=1), "holds other things than tensors by name"),
        (put("other.lora_A", torch.ones(1, 1)), "is incomplete: it lacks other.gate"),
    ],
)  # fmt: skip
def test_checkpoints_of_codyra_that_are_refused(tmp_path, change, message):
    checkpoint, _ = codyra()
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "a.pth")
    refused(import_codyra, clip().copy(), tmp_path / "a.pth", message)


def test_another_model(tmp_path):
    torch.save(codyra()[0], tmp_path / "a.pth")
    refused(
        import_codyra,
        sequential().copy(),
        tmp_path / "a.pth",
        "adapts 'visual.*_proj', and the model has no such layer",
    )
    model = adapted(clip())
    refused(import_codyra, model, tmp_path / "a.pth", "no such layer.*fastlora.remove|has adapters that")
    torch.save(flat({"0": codyra_module(8, 8), "1": codyra_module(8, 8)}), tmp_path / "b.pth")
    refused(import_codyra, sequential().copy(), tmp_path / "b.pth", "adapts '1', which is a GELU here", TypeError)


def test_the_other_ones_checkpoint(tmp_path):
    case = sora_case()
    torch.save(sora(case)[0], tmp_path / "sora.bin")
    torch.save(codyra()[0], tmp_path / "codyra.pth")
    refused(import_codyra, case.copy(), tmp_path / "sora.bin", "a checkpoint of SoRA is for import_sora")
    refused(
        import_sora, clip().copy(), tmp_path / "codyra.pth", "a checkpoint of CoDyRA is for import_codyra", alpha=16
    )


def test_checkpoints_of_sora_that_are_refused(tmp_path):
    case = sora_case()
    checkpoint, _ = sora(case)
    path = tmp_path / "pytorch_model.bin"
    for key, tensor, message in (
        ("head.weight", torch.ones(2), "holds head.weight, which the model has not, or in another shape"),
        ("classifier.dense.weight", torch.ones(2, 2), "holds classifier.dense.weight, which the model has not"),
        ("roberta.encoder.layer.0.attention.self.query.lora.gate", torch.ones(1, 9), "of shapes"),
    ):
        torch.save(checkpoint | {key: tensor}, path)
        refused(import_sora, case.copy(), path, message, alpha=16)
    torch.save(checkpoint, path)
    for alpha, kind in ((float("nan"), ValueError), ("16", TypeError)):
        refused(import_sora, case.copy(), path, "alpha is", kind, alpha=alpha)


class Payload:
    def __reduce__(self):
        return (open, ("opened", "w"))


def test_files_that_are_damaged_or_hold_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save(codyra()[0], path)
    whole = path.read_bytes()
    torch.save({"state_dict": Payload()}, tmp_path / "payload.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    for content_ in (whole[:-30], whole[:9], b"", b"junk", b"\x80\x04N.", *(
        (tmp_path / name).read_bytes() for name in ("payload.pth", "module.pth")
    )):  # fmt: skip
        path.write_bytes(content_)
        refused(import_codyra, clip().copy(), path, "is damaged, or holds more than tensors|holds a NoneType")
    assert not (tmp_path / "opened").exists()
    (tmp_path / "a.safetensors").write_bytes(whole)
    refused(import_codyra, clip().copy(), tmp_path / "a.safetensors", "a.safetensors is damaged")
    refused(import_codyra, clip().copy(), tmp_path / "none.pth", re.escape("none.pth"), FileNotFoundError)
