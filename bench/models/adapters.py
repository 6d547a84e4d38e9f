"""Which LoRA adapters do benches and tests load? Random ones, large enough to change what a model says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8
SPREAD = 0.2


def write_adapter(folder: Path, seed: int, model: Path) -> Path:
    """Make (or overwrite) an adapter of `RANK` over queries and values of the Llama in `model`; equal seeds make equal
    files. Returns `folder`."""
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    outputs = {"q_proj": head * config["num_attention_heads"], "v_proj": head * config["num_key_value_heads"]}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, num_out in outputs.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * SPREAD
            weights[f"{name}.lora_B.weight"] = torch.randn(num_out, RANK, generator=generator) * SPREAD
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(outputs),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "any",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
