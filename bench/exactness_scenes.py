"""In which surroundings does bench.exactness move requests? Scenes: a pair of engines each, and what they are made of.

The trained small model, with random LoRA adapters in one scene; random models with sliding windows and with images in
two others. What is random is made on first use, with a fixed seed, in bench-out/made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from vllm.lora.request import LoRARequest

from bench.fleet import PROGRAM
from bench.models.adapters import RANK, write_adapter
from bench.models.pictured import write_pictured_model
from bench.models.windowed import MIXED, write_windowed_model

MODEL = Path(__file__).parent / "models" / "tiny"
MADE = Path("bench-out/made")
BLOCK_TOKENS = 32
ADAPTERS = ("red", "blue")
"""A request's number for them is their place here, from 1."""


class Scene(Enum):
    """What the two instances are like. One pair runs at a time."""

    ROOMY = "roomy"
    CHUNKED = "chunked"
    """A step computes 24 tokens at most: prompts take many."""
    TIGHT = "tight"
    """Few blocks and few slots: requests wait, and those of low priority are preempted."""
    ADAPTED = "adapted"
    """Each of its requests has one of two LoRA adapters. None is without: vLLM's CPU path (0.32) reads the last slot's
    adapter for a request that has none, while others in its batch have one, moved or not."""
    WINDOWED = "windowed"
    """The model has layers with sliding windows and layers of full attention: three KV-cache groups."""
    GUESSED = "guessed"
    """Tokens are guessed ahead by ngrams. Compared without logprobs: unmoved, too, their last bits depend on what else
    is in the batch (7 of 8 requests), since that decides how many guesses share a step."""

    ASYNCHRONOUS = "asynchronous"
    """A step is scheduled before the tokens of the one before it are known, as on GPUs."""
    PICTURED = "pictured"
    """The model sees images; each prompt has one or two. Compared without logprobs: unmoved, too, their last bits
    depend on what else is in the batch (26 of 26 requests). tests/integration compares them, one request at a time."""
    RANKS = "ranks"
    """Tensor parallelism over two ranks, each with its half of the KV."""

    @property
    def needs_crowd(self) -> bool:
        """A crowd is what makes requests wait, be preempted, be cut into chunks: there the batches are always full."""
        return self in (Scene.CHUNKED, Scene.TIGHT)


NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
_ROOM = ("--max-num-seqs", "32", "--num-gpu-blocks-override", "513")
ENGINE_FLAGS: Mapping[Scene, tuple[str, ...]] = {
    Scene.ROOMY: _ROOM,
    Scene.CHUNKED: ("--max-num-seqs", "16", "--num-gpu-blocks-override", "513", "--max-num-batched-tokens", "24"),
    Scene.TIGHT: ("--max-num-seqs", "6", "--num-gpu-blocks-override", "46", "--scheduling-policy", "priority"),
    Scene.ADAPTED: (*_ROOM, "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", str(len(ADAPTERS))),
    Scene.WINDOWED: _ROOM,
    Scene.GUESSED: (*_ROOM, "--speculative-config", json.dumps(NGRAM)),
    Scene.ASYNCHRONOUS: _ROOM,
    Scene.PICTURED: _ROOM,
    Scene.RANKS: (*_ROOM, "--tensor-parallel-size", "2"),
}
SHARES: Mapping[Scene, int] = {
    Scene.ROOMY: 8,
    Scene.CHUNKED: 8,
    Scene.TIGHT: 4,
    Scene.ADAPTED: 8,
    Scene.WINDOWED: 8,
    Scene.GUESSED: 8,
    Scene.ASYNCHRONOUS: 8,
    Scene.PICTURED: 2,
    Scene.RANKS: 2,
}
"""Of the requests, for each kind of the scene: in the tight one most tries find the request in another state,
and encoders, or six processes, are slow on few cores."""
AT_ONCE: Mapping[Scene, int] = {
    Scene.ROOMY: 16,
    Scene.CHUNKED: 10,
    Scene.TIGHT: 24,
    Scene.ADAPTED: 12,
    Scene.WINDOWED: 16,
    Scene.GUESSED: 16,
    Scene.ASYNCHRONOUS: 16,
    Scene.PICTURED: 12,
    Scene.RANKS: 8,
}
"""Requests in both instances together, moved and unmoved."""


def engine_argv(scene: Scene) -> tuple[str, ...]:
    """As of `vllm serve`; what the scene is made of is there afterwards."""
    model = MODEL
    if scene is Scene.WINDOWED:
        model = write_windowed_model(MADE / f"windowed-{MIXED}", MIXED, MODEL)
    if scene is Scene.PICTURED:
        model = write_pictured_model(MADE / "pictured", MODEL)
    if scene is Scene.ADAPTED:
        for number, name in enumerate(ADAPTERS, start=1):
            write_adapter(MADE / name, number, MODEL)
    common = ("--dtype", "float32", "--max-model-len", "1024", "--block-size", str(BLOCK_TOKENS))
    return (str(model.resolve()), *common, "--kv-cache-memory-bytes", str(64 << 20), *ENGINE_FLAGS[scene])


def program_of(scene: Scene, control: str | None) -> tuple[str, ...]:
    """The module that an instance is, and its first arguments. A control's instances schedule synchronously."""
    if control:
        return ("bench.exactness_sabotage", control)
    return ("bench.exactness_asynchronous",) if scene is Scene.ASYNCHRONOUS else PROGRAM


def adapter_of(name: str | None) -> LoRARequest | None:
    """As a gateway names it."""
    return None if name is None else LoRARequest(name, ADAPTERS.index(name) + 1, str((MADE / name).resolve()))
