"""Tiny random models of transformers, built from their configs; nothing is downloaded."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install 'fastlora[dev]')")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 64
WIDTHS = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LANGUAGE_MODELS = {"llama": "Llama", "gemma": "Gemma", "gemma3": "Gemma3", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def language_model(family: str = "llama", **options):
    """A causal language model in eval mode; its weights are large enough that outputs are near 1."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
            bos_token_id=1, eos_token_id=2, initializer_range=0.2, **options,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    name = LANGUAGE_MODELS[family]
    kind = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    config = kind(**{**WIDTHS, "initializer_range": 0.2, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def clip_model():
    """A CLIP of transformers' own build in eval mode."""
    torch.manual_seed(0)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**widths, **tokens, "vocab_size": VOCABULARY, "max_position_embeddings": 16},
        vision_config={**widths, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    return transformers.CLIPModel(config).eval()


def token_ids(batch: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))
