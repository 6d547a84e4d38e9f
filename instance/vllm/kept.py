"""What does our engine keep of a request beside what vLLM keeps?"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.request import Request


@dataclass(frozen=True, slots=True)
class Submitted:
    """Of a submission, to describe the request to a destination later."""

    external_id: str
    payload: bytes


@dataclass(slots=True)
class Incoming:
    """A reservation."""

    request: Request
    submitted: Submitted
    num_cached_tokens: int
