"""How are planned requests sent, and what comes back? A streaming OpenAI client that notes when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import msgspec

from orchestrator.demo.answers import Answer
from orchestrator.demo.workload import Endpoint, PlannedRequest

PATHS = {Endpoint.CHAT: "/v1/chat/completions", Endpoint.COMPLETION: "/v1/completions"}
CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 60.0
"""No token for so long is an error."""


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    prompt_token_ids: list[int] | None = None
    error: msgspec.Raw | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over a plan."""

    name: str
    """Part of every request id, so that two runs never share one."""
    base_url: str
    model: str
    cache_salt: str
    """Prefix-cache blocks are shared only under the same salt: another salt, other blocks."""
    max_in_flight: int
    send_until_s: float
    """Seconds after the start of the run; what has not been sent by then is left out."""

    def request_id(self, index: int) -> str:
        return f"{self.name}.{index:05d}"


@dataclass(slots=True)
class Tally:
    """How far the run is; written by the client, read by the screen."""

    num_planned: int
    num_sent: int = 0
    num_done: int = 0
    num_errors: int = 0
    num_tokens: int = 0
    answers: list[Answer] = field(default_factory=list)

    @property
    def num_in_flight(self) -> int:
        return self.num_sent - self.num_done


@dataclass(slots=True)
class _Stream:
    """What has come of one answer so far."""

    num_prompt_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    received_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


async def send_all(plan: Sequence[PlannedRequest], run: Run, tally: Tally) -> tuple[Answer, ...]:
    """Send the plan at its times (later where `max_in_flight` is reached); answers in order of their index."""
    limits = httpx.Limits(max_connections=run.max_in_flight + 1, max_keepalive_connections=run.max_in_flight + 1)
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    slots = asyncio.Semaphore(run.max_in_flight)
    started_s = time.monotonic()
    async with (
        httpx.AsyncClient(base_url=run.base_url, limits=limits, timeout=timeout, trust_env=False) as client,
        asyncio.TaskGroup() as group,
    ):
        for request in plan:
            await asyncio.sleep(max(0.0, started_s + request.arrival_s - time.monotonic()))
            await slots.acquire()
            if time.monotonic() - started_s > run.send_until_s:
                break
            tally.num_sent += 1
            group.create_task(_send_one(client, request, run, tally)).add_done_callback(lambda _: slots.release())
    return tuple(sorted(tally.answers, key=lambda answer: answer.index))


async def _send_one(client: httpx.AsyncClient, request: PlannedRequest, run: Run, tally: Tally) -> None:
    sent_s = time.monotonic()
    stream = _Stream()
    headers = {"x-request-id": run.request_id(request.index)}
    if request.priority:
        headers["x-kvferry-priority"] = request.priority
    try:
        async with client.stream(
            "POST", PATHS[request.endpoint], json=request_body(request, run), headers=headers
        ) as reply:
            if reply.status_code != httpx.codes.OK:
                stream.error = f"HTTP {reply.status_code}: {(await reply.aread())[:200].decode(errors='replace')}"
            else:
                await _read(reply, stream, tally)
    except httpx.HTTPError as error:
        stream.error = f"{type(error).__name__}: {error}"
    if stream.error is None and stream.finish_reason is None:
        stream.error = "the stream ended without a finish reason"
    tally.num_done += 1
    tally.num_errors += stream.error is not None
    tally.answers.append(
        Answer(
            index=request.index,
            request_id=headers["x-request-id"],
            num_prompt_tokens=stream.num_prompt_tokens,
            token_ids=tuple(stream.token_ids),
            received_s=tuple(stream.received_s),
            finish_reason=stream.finish_reason,
            error=stream.error,
            sent_s=sent_s,
        )
    )


async def _read(reply: httpx.Response, stream: _Stream, tally: Tally) -> None:
    decoder = msgspec.json.Decoder(_Chunk)
    async for line in reply.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        try:
            chunk = decoder.decode(line[6:])
        except msgspec.DecodeError as error:
            stream.error = f"unreadable chunk: {error}"
            return
        if chunk.error is not None:
            stream.error = bytes(chunk.error).decode(errors="replace")[:200]
            return
        _note(chunk, stream, tally)


def _note(chunk: _Chunk, stream: _Stream, tally: Tally) -> None:
    now_s = time.monotonic()
    for choice in chunk.choices:
        # Chat says the prompt's tokens beside the choices, completions inside the choice.
        prompt = chunk.prompt_token_ids or choice.prompt_token_ids
        if prompt is not None:
            stream.num_prompt_tokens = len(prompt)
        tokens = choice.token_ids or ()
        stream.token_ids.extend(tokens)
        stream.received_s.extend(now_s for _ in tokens)
        tally.num_tokens += len(tokens)
        stream.finish_reason = choice.finish_reason or stream.finish_reason


def request_body(request: PlannedRequest, run: Run) -> dict[str, object]:
    """The JSON body: the OpenAI fields, and vLLM's own for exact lengths, token ids and the cache salt."""
    sampling = request.sampling
    body: dict[str, object] = {
        "model": run.model,
        "stream": True,
        "max_tokens": request.max_tokens,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignores_eos,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "return_token_ids": True,
        "cache_salt": run.cache_salt,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    match request.endpoint:
        case Endpoint.CHAT:
            body["messages"] = [{"role": "user", "content": request.text}]
            if sampling.num_logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": sampling.num_logprobs}
        case Endpoint.COMPLETION:
            body["prompt"] = request.text
            if sampling.num_logprobs is not None:
                body["logprobs"] = sampling.num_logprobs
    return body
