"""An instance a gateway can talk to, whose habits the test decides: it speaks the wire protocol and computes nothing.

Token k of a request is `(sum of its prompt + 7 k) % 32000`, so a client's text tells whether each token came once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec

from instance.fake_model import FakeRequest, encode_fake
from instance.mailbox import Mailbox
from instance.messages import (
    ALL_CACHED,
    NO_STEPS,
    Abort,
    Frame,
    LoadReport,
    OutputEntry,
    StepTotals,
    Submit,
    SubmitAnswer,
    Subscribe,
)
from orchestrator.gateway.spec import Member
from tests.support.fleet import TOKEN
from tests.support.idle_report import report
from tests.support.slow_prefixes import cached_blocks

FINISH_LENGTH = 1
STEP_S = 0.002


def encode_for_script(request: Any) -> bytes:
    """The payload of vLLM's EngineCoreRequest as the fake engine and the scripted instance read it."""
    params = request.sampling_params
    return encode_fake(FakeRequest(tuple(request.prompt_token_ids), params.max_tokens, params.seed or 0))


def expected_tokens(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    return [(sum(prompt) + 7 * k) % 32_000 for k in range(num_tokens)]


@dataclass(slots=True)
class _Running:
    gateway: str
    prompt: tuple[int, ...]
    max_tokens: int
    num_output: int = 0


@dataclass(slots=True)
class ScriptedInstance:
    """`await open()`; then change `refusal`, `state`, `is_paused` at will; `close()` is its death."""

    name: str
    refusal: str | None = None
    is_final: bool = False
    state: str = "serving"
    is_paused: bool = False
    """Accepts, but runs no step."""
    epoch: int = 1
    steps: StepTotals = NO_STEPS
    cached: tuple[int, ...] | None = None
    """Hashes of the blocks it says it has cached; None: it says nothing of them."""
    running: dict[str, _Running] = field(default_factory=dict)
    submitted: list[Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    _mailbox: Mailbox = field(default_factory=lambda: Mailbox(TOKEN))
    _subscribers: set[str] = field(default_factory=set)
    _seen: dict[str, int] = field(default_factory=dict)
    _step: int = 0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def open(self) -> ScriptedInstance:
        await self._mailbox.open()
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._run())]
        return self

    @property
    def member(self) -> Member:
        return Member(self.name, self.epoch, self._mailbox.address)

    async def close(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._mailbox.close()

    async def _receive(self) -> None:
        while True:
            match await self._mailbox.receive():
                case Submit() as submit:
                    self._on_submit(submit)
                case Abort() as abort:
                    self.aborted += abort.request_ids
                    for request_id in abort.request_ids:
                        self.running.pop(request_id, None)
                case Subscribe() as subscribe:
                    self._subscribers.add(subscribe.address)
                    self._mailbox.send(subscribe.address, self._report(subscribe.address))
                    if self.cached is not None and subscribe.cached_from == ALL_CACHED:
                        message = cached_blocks(self.name, ALL_CACHED, 0, self.cached, epoch=self.epoch)
                        self._mailbox.send(subscribe.address, message)

    def _on_submit(self, submit: Submit) -> None:
        self.submitted.append(submit)
        self._seen[submit.gateway_address] = submit.sequence
        answer = SubmitAnswer(submit.request_id, self.name, self.epoch, self.refusal, self.is_final)
        self._mailbox.send(submit.gateway_address, answer)
        if self.refusal is None and submit.request_id not in self.running:
            request = msgspec.msgpack.decode(submit.payload, type=FakeRequest)
            output = submit.output_token_ids
            assert list(output) == expected_tokens(request.prompt, len(output)), "it goes on after its output"
            running = _Running(submit.gateway_address, request.prompt, request.max_tokens, len(output))
            self.running[submit.request_id] = running

    async def _run(self) -> None:
        next_report_s = 0.0
        while True:
            if not self.is_paused:
                self._do_step()
            now_s = asyncio.get_running_loop().time()
            if now_s >= next_report_s:
                next_report_s = now_s + 0.05
                for address in self._subscribers:
                    self._mailbox.send(address, self._report(address))
            await asyncio.sleep(STEP_S)

    def _do_step(self) -> None:
        self._step += 1
        by_gateway: dict[str, list[OutputEntry]] = {}
        for request_id, one in list(self.running.items()):
            token = (sum(one.prompt) + 7 * one.num_output) % 32_000
            finish = FINISH_LENGTH if one.num_output + 1 == one.max_tokens else None
            by_gateway.setdefault(one.gateway, []).append(OutputEntry(request_id, one.num_output, (token,), finish))
            one.num_output += 1
            if finish is not None:
                del self.running[request_id]
        for gateway, entries in by_gateway.items():
            now_s = asyncio.get_running_loop().time()
            frame = Frame(self.name, self.epoch, self._step, now_s, tuple(entries), self._report(gateway))
            self._mailbox.send(gateway, frame)

    def _report(self, gateway: str) -> LoadReport:
        return report(
            self.name,
            epoch=self.epoch,
            step=self._step,
            state=self.state,
            num_running=len(self.running),
            free_blocks=max(0, 100 - 4 * len(self.running)),
            steps=self.steps,
            submits_seen=self._seen.get(gateway, 0),
        )
