"""Models of open_clip for the benchmarks of real images: by name and tag, or from files."""

from __future__ import annotations

import difflib
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
from torch import nn

from fastlora.continual.config import UsageError, nearest
from fastlora.continual.datasets.transforms import Transforms


class Clip(NamedTuple):
    """Model (float32, eval mode), tokenizer, and how images become its input."""

    model: nn.Module
    tokenizer: Any
    transforms: Transforms


def load_clip(model: str, pretrained: str) -> Clip:
    """An open_clip model with weights.

    The activation is the one that the weights were trained with: open_clip's ViT-B-16 has GELU, its openai weights were
    trained with QuickGELU. For a tag open_clip tells which, and it is followed; of a file only OpenAI's own archives
    tell, so for other files the name decides (ViT-B-16-quickgelu).

    Args:
        model: architecture as open_clip lists it, or a JSON file that describes one (embed_dim, vision_cfg, text_cfg).
        pretrained: open_clip's tag, or a file of weights.
    Raises:
        UsageError: no such architecture, or neither a tag nor a file. RuntimeError: the weights cannot be had or read;
            the message says which file to put where.
    """
    name = registered(model)
    tags = open_clip.list_pretrained_tags_by_model(name)
    is_file = Path(pretrained).is_file()
    if pretrained not in tags and not is_file:
        raise UsageError(
            f"pretrained is {pretrained!r}: neither a file nor a tag of {model}; tags: {', '.join(tags) or '(none)'}."
            f"{nearest(pretrained, tags)} Pass one of them, or the path of a file of weights."
        )
    archive = is_file and _is_archive(Path(pretrained))
    quick_gelu = archive or (not is_file and bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu")))
    try:
        built, train, test = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, force_quick_gelu=quick_gelu, weights_only=not archive
        )
    except Exception as error:  # open_clip, torch, safetensors and the hub raise what they like
        raise RuntimeError(_how_to_get(model, name, pretrained, is_file, error)) from error
    return Clip(built.eval(), open_clip.get_tokenizer(name), Transforms.of(train, test))


def registered(model: str) -> str:
    """open_clip's name of an architecture; a JSON file is made known to it under the file's stem."""
    if not model.endswith(".json"):
        known = open_clip.list_models()
        if model not in known:
            near = difflib.get_close_matches(model, known, 3) or ["ViT-B-16"]
            raise UsageError(
                f"model is {model!r}, which is none of open_clip's {len(known)}; near: {', '.join(near)}. Give one of its "
                "names, or a JSON file that describes a model."
            )
        return model
    path = Path(model)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"model is {model!r}, which cannot be read as JSON ({error}). Give open_clip's form."
        ) from None
    if not isinstance(config, dict):
        raise UsageError(f"{model} holds a {type(config).__name__}; give a description in open_clip's form, a mapping.")
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in config]
    if missing:
        raise UsageError(
            f"{model} has no {', '.join(missing)}; a model is described by embed_dim, vision_cfg and text_cfg, as in "
            "open_clip's model_configs."
        )
    known = open_clip.get_model_config(path.stem)
    if known is not None and known != config:
        raise UsageError(f"{model} has the name of another model of open_clip, {path.stem!r}. Rename the file.")
    open_clip.add_model_config(path)
    return path.stem


def _is_archive(path: Path) -> bool:
    """Whether the file is a TorchScript archive, as OpenAI publishes its weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.split("/")[1:] == ["constants.pkl"] for name in file.namelist())


def _how_to_get(model: str, name: str, pretrained: str, is_file: bool, error: Exception) -> str:
    text = " ".join(str(error).split())
    if is_file:
        return f"{pretrained} cannot be loaded into {model} ({text}). Check that the file is of this architecture."
    facts = open_clip.get_pretrained_cfg(name, pretrained)
    hub = (facts.get("hf_hub") or "").strip("/")
    sources = [f"open_clip_model.safetensors of {hub} on the Hugging Face hub"] if hub else []
    sources += [facts["url"]] if facts.get("url") else []
    quick = f"{name}-quickgelu" if facts.get("quick_gelu") and f"{name}-quickgelu" in open_clip.list_models() else name
    return (
        f"the weights {pretrained!r} of {model} cannot be had here ({text}). Download {' or '.join(sources)} where there "
        f"is a network, put the file anywhere on this machine, and pass --model {quick} --pretrained PATH/OF/THE/FILE."
    )
