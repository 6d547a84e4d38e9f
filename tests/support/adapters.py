"""Which LoRA adapters do the tests load? Random ones for the tests' model, large enough to change what it says."""

from __future__ import annotations

from pathlib import Path

from vllm.lora.request import LoRARequest

from bench.models import adapters
from bench.models.adapters import RANK
from tests.support.model import tiny_model_path

__all__ = ["RANK", "adapter_of", "write_adapter"]


def write_adapter(folder: Path, seed: int) -> Path:
    return adapters.write_adapter(folder, seed, tiny_model_path())


def adapter_of(folder: Path, number: int) -> LoRARequest:
    """As a gateway names it: the folder's name, its path, and a number of its own."""
    return LoRARequest(folder.name, number, str(folder))
