"""Which LoRA adapters do the tests load? Random ones for the tests' model, large enough to change what it says."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from tests.support.model import tiny_model_path

RANK = 8
SPREAD = 0.2


def write_adapter(folder: Path, seed: int) -> Path:
    """Make (or overwrite) an adapter of `RANK` over queries and values; equal seeds make equal files."""
    config = json.loads((tiny_model_path() / "config.json").read_text())
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


def adapter_of(folder: Path, number: int) -> LoRARequest:
    """As a gateway names it: the folder's name, its path, and a number of its own."""
    return LoRARequest(folder.name, number, str(folder))
