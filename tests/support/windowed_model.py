"""Which model sees through sliding windows? A random small Gemma 3, with layers of full attention among them or not."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

from tests.support.model import random_model_path

WINDOW = 64
"""Tokens that a sliding layer sees: two blocks of the tests' 32."""
MIXED = "SFSSF"
"""vLLM makes three KV-cache groups of it: two of sliding layers, one of full ones."""
SLIDING = "SS"
"""One group."""


@functools.cache
def windowed_model_path(layers: str) -> Path:
    """Its layers from first to last, S a sliding one, F a full one. Made once in a run. The spread of its weights makes
    greedy output no fixed point, and a wrong KV byte show."""
    folder = Path(tempfile.gettempdir()) / f"kvferry-windowed-model-1-{WINDOW}-{layers}"
    if not (folder / "done").is_file():
        folder.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_text((random_model_path() / name).read_text())
        _write_weights(folder, layers)
        (folder / "done").touch()
    return folder


def _write_weights(folder: Path, layers: str) -> None:
    # Imported here: they cost seconds, and most runs find the folder.
    import torch  # noqa: PLC0415
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig  # noqa: PLC0415

    vocabulary = json.loads((random_model_path() / "config.json").read_text())["vocab_size"]
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
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
