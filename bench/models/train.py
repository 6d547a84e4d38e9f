"""How the small model is made: a byte-level BPE tokenizer and a Llama of 1.7 M parameters, trained on a CPU in minutes.

Run `python -m bench.models.train --out bench/models/tiny`. The same seed, steps and threads give the same weights.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.models.make_chats import NOISE_APOLOGY, chat, noise, render_chat, render_message
from bench.models.make_text import plain_document, plain_documents, story
from bench.models.words import ANIMALS

VOCAB_SIZE = 1024
MAX_POSITIONS = 16384
CONTROL_TOKENS = ("<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# Not "special": they must survive decoding, since a tool parser looks for them in the text.
TEXT_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Phase:
    """A share of the training steps at one shape of batch."""

    share: float
    num_rows: int
    context_tokens: int


# Short rows first, because they are cheap; long ones last, so that a context of thousands of tokens stays readable.
PHASES = (Phase(0.58, 8, 256), Phase(0.26, 6, 512), Phase(0.16, 2, 2048))


@dataclass(frozen=True, slots=True)
class Piece:
    """Token ids and whether the loss counts them."""

    ids: list[int]
    is_learned: bool


def make_tokenizer(seed: int) -> Tokenizer:
    rng = Random(seed)
    texts = list(islice(plain_documents(seed), 1500))
    texts += [message.text for _ in range(6000) for message in chat(rng) if not message.is_noise]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TEXT_TOKENS),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TEXT_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


class TokenSource:
    """An endless run of packed documents, cut into rows."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = Random(seed)
        self._pieces = self._make_pieces()
        self._ids: list[int] = []
        self._learned: list[bool] = []
        newline_ids: list[int] = tokenizer.encode("\n", add_special_tokens=False).ids
        self._break_ids = torch.tensor([*newline_ids, tokenizer.token_to_id("<s>")])

    def _piece(self, text: str, is_learned: bool = True) -> Piece:
        return Piece(self._tokenizer.encode(text, add_special_tokens=False).ids, is_learned)

    def _random_ids(self) -> Piece:
        count = self._rng.choice((4, 12, 40, 150))
        last = VOCAB_SIZE - len(TEXT_TOKENS) - 1
        return Piece([self._rng.randint(len(CONTROL_TOKENS), last) for _ in range(count)], is_learned=False)

    def _make_pieces(self) -> Iterator[Piece]:
        rng = self._rng
        while True:
            kind = rng.random()
            if kind < 0.60:
                yield self._piece("<s>")
                for message in chat(rng):
                    yield self._piece(render_message(message), not message.is_noise)
            elif kind < 0.92:
                yield self._piece(f"<s>{plain_document(rng)}")
            elif kind < 0.96:
                yield self._piece("<s>")
                yield self._random_ids() if rng.random() < 0.6 else self._piece(noise(rng), is_learned=False)
                yield self._piece(f"\n{plain_document(rng)}")
            else:
                yield self._piece("<s><|user|>")
                yield self._random_ids()
                yield self._piece(f"<|end|><|assistant|>{NOISE_APOLOGY}\n{story(rng, rng.choice(ANIMALS), 4)}<|end|>")
            yield self._piece("</s>")

    def batch(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input ids, position ids and labels (-100: not counted), each (rows, context)."""
        need = phase.num_rows * (phase.context_tokens + 1)
        while len(self._ids) < need:
            piece = next(self._pieces)
            self._ids += piece.ids
            self._learned += [piece.is_learned] * len(piece.ids)
        ids = torch.tensor(self._ids[:need]).view(phase.num_rows, -1)
        learned = torch.tensor(self._learned[:need]).view(phase.num_rows, -1)
        del self._ids[:need], self._learned[:need]
        inputs = ids[:, :-1].contiguous()
        labels = ids[:, 1:].masked_fill(~learned[:, 1:], -100)
        positions = torch.stack([self._positions(row) for row in inputs])
        return inputs, positions, labels

    def _positions(self, row: torch.Tensor) -> torch.Tensor:
        """Positions of a row with a few long jumps at line ends, so that far distances are seen."""
        rng = self._rng
        spare = MAX_POSITIONS - len(row)
        jumps = torch.zeros(len(row), dtype=torch.long)
        breaks = torch.isin(row, self._break_ids).nonzero().flatten().tolist()
        if breaks and rng.random() < 0.5:
            for place in rng.sample(breaks, min(len(breaks), rng.randrange(1, 4))):
                jump = int(spare * rng.random() ** 3)
                jumps[place] = jump
                spare -= jump
        return torch.arange(len(row)) + jumps.cumsum(0) + rng.randrange(spare + 1)


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id("<s>"),
            eos_token_id=tokenizer.token_to_id("<|end|>"),
            dtype="float32",
        )
    )


def phase_of(done: float) -> Phase:
    for phase in PHASES:
        done -= phase.share
        if done < 0:
            return phase
    return PHASES[-1]


def learning_rate(done: float, peak: float) -> float:
    """Warm-up over the first 3 %, level to half way, then a cosine down to 2 % of the peak."""
    if done < 0.03:
        return peak * done / 0.03
    if done < 0.5:
        return peak
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - 0.5) / 0.5)))


def train(model: LlamaForCausalLM, source: TokenSource, num_steps: int, peak_rate: float) -> None:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98), fused=True)
    model.train()
    started_s, num_tokens, smooth = time.monotonic(), 0, 0.0
    for step in range(num_steps):
        phase = phase_of(step / num_steps)
        rate = learning_rate((step + 1) / num_steps, peak_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, positions, labels = source.batch(phase)
        # The mask of ones keeps transformers from reading a jump in the positions as the start of another sequence.
        output = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_tokens += ids.numel()
        smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
        if step % 10 == 9 or step == num_steps - 1:
            used_s = time.monotonic() - started_s
            left_s = used_s / num_tokens * sum(_tokens_at(s, num_steps) for s in range(step + 1, num_steps))
            print(
                f"step {step + 1}/{num_steps}  context {phase.context_tokens}  loss {smooth:.3f}  "
                f"{num_tokens / used_s:.0f} tokens/s  {used_s:.0f} s done, about {left_s:.0f} s to go",
                flush=True,
            )


def _tokens_at(step: int, num_steps: int) -> int:
    phase = phase_of(step / num_steps)
    return phase.num_rows * phase.context_tokens


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    end, stop = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("</s>")
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.token_to_id("<s>"), eos_token_id=[end, stop])
    model.eval().save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    shutil.copyfile(CHAT_TEMPLATE, out / CHAT_TEMPLATE.name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small model of the tests, the demo and the benches.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed)
    example = render_chat(chat(Random(args.seed)))
    num_ids = len(tokenizer.encode(example, add_special_tokens=False).ids)
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens, {len(example) / num_ids:.1f} characters a token in a chat")
    model = make_model(tokenizer)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, TokenSource(tokenizer, args.seed + 1), args.steps, args.rate)
    save(model, tokenizer, args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
