"""Does the small model behave in real vLLM: readable answers, a batch equal to one by one, long prompts, tool calls?

Run `VLLM_ENABLE_V1_MULTIPROCESSING=0 HF_HUB_OFFLINE=1 python -m bench.models.check_vllm --model bench/models/tiny`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

from vllm import LLM, SamplingParams
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

from bench.models.make_chats import chat, render_chat
from bench.models.make_text import plain_documents
from bench.models.measure import QUESTIONS, TOOLS

KV_CACHE_BYTES = 64 << 20
MAX_MODEL_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Comparison:
    """Greedy tokens of a batch against the same prompts one by one."""

    num_prompts: int
    num_tokens: int
    num_different: int


def compare_batch(llm: LLM, prompts: list[str], num_tokens: int) -> Comparison:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    together = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]
    alone = [list(llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids) for prompt in prompts]
    pairs = [(a, b) for one, other in zip(together, alone, strict=True) for a, b in zip(one, other, strict=True)]
    return Comparison(len(prompts), len(pairs), sum(a != b for a, b in pairs))


def packed_text(num_tokens: int, seed: int) -> str:
    """Documents and chats, at about four characters a token."""
    rng = Random(seed)
    parts: list[str] = []
    for text in plain_documents(seed):
        parts.append(f"<s>{text}</s>{render_chat(chat(rng))}</s>")
        if sum(map(len, parts)) > 3.7 * num_tokens:
            return "".join(parts).removeprefix("<s>")  # the tokenizer puts one in front
    raise AssertionError("plain_documents has no end")


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the small model in real vLLM.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batch-tokens", type=int, default=300)
    args = parser.parse_args()
    llm = LLM(
        model=str(args.model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=MAX_MODEL_TOKENS,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        distributed_executor_backend="uni",
        block_size=32,
        max_num_seqs=16,
        gpu_memory_utilization=0.3,
    )
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=200)
        for question in QUESTIONS:
            output = llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)[0]
            print(f"\n> {question} (temperature {temperature:g})\n{output.outputs[0].text}")
    params = SamplingParams(temperature=0.0, max_tokens=60)
    question = "What is the weather in Oslo?"
    output = llm.chat([{"role": "user", "content": question}], params, tools=TOOLS, use_tqdm=False)[0]
    calls = Hermes2ProToolParser.tool_call_regex.findall(output.outputs[0].text)
    print(f"\n> {question} (with a tool)\n{output.outputs[0].text}\nhermes parser finds: {calls}")
    text = packed_text(6000, seed=6) + "<s><|user|>Write the diary of Leo for 4 days.<|end|><|assistant|>"
    output = llm.generate([text], SamplingParams(temperature=0.0, max_tokens=250), use_tqdm=False)[0]
    print(f"\n> after {len(output.prompt_token_ids or [])} tokens: diary of Leo\n{output.outputs[0].text}")
    openings = [text[: text.index(" ", 60)] for text in islice(plain_documents(99), 60) if len(text) > 300]
    chats = [f"<|user|>{question}<|end|><|assistant|>" for question in QUESTIONS]
    for title, prompts in (("plain text", openings[:8]), ("chats running on past their end", chats)):
        print(f"\nbatch of 8 against one by one, {title}: {compare_batch(llm, prompts, args.batch_tokens)}")


if __name__ == "__main__":
    main()
