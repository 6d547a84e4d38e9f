"""Which kinds of sampling must a migration carry? Parameters by name, each long enough to be moved in its middle."""

from __future__ import annotations

from collections.abc import Callable

from vllm.sampling_params import SamplingParams, StructuredOutputsParams

JSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 20, "maxLength": 40},
        "values": {"type": "array", "items": {"type": "integer"}, "minItems": 6, "maxItems": 9},
    },
    "required": ["name", "values"],
}


def grammar(**constraint: object) -> StructuredOutputsParams:
    params = StructuredOutputsParams(**constraint)
    params._backend = "xgrammar"  # a gateway's InputProcessor chooses it
    return params


def params(**values: object) -> Callable[[], SamplingParams]:
    """A factory: vLLM writes into the parameters it is given."""
    return lambda: SamplingParams(**{"temperature": 0.0, "max_tokens": 70, "ignore_eos": True, **values})


def bad_words() -> SamplingParams:
    made = params(bad_words=["x"])()
    made._bad_words_token_ids = [[token] for token in range(60, 90)] + [[100, 101]]
    return made


GRAMMARS = {
    "regex": grammar(regex=r"([a-z]{3,8}-[0-9]{2,5};){6,40}"),
    "json": grammar(json=JSON),
    "ebnf": grammar(grammar='root ::= (item ",")+ \nitem ::= [a-z]+ | "(" item ")"'),
}
CASES: dict[str, Callable[[], SamplingParams]] = {
    "greedy": params(logprobs=2),
    "seeded": params(temperature=1.0, seed=123, logprobs=2),
    "seeded, cut off": params(temperature=1.3, seed=7, top_k=50, top_p=0.9, min_p=0.01),
    "penalties": params(frequency_penalty=0.7, presence_penalty=0.5, repetition_penalty=1.3, logprobs=3),
    "strong penalties": params(frequency_penalty=2.0, presence_penalty=2.0),
    "penalties, seeded": params(
        temperature=1.0, seed=9, frequency_penalty=0.7, presence_penalty=0.5, repetition_penalty=1.2
    ),
    "five logprobs, seeded": params(temperature=1.0, seed=3, logprobs=5, frequency_penalty=0.4),
    "prompt logprobs": params(prompt_logprobs=2, logprobs=1),
    "min_tokens": params(
        temperature=1.0, seed=4, min_tokens=40, stop_token_ids=list(range(3, 500, 4)), ignore_eos=False
    ),
    "max_tokens at the edge": params(max_tokens=42),
    "logit_bias": params(logit_bias=dict.fromkeys(range(3, 60), 2.5), logprobs=1),
    "allowed ids": params(allowed_token_ids=list(range(100, 300)), logprobs=1),
    "bad words": bad_words,
    "regex": params(temperature=1.0, seed=5, structured_outputs=GRAMMARS["regex"], ignore_eos=False),
    "json": params(temperature=1.0, seed=6, structured_outputs=GRAMMARS["json"], ignore_eos=False),
    "json, penalties": params(frequency_penalty=0.5, structured_outputs=GRAMMARS["json"], ignore_eos=False, logprobs=1),
    "ebnf": params(temperature=1.0, seed=5, structured_outputs=GRAMMARS["ebnf"], ignore_eos=False),
}
