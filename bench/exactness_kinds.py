"""Which kinds of request does bench.exactness move, in which surroundings, and what does one request of a kind look
like? Everything about a request follows from its kind and its seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from random import Random
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from bench import exactness_grammars as grammars
from bench.exactness_scenes import ADAPTERS, Scene
from bench.models.make_chats import chat, render_chat, tool_chat
from bench.models.make_text import plain_document
from bench.models.pictured import Picture

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 40, 400
MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS = 30, 70
MAX_HOPS = 4
LAST_HOP_SHARE = 0.7
"""Of a request's longest output: no hop is planned later."""


class Found(Enum):
    """In which state the first move must have found the request, or it does not count for its kind."""

    ANY = "decoding, or about to"
    HALF_COMPUTED = "some of its prompt computed, not all"
    WAITING = "not begun"
    UNCOMPILED = "waiting when the move was ordered"
    """What it waits for is its grammar; the destination compiles it before the stop, so by then it may run."""
    PREEMPTED = "preempted after some output"
    CACHED_THERE = "the beginning of its prompt cached at the destination"
    CACHED_HERE = "the beginning of its prompt taken from the source's cache"


class Compared(Enum):
    EVERYTHING = "tokens, logprobs byte for byte, finish, stop reason, prefill report"
    BUT_LOGPROBS = "tokens, finish, stop reason"
    TEXT = "text, tokens, finish and stop reason after vLLM's output processor"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The model's tokenizer, as far as kinds need it."""

    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def common(self, rng: Random, number: int) -> list[int]:
        """Ids of tokens that a plain text holds."""
        return rng.sample(sorted(set(self.ids(" ".join(plain_document(rng) for _ in range(4))))), number)


Sampling = Callable[[Random, Vocabulary], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Kind:
    name: str
    sampling: Sampling
    scene: Scene = Scene.ROOMY
    found: Found = Found.ANY
    compared: Compared = Compared.EVERYTHING
    text: str = "plain"
    modes: tuple[str, ...] = ("live", "live", "blocking")
    """Of its hops, drawn at random."""
    grammar: Callable[[Random], dict[str, Any]] | None = None
    prompt_tokens: tuple[int, int] = (MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
    adapters: tuple[str, ...] = ()
    """One of them, drawn at random; none if there are none."""
    max_pictures: int = 0
    """If any, a prompt has at least one."""


@dataclass(frozen=True, slots=True)
class Hop:
    at: int
    """Output tokens the client has when the move is ordered."""
    mode: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One request and its moves."""

    kind: Kind
    seed: int
    prompt: tuple[int, ...]
    sampling: Mapping[str, Any]
    grammar: Mapping[str, Any] | None
    hops: tuple[tuple[Hop, ...], ...]
    """Of each of its `n` sequences."""
    begins: tuple[int, ...]
    """The instance (0 or 1) at which each sequence begins."""
    adapter: str | None
    pictures: tuple[tuple[int, Picture], ...]
    """Each before so many tokens of the prompt."""
    tokenizer: Any = field(repr=False, compare=False)

    @property
    def n(self) -> int:
        return len(self.hops)

    def pieces(self) -> list[int | Picture]:
        """The prompt, with the pictures in their places."""
        pieces: list[int | Picture] = list(self.prompt)
        for at, picture in sorted(self.pictures, key=lambda placed: placed[0], reverse=True):
            pieces.insert(at, picture)
        return pieces

    def params(self) -> SamplingParams:
        """New each time: vLLM writes into the parameters it is given."""
        values: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, **copy.deepcopy(dict(self.sampling))}
        if self.grammar is not None:
            constraint = StructuredOutputsParams(**copy.deepcopy(dict(self.grammar)))
            constraint._backend = "xgrammar"  # a gateway's InputProcessor chooses it
            values |= {"structured_outputs": constraint, "ignore_eos": False}
        params = SamplingParams(n=self.n, output_kind=RequestOutputKind.FINAL_ONLY, **values)
        params.update_from_generation_config({}, self.tokenizer.eos_token_id)
        if params.bad_words:
            params.update_from_tokenizer(self.tokenizer)
        return params


def plan_of(kind: Kind, seed: int, vocabulary: Vocabulary) -> Plan:
    """The same kind and seed give the same request."""
    rng = Random(f"{kind.name} {seed}")
    sampling = kind.sampling(rng, vocabulary)
    num_sequences = sampling.pop("n", 1)
    least = MAX_OUTPUT_TOKENS if kind.found is Found.PREEMPTED else MIN_OUTPUT_TOKENS  # time to be preempted in
    sampling.setdefault("max_tokens", rng.randint(least, MAX_OUTPUT_TOKENS))
    prompt = _prompt(rng, kind, vocabulary)
    hops = tuple(_hops(rng, kind, sampling["max_tokens"]) for _ in range(num_sequences))
    begins = tuple(rng.randrange(2) for _ in range(num_sequences))
    grammar = None if kind.grammar is None else kind.grammar(rng)
    adapter = rng.choice(kind.adapters) if kind.adapters else None
    places = rng.sample(range(1, len(prompt)), rng.randint(1, kind.max_pictures)) if kind.max_pictures else []
    pictures = tuple((at, Picture(rng.randrange(1 << 31))) for at in places)
    return Plan(kind, seed, prompt, sampling, grammar, hops, begins, adapter, pictures, vocabulary.tokenizer)


def _hops(rng: Random, kind: Kind, max_tokens: int) -> tuple[Hop, ...]:
    num_hops = rng.randint(1, MAX_HOPS)
    last = int(LAST_HOP_SHARE * max_tokens)
    if kind.grammar is not None:
        last = min(last, 20)  # it may end long before max_tokens
    points = sorted(rng.sample(range(1, last), num_hops))
    if kind.found in (Found.HALF_COMPUTED, Found.WAITING, Found.UNCOMPILED):
        points[0] = 0
    elif kind.found is Found.PREEMPTED:
        points[0] = 1  # whenever it is preempted after that
    return tuple(Hop(at, rng.choice(kind.modes)) for at in points)


def _prompt(rng: Random, kind: Kind, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Text the model knows, cut anywhere: there its best two tokens lie far apart."""
    length = rng.randint(*kind.prompt_tokens)
    if kind.text == "tool":
        rendered = render_chat(tool_chat(rng)[:2]) + "<|assistant|>"
        ids = vocabulary.ids(rendered)
        return tuple(ids[-MAX_PROMPT_TOKENS:])
    ids = vocabulary.ids("<s>")
    for _ in count():
        if len(ids) >= length:
            return tuple(ids[:length])
        text = render_chat(chat(rng)).removeprefix("<s>") if kind.text == "chat" else plain_document(rng)
        ids += vocabulary.ids(text + "\n")
    raise AssertionError("the loop above returns")


# ---- samplings


def fixed(**values: Any) -> Sampling:
    """The same for every seed, but for the sampler's own seed where it is 0."""

    def draw(rng: Random, _: Vocabulary) -> dict[str, Any]:
        drawn = dict(values)
        if "seed" in drawn:
            drawn["seed"] = rng.randrange(1 << 31)
        return drawn

    return draw


def _penalties(rng: Random, _: Vocabulary, **more: Any) -> dict[str, Any]:
    return {
        "presence_penalty": round(rng.uniform(0.2, 1.5), 2),
        "frequency_penalty": round(rng.uniform(0.2, 1.5), 2),
        "repetition_penalty": round(rng.uniform(1.05, 1.4), 2),
        **more,
    }


def _seeded_penalties(rng: Random, words: Vocabulary) -> dict[str, Any]:
    return _penalties(rng, words, temperature=1.0, seed=rng.randrange(1 << 31), logprobs=1)


def _cut_off(rng: Random, _: Vocabulary) -> dict[str, Any]:
    return {
        "temperature": round(rng.uniform(0.6, 1.4), 2),
        "seed": rng.randrange(1 << 31),
        "top_k": rng.choice((5, 20, 50)),
        "top_p": rng.choice((0.8, 0.9, 0.95)),
        "min_p": rng.choice((0.0, 0.01, 0.05)),
    }


def _min_tokens(rng: Random, words: Vocabulary) -> dict[str, Any]:
    """Stop ids that come often: the request ends soon after it may."""
    stops = {"stop_token_ids": words.common(rng, 40), "ignore_eos": False}
    return {
        "temperature": 1.0,
        "seed": rng.randrange(1 << 31),
        "min_tokens": rng.randint(28, 50),
        "max_tokens": 70,
        **stops,
    }


def _stop_ids(rng: Random, words: Vocabulary) -> dict[str, Any]:
    return {"stop_token_ids": words.common(rng, 3), "max_tokens": 70, "logprobs": 1}


def _logit_bias(rng: Random, words: Vocabulary) -> dict[str, Any]:
    return {"logit_bias": {token: round(rng.uniform(-4, 4), 1) for token in words.common(rng, 20)}, "logprobs": 1}


def _allowed(rng: Random, words: Vocabulary) -> dict[str, Any]:
    return {"allowed_token_ids": words.common(rng, 60), "logprobs": 1}


def _bad_words(rng: Random, words: Vocabulary) -> dict[str, Any]:
    drawn = [words.tokenizer.decode([token]).strip() for token in words.common(rng, 20)]
    return {"bad_words": sorted({word for word in drawn if word.isalpha()}) or ["the"]}


def _stop_strings(rng: Random, _: Vocabulary) -> dict[str, Any]:
    """Strings of more than one token, looked for after some output, so that they lie behind a seam."""
    stops = rng.sample([". The", "walked to", "met a", " said the", ".\nDay", " and ", "one morning"], 3)
    return {"stop": stops, "min_tokens": rng.randint(8, 25), "max_tokens": 70}


# ---- the kinds

GREEDY = fixed(logprobs=2)
SEEDED = fixed(temperature=1.0, seed=0, logprobs=2)
CHUNKED, TIGHT, ADAPTED, WINDOWED = Scene.CHUNKED, Scene.TIGHT, Scene.ADAPTED, Scene.WINDOWED
GUESSED, ASYNCHRONOUS, PICTURED, RANKS = Scene.GUESSED, Scene.ASYNCHRONOUS, Scene.PICTURED, Scene.RANKS
LONG = (200, MAX_PROMPT_TOKENS)
LONGEST = (400, 800)
CROWD = (240, 300)
"""Prompts of the tight scene: six fit beside each other, and then they grow."""
AGAIN: tuple[str, ...] = ("recompute",)
AT_ONCE_MODES: tuple[str, ...] = ("blocking", "blocking", "blocking", "live")
"""A live move lets the prompt be computed while it copies; a blocking one stops it in the middle."""

KINDS: tuple[Kind, ...] = (
    Kind("greedy", fixed()),
    Kind("greedy, logprobs", fixed(logprobs=5)),
    Kind("seeded", fixed(temperature=1.0, seed=0)),
    Kind("seeded, cut off", _cut_off),
    Kind("seeded, logprobs", fixed(temperature=0.8, seed=0, logprobs=3)),
    Kind("penalties", _penalties),
    Kind("penalties, seeded", _seeded_penalties),
    Kind("min_tokens", _min_tokens),
    Kind("stop ids", _stop_ids),
    Kind("prompt logprobs", fixed(prompt_logprobs=2, logprobs=1)),
    Kind("logit_bias", _logit_bias),
    Kind("allowed ids", _allowed),
    Kind("bad words", _bad_words),
    Kind("json schema", fixed(temperature=1.0, seed=0), grammar=grammars.schema),
    Kind("json schema, penalties", lambda rng, words: _penalties(rng, words, logprobs=1), grammar=grammars.schema),
    Kind("regex", fixed(temperature=1.0, seed=0), grammar=grammars.regex),
    Kind("ebnf", fixed(temperature=1.0, seed=0), grammar=grammars.ebnf),
    Kind("tool call", fixed(temperature=0.7, seed=0), grammar=grammars.tool_call, text="tool"),
    Kind("stop strings", _stop_strings, compared=Compared.TEXT),
    Kind("n = 2, seeded", fixed(n=2, temperature=1.0, seed=0), compared=Compared.TEXT, text="chat"),
    Kind("cached at the source", GREEDY, found=Found.CACHED_HERE, prompt_tokens=LONG),
    Kind("cached at the destination", SEEDED, found=Found.CACHED_THERE, prompt_tokens=LONG),
    Kind("re-prefill", GREEDY, compared=Compared.BUT_LOGPROBS, modes=AGAIN),
    Kind("re-prefill, seeded", SEEDED, compared=Compared.BUT_LOGPROBS, modes=AGAIN),
    Kind("re-prefill, regex", SEEDED, compared=Compared.BUT_LOGPROBS, modes=AGAIN, grammar=grammars.regex),
    Kind("waiting for its grammar", SEEDED, found=Found.UNCOMPILED, grammar=grammars.new_regex),
    Kind("half computed", GREEDY, CHUNKED, Found.HALF_COMPUTED, prompt_tokens=LONGEST, modes=AT_ONCE_MODES),
    Kind(
        "half computed, penalties", _penalties, CHUNKED, Found.HALF_COMPUTED, prompt_tokens=LONGEST, modes=AT_ONCE_MODES
    ),
    Kind(
        "half computed, regex",
        GREEDY,
        CHUNKED,
        Found.HALF_COMPUTED,
        prompt_tokens=LONGEST,
        modes=AT_ONCE_MODES,
        grammar=grammars.regex,
    ),
    Kind("waiting", GREEDY, TIGHT, Found.WAITING, prompt_tokens=CROWD),
    Kind("waiting, seeded", SEEDED, TIGHT, Found.WAITING, prompt_tokens=CROWD),
    Kind("preempted", GREEDY, TIGHT, Found.PREEMPTED, prompt_tokens=CROWD),
    Kind("preempted, seeded", SEEDED, TIGHT, Found.PREEMPTED, prompt_tokens=CROWD),
    Kind("preempted, penalties", _penalties, TIGHT, Found.PREEMPTED, prompt_tokens=CROWD),
    Kind("preempted, regex", SEEDED, TIGHT, Found.PREEMPTED, prompt_tokens=CROWD, grammar=grammars.regex),
    Kind("adapter", GREEDY, ADAPTED, adapters=ADAPTERS),
    Kind("adapter, seeded", SEEDED, ADAPTED, adapters=ADAPTERS),
    Kind("adapter, penalties", _penalties, ADAPTED, adapters=ADAPTERS),
    Kind("adapter, regex", SEEDED, ADAPTED, grammar=grammars.regex, adapters=ADAPTERS),
    Kind("adapter, cached there", GREEDY, ADAPTED, Found.CACHED_THERE, prompt_tokens=LONG, adapters=ADAPTERS),
    Kind("windows", GREEDY, WINDOWED),
    Kind("windows, seeded", SEEDED, WINDOWED),
    Kind("windows, penalties", _seeded_penalties, WINDOWED),
    Kind("windows, regex", SEEDED, WINDOWED, grammar=grammars.regex),
    Kind("windows, cached at the source", SEEDED, WINDOWED, Found.CACHED_HERE, prompt_tokens=LONG),
    Kind("windows, cached at the destination", GREEDY, WINDOWED, Found.CACHED_THERE, prompt_tokens=LONG),
    Kind("guessed", GREEDY, GUESSED, compared=Compared.BUT_LOGPROBS),
    Kind("guessed, penalties", _penalties, GUESSED, compared=Compared.BUT_LOGPROBS),
    Kind("guessed, json schema", GREEDY, GUESSED, compared=Compared.BUT_LOGPROBS, grammar=grammars.schema),
    Kind("asynchronous", GREEDY, ASYNCHRONOUS),
    Kind("asynchronous, seeded", SEEDED, ASYNCHRONOUS),
    Kind("asynchronous, penalties", _seeded_penalties, ASYNCHRONOUS),
    Kind("asynchronous, stop ids", _stop_ids, ASYNCHRONOUS),
    Kind("asynchronous, regex", SEEDED, ASYNCHRONOUS, grammar=grammars.regex),
    Kind("asynchronous, cached there", GREEDY, ASYNCHRONOUS, Found.CACHED_THERE, prompt_tokens=LONG),
    Kind("asynchronous, waiting for its grammar", SEEDED, ASYNCHRONOUS, Found.UNCOMPILED, grammar=grammars.new_regex),
    Kind("images", GREEDY, PICTURED, compared=Compared.BUT_LOGPROBS, max_pictures=2),
    Kind("images, seeded", SEEDED, PICTURED, compared=Compared.BUT_LOGPROBS, max_pictures=2),
    Kind("images, penalties", _seeded_penalties, PICTURED, compared=Compared.BUT_LOGPROBS, max_pictures=2),
    Kind("two ranks", GREEDY, RANKS),
    Kind("two ranks, seeded", SEEDED, RANKS),
    Kind("two ranks, penalties", _penalties, RANKS),
    Kind("two ranks, regex", SEEDED, RANKS, grammar=grammars.regex),
)
BY_NAME: Mapping[str, Kind] = {kind.name: kind for kind in KINDS}

NOT_MOVED: tuple[str, ...] = (
    "prompt logprobs that are not complete (moved once they are)",
    "prompt embeddings",
    "pooling",
    "streaming sessions",
    "requests under a KV or encoder connector",
    "LoRA adapters that are loaded in place, or whose files have changed since",
    "sampled requests that are decoded speculatively",
    "audio, video, images embedded by the client, images with an adapter, submissions over 32 MiB",
)
"""Kinds that `describe` refuses with a reason (instance/vllm/refusals.py); no request of them is in the run."""

ELSEWHERE: tuple[str, ...] = ("sliding windows alone", "guesses with windows or on two ranks", "the V2 runner")
"""Kinds that need another model or other engines: tests/integration moves them, this run does not."""
