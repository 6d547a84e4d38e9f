"""Which model sees through sliding windows? A random small Gemma 3, with layers of full attention among them or not."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WINDOW = 64
"""Tokens that a sliding layer sees: two blocks of 32."""
MIXED = "SFSSF"
"""vLLM makes three KV-cache groups of it: two of sliding layers, one of full ones."""
SLIDING = "SS"
"""One group."""
MAX_MODEL_LEN = 8192
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_windowed_model(folder: Path, layers: str, tokenizer: Path) -> Path:
    """Make it in `folder`, unless it is there already, and return that; about a second. `layers` from first to last:
    S a sliding one, F a full one. `tokenizer`: a model's folder, whose vocabulary it takes. The spread of its weights
    makes greedy output no fixed point, and a wrong KV byte show."""
    done = folder / "done"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name in _TOKENIZER:
            (folder / name).write_text((tokenizer / name).read_text())
        _write_weights(folder, layers, json.loads((tokenizer / "config.json").read_text())["vocab_size"])
        done.touch()
    return folder


def _write_weights(folder: Path, layers: str, vocab_size: int) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: PLC0415 - seconds, and mostly it is there

    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        sliding_window=WINDOW,
        layer_types=["sliding_attention" if layer == "S" else "full_attention" for layer in layers],
        bos_token_id=0,
        eos_token_id=1,
        query_pre_attn_scalar=32,
        tie_word_embeddings=True,
    )
    model = Gemma3ForCausalLM(config).to(torch.float32)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            spread = 0.02 if "embed" in name else 2.0 / parameter.shape[1] ** 0.5
            parameter.data.normal_(0, spread, generator=generator)
    model.save_pretrained(folder)
