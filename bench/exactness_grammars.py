"""Which grammars do requests of bench.exactness have? Constraints for StructuredOutputsParams, drawn at random."""

from __future__ import annotations

from random import Random
from typing import Any

NEW_REGEX_WORDS = 400
"""As many take a while to compile."""


def schema(rng: Random) -> dict[str, Any]:
    least = rng.randint(12, 24)
    return {
        "json": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": least, "maxLength": least + 16},
                "values": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 6},
            },
            "required": ["name", "values"],
        }
    }


def regex(rng: Random) -> dict[str, Any]:
    return {"regex": rf"([a-z]{{3,8}}-[0-9]{{2,{rng.randint(3, 5)}}};){{{rng.randint(4, 8)},40}}"}


def ebnf(rng: Random) -> dict[str, Any]:
    joint = rng.choice((",", ";", "."))
    return {"grammar": f'root ::= (item "{joint}")+ \nitem ::= [a-z]+ | "(" item ")"'}


def tool_call(rng: Random) -> dict[str, Any]:
    """What vLLM makes of `tool_choice="required"`: a list of calls, each to one of the tools."""
    tools = [
        {
            "properties": {
                "name": {"type": "string", "enum": [name]},
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": "string", "minLength": 6, "maxLength": rng.randint(12, 30)}},
                    "required": [key],
                },
            },
            "required": ["name", "parameters"],
        }
        for name, key in (("get_weather", "city"), ("get_time", "city"), ("get_age", "person"))
    ]
    return {"json": {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": tools}}}


def new_regex(rng: Random) -> dict[str, Any]:
    """One that nobody has compiled yet."""
    words = "|".join("".join(rng.choices("abcdefghij", k=rng.randint(3, 7))) for _ in range(NEW_REGEX_WORDS))
    return {"regex": rf"(({words}) [0-9]{{1,4}}, ){{6,30}}"}
