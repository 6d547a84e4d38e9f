"""Which steps did real engines run, and how long did each take? Published tables as rows the step-time model learns."""

from __future__ import annotations

import csv
import gzip
import os
import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from instance.messages import WIDE_STEP_TOKENS
from orchestrator.policy.steptime import Observation

Row = Observation
NUM_LAYERS = {"llama31-8b": 32, "llama2-70b": 80}
ENGINE_MS = 1.0
"""What a step of vLLM takes beside its kernels, as published with the LLMServingSim tables; added to kernel times."""
VIDUR_MODEL = "Llama-2-70b-hf"
VIDUR_LAYER_TIMES = (
    "input_layernorm_ms", "attn_pre_proj_ms", "attn_rope_ms", "attn_post_proj_ms", "post_attention_layernorm_ms",
    "mlp_up_proj_ms", "mlp_act_ms", "mlp_down_proj_ms", "add_ms",
)  # fmt: skip


def data_folder() -> Path | None:
    """KVFERRY_DATA, or ../shared/data beside the checkout; None: neither is there."""
    root = Path(__file__).resolve().parent.parent
    folder = Path(os.environ.get("KVFERRY_DATA") or root.parent / "shared" / "data")
    return folder if (folder / "profiles").is_dir() else None


def tables(folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """(instance, its steps), for each profile that has whole steps or all the kernels of one."""
    profiles = folder / "profiles"
    yield from splitwise(profiles / "splitwise_perf_model.csv.gz")
    for gpu in ("RTXPRO6000", "RTX4090"):
        yield f"{gpu} llama31-8b (kernels)", llmservingsim(profiles, gpu)
    yield "a100 llama2-70b tp2 (kernels)", vidur(profiles)


def row(chunk: int, before: int, num_chunks: int, num_decoding: int, context: int, seconds: float) -> Row:
    """`num_chunks` prefills of `chunk` tokens after `before` others, and decodes that read `context` tokens in all."""
    num_tokens = chunk * num_chunks + num_decoding
    wide = max(0, num_tokens - WIDE_STEP_TOKENS)
    pairs = num_chunks * (chunk * before + chunk * chunk // 2)
    terms = (1.0, float(num_tokens), float(wide), float(num_decoding), float(context), float(pairs))
    return Observation(terms, seconds, chunk > 0)


def splitwise(path: Path) -> Iterator[tuple[str, list[Row]]]:
    """Whole iterations: a prompt's (all of a batch at once) and a decode step at the middle of its output."""
    rows: defaultdict[str, list[Row]] = defaultdict(list)
    for line in _lines(path):
        if line["hardware"].endswith("-pcap"):
            continue  # scaled, not measured
        name = f"{line['hardware']} {line['model']} tp{line['tensor_parallel']} (iterations)"
        size, batch, output = int(line["prompt_size"]), int(line["batch_size"]), int(line["token_size"])
        rows[name].append(row(size, 0, batch, 0, 0, float(line["prompt_time"]) / 1e3))
        context = batch * (size + output // 2)
        rows[name].append(row(0, 0, 0, batch, context, float(line["token_time"]) / 1e3))
    yield from sorted(rows.items())


def llmservingsim(profiles: Path, gpu: str) -> list[Row]:
    """Each measured batch of the attention table as a step: with the dense layers of as many tokens, and the head."""
    stem = f"llmservingsim_{gpu}_llama31-8b_tp1"
    dense: defaultdict[int, float] = defaultdict(float)
    for line in _lines(profiles / f"{stem}_dense.csv.gz"):
        is_once = line["layer"] in ("embedding", "final_layernorm")
        layers = (
            1 if is_once else 2 * NUM_LAYERS["llama31-8b"] if line["layer"] == "layernorm" else NUM_LAYERS["llama31-8b"]
        )
        dense[int(line["tokens"])] += layers * float(line["time_us"])
    head: defaultdict[int, float] = defaultdict(float)
    for line in _lines(profiles / f"{stem}_per_sequence.csv.gz"):
        head[int(line["sequences"])] += float(line["time_us"])
    rows = []
    for line in _lines(profiles / f"{stem}_attention.csv.gz"):
        chunk, before = int(line["prefill_chunk"]), int(line["kv_prefill"])
        decoding, each = int(line["n_decode"]), int(line["kv_decode"])
        num_tokens, num_sequences = chunk + decoding, decoding + (chunk > 0)
        if num_tokens > max(dense):
            continue
        us = between(dense, num_tokens) + between(head, num_sequences)
        us += NUM_LAYERS["llama31-8b"] * float(line["time_us"])
        rows.append(row(chunk, before, int(chunk > 0), decoding, decoding * each, us / 1e6 + ENGINE_MS / 1e3))
    return rows


def vidur(profiles: Path) -> list[Row]:
    """Llama-2-70B on two A100: attention table and layer medians. A step of one kind only, as they were measured."""
    layers: defaultdict[int, list[float]] = defaultdict(list)
    for line in _lines(profiles / "vidur_mlp_layer_medians.csv.gz"):
        if (line["gpu"], line["model"], line["tp"]) == ("a100", VIDUR_MODEL, "2"):
            layers[int(line["num_tokens"])].append(sum(float(line[key] or 0.0) for key in VIDUR_LAYER_TIMES))
    dense = {num_tokens: statistics.median(times) for num_tokens, times in layers.items()}
    rows = []
    for line in _lines(profiles / "vidur_a100_llama2-70b_tp2_attention.csv.gz"):
        batch, chunk, cached = int(line["batch_size"]), int(line["prefill_chunk"]), int(line["kv_cache"])
        attention = float(line["prefill_ms"] or 0.0) if chunk else float(line["decode_ms"] or 0.0)
        num_tokens = batch * chunk if chunk else batch
        if attention <= 0.0 or not dense or num_tokens > max(dense):
            continue
        seconds = NUM_LAYERS["llama2-70b"] * (between(dense, num_tokens) + attention) / 1e3 + ENGINE_MS / 1e3
        if chunk:
            rows.append(row(chunk, cached, batch, 0, 0, seconds))
        else:
            rows.append(row(0, 0, 0, batch, batch * cached, seconds))
    return rows


def between(measured: dict[int, float], at: int) -> float:
    """Linear interpolation; at the ends the nearest point."""
    points = sorted(measured)
    right = bisect_left(points, at)
    if right == 0:
        return measured[points[0]]
    if right == len(points):
        return measured[points[-1]]
    low, high = points[right - 1], points[right]
    share = (at - low) / (high - low)
    return measured[low] + share * (measured[high] - measured[low])


def _lines(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        yield from csv.DictReader(file)
