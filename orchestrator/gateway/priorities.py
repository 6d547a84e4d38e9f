"""How urgent is this HTTP request? Its header, its body, the class of its API key, in this order of precedence. Pure.

1. `x-kvferry-priority`, else its alias `x-llm-d-inference-objective`: a level's name or a number.
2. `priority` in the body, vLLM's own field; 0 there is vLLM's default and counts as not given.
3. The level of the API key (`Authorization: Bearer KEY`), where the operator gave it one.
4. 0.

The level of an API key is also the most urgent that its requests may be: who asks for more gets that level.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.policy.levels import DEFAULT_LEVELS, MAX_PRIORITY, BadLevel, Levels, parse_levels

ALIAS = "x-llm-d-inference-objective"
HEADERS = ("x-kvferry-priority", ALIAS)
"""The first that is there counts."""


class BadPriority(ValueError):
    """`header` cannot be read; the text is one line for the client."""

    def __init__(self, header: str, reason: str) -> None:
        super().__init__(f"{header}: {reason}")
        self.header = header


@dataclass(frozen=True, slots=True)
class Asked:
    """What an HTTP request says of its priority beside its body."""

    header: int | None = None
    key_class: int | None = None

    def priority(self, in_body: int) -> int:
        """Raises ValueError (one line) for a number in the body that is out of range."""
        if abs(in_body) > MAX_PRIORITY:
            raise ValueError(f"priority is {in_body}, it must be from {-MAX_PRIORITY} to {MAX_PRIORITY}")
        asked = self.header if self.header is not None else (in_body or None)
        if self.key_class is None:
            return asked or 0
        return self.key_class if asked is None else max(asked, self.key_class)


@dataclass(frozen=True, slots=True)
class PriorityRules:
    """Of one fleet."""

    levels: Levels = field(default_factory=lambda: parse_levels(DEFAULT_LEVELS))
    key_classes: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Digest of an API key -> priority of its class."""

    def asked(self, headers: Mapping[str, str]) -> Asked:
        """`headers`: by lower-case name, as latin-1 (HTTP's own). An objective of llm-d that is no level is passed
        over: it may be a class of targets, or mean something to others. Raises BadPriority."""
        return Asked(self._header(headers), self._key_class(headers))

    def _header(self, headers: Mapping[str, str]) -> int | None:
        for name in HEADERS:
            text = headers.get(name)
            if text is not None:
                try:
                    return self.levels.priority(text)
                except BadLevel as error:
                    if name == ALIAS:
                        continue
                    raise BadPriority(name, str(error)) from error
        return None

    def _key_class(self, headers: Mapping[str, str]) -> int | None:
        scheme, _, key = headers.get("authorization", "").strip().partition(" ")
        if not self.key_classes or scheme.lower() != "bearer":
            return None
        return self.key_classes.get(key_digest(key.strip().encode("latin-1", "replace")))


def digest_in(text: str) -> str | None:
    """The digest that the text is, in lower case; None: it is none."""
    digest = text.lower()
    return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None


def key_digest(key: bytes) -> str:
    """What an API key is kept and compared by; the key cannot be told from it."""
    return hashlib.sha256(key).hexdigest()
