"""How readable and how sure the small model is: sample answers, logit margins of greedy decoding, a long prompt.

Run `python -m bench.models.measure --model bench/models/tiny`. No vLLM: transformers in float32.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.models.make_chats import chat, render_chat
from bench.models.make_text import plain_documents

QUESTIONS = (
    "Tell me a long story about an owl.",
    "Write the diary of Kate for 3 days.",
    "What does a bear eat?",
    "Give me Emma as JSON.",
    "Name five fruits.",
    "What is 7 plus 5?",
    "How do I get from the forest to the school?",
    "Explain the theory of relativity.",
)
TOOLS: list[dict[str, object]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
MARGINS = (0.01, 0.1, 1.0)


class Reader:
    """The model and its tokenizer, decoding greedily or at temperature 1."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def chat_ids(self, question: str, tools: list[dict[str, object]] | None = None) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        return self.text_ids(text)

    def text_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def write(self, prompt: list[int], max_tokens: int, *, is_greedy: bool = True) -> str:
        output = self._model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=not is_greedy)
        text: str = self._tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=False)
        return text

    def margins(self, prompt: list[int], num_tokens: int) -> torch.Tensor:
        """Gap between the best and the second logit of each greedy step; a finished answer runs on; (num_tokens,)."""
        cache, gaps = None, []
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(num_tokens):
                output = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                top = output.logits[0, -1].topk(2)
                gaps.append(top.values[0] - top.values[1])
                ids = top.indices[:1].view(1, 1)
        return torch.stack(gaps)


def long_prompt(reader: Reader, num_tokens: int, seed: int) -> list[int]:
    """Packed documents and chats of at least `num_tokens` tokens, then nothing."""
    rng = Random(seed)
    ids: list[int] = []
    for text in plain_documents(seed):
        ids += reader.text_ids(f"<s>{text}</s>{render_chat(chat(rng))}</s>")
        if len(ids) >= num_tokens:
            return ids
    raise AssertionError("plain_documents has no end")


def print_margins(gaps: torch.Tensor, title: str) -> None:
    shares = "  ".join(f"> {margin:g}: {(gaps > margin).float().mean():.2%}" for margin in MARGINS)
    print(f"{title} ({len(gaps)} greedy steps): {shares}  smallest {gaps.min():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples and logit margins of the small model.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--margin-tokens", type=int, default=300, help="greedy steps a question")
    args = parser.parse_args()
    torch.manual_seed(0)
    reader = Reader(args.model)
    for question in QUESTIONS:
        prompt = reader.chat_ids(question)
        print(f"\n> {question}\ngreedy:  {reader.write(prompt, 300)}")
        print(f"sampled: {reader.write(prompt, 300, is_greedy=False)}")
    question = "What is the weather in Oslo?"
    print(f"\n> {question} (with a tool)\n{reader.write(reader.chat_ids(question, TOOLS), 60)}")
    for num_tokens in (4000, 8000, 12000):
        prompt = long_prompt(reader, num_tokens, seed=num_tokens)
        prompt += reader.chat_ids("Write the diary of Leo for 4 days.")
        print(f"\n> after {len(prompt)} tokens: Write the diary of Leo for 4 days.\n{reader.write(prompt, 300)}")
    texts = [text[: text.index(" ", 60)] for text in islice(plain_documents(99), 200) if len(text) > 300]
    prompts = [reader.chat_ids(question) for question in QUESTIONS]
    gaps = torch.cat([reader.margins(prompt, args.margin_tokens) for prompt in prompts])
    print_margins(gaps, "\nmargins, chats running on past their end")
    gaps = torch.cat([reader.margins(reader.text_ids(f"<s>{text}"), args.margin_tokens) for text in texts[:8]])
    print_margins(gaps, "margins, plain text")


if __name__ == "__main__":
    main()
