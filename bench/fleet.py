"""How does a bench drive real instances without Ray or HTTP? Stand-alone processes; this process is their gateway."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from instance.mailbox import Mailbox
from instance.messages import Abort, Frame, Submit, SubmitAnswer
from instance.spec import InstanceSpec, InstanceStarted, MigrationSummary
from instance.standalone import Order, Reply, StartFailed, Verb
from instance.vllm.codec import encode_request
from migration.types import Epoch, Incarnation, InstanceId

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


class FleetError(RuntimeError):
    """An instance did not start, refused a request, or failed an order; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Token:
    """One output token: where it came from, and when its step ended there (time.monotonic() of this machine)."""

    token_id: int
    instance: str
    at_s: float


@dataclass(slots=True)
class Stream:
    """The output of one request, in order of offsets, each token once."""

    request_id: str
    tokens: list[Token] = field(default_factory=list)
    repeated: int = 0
    """Tokens that came twice."""
    finished: bool = False
    refusal: str | None = None
    _early: dict[int, Token] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, offset: int, token: Token) -> None:
        if offset < len(self.tokens) or offset in self._early:
            self.repeated += 1
            return
        self._early[offset] = token
        while (following := self._early.pop(len(self.tokens), None)) is not None:
            self.tokens.append(following)

    def changed(self) -> None:
        self._changed.set()

    async def wait_tokens(self, num_tokens: int) -> None:
        """Return when so many are there or it has finished. Raises FleetError when it was refused, or stands still."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while len(self.tokens) < num_tokens and not self.finished:
                if self.refusal is not None:
                    raise FleetError(f"{self.request_id} was refused: {self.refusal}")
                self._changed.clear()
                await self._changed.wait()


class Instance:
    """One stand-alone instance process."""

    def __init__(self, started: InstanceStarted, process: asyncio.subprocess.Process) -> None:
        self.started = started
        self.incarnation = Incarnation(InstanceId(started.instance), Epoch(started.epoch), started.address)
        self._process = process
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, spec: InstanceSpec) -> Instance:
        """Raises FleetError with the instance's own words."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "instance.standalone",
            msgspec.json.encode(spec).decode(),
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        assert process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await process.stdout.readline()
        try:
            return cls(msgspec.json.decode(line, type=InstanceStarted), process)
        except msgspec.DecodeError:
            await process.wait()
            try:
                reason = msgspec.json.decode(line, type=StartFailed).error
            except msgspec.DecodeError:
                reason = f"it ended with status {process.returncode}"
            raise FleetError(f"{spec.instance} did not start: {reason}") from None

    async def order(self, verb: Verb, **arguments: Any) -> Reply:
        """Raises FleetError when the instance answers with an error."""
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(Order(number, verb, **arguments)) + b"\n")
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reply = await self._waiting[number]
        if reply.error:
            raise FleetError(f"{self.started.instance}: {reply.error}")
        return reply

    async def stop(self) -> None:
        self._reader.cancel()
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            reply = msgspec.json.decode(line, type=Reply)
            waiting = self._waiting.pop(reply.number, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(reply)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(FleetError(f"{self.started.instance} ended"))


class Fleet:
    """Some instances and the streams they send here."""

    def __init__(self, instances: Sequence[Instance], mailbox: Mailbox) -> None:
        self.instances = {instance.started.instance: instance for instance in instances}
        self._mailbox = mailbox
        self._streams: dict[str, Stream] = {}
        self._sequences: dict[str, itertools.count[int]] = {name: itertools.count(1) for name in self.instances}
        self._numbers = itertools.count(1)
        self._receiver = asyncio.create_task(self._receive())

    @classmethod
    @asynccontextmanager
    async def running(cls, names: Sequence[str], engine_argv: Sequence[str]) -> AsyncIterator[Fleet]:
        """Start all at once; stop all at the end, whatever happens. Raises FleetError when one does not start."""
        specs = [InstanceSpec(instance=name, epoch=1, engine_argv=tuple(engine_argv), token="bench") for name in names]
        results = await asyncio.gather(*(Instance.start(spec) for spec in specs), return_exceptions=True)
        instances = [result for result in results if isinstance(result, Instance)]
        mailbox = Mailbox()
        await mailbox.open()
        fleet = cls(instances, mailbox)
        try:
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            yield fleet
        finally:
            await fleet.close()

    def submit(self, instance: str, prompt: Sequence[int], max_tokens: int, **sampling: Any) -> Stream:
        """Send a request of token ids; `sampling` as vLLM's SamplingParams, greedy and without stop by default."""
        request_id = f"bench-{next(self._numbers)}"
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **({"temperature": 0.0} | sampling))
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        stream = self._streams[request_id] = Stream(request_id)
        incarnation = self.instances[instance].incarnation
        submit = Submit(
            request_id=request_id,
            external_id=request_id,
            gateway_address=self._mailbox.address,
            epoch=incarnation.epoch,
            sequence=next(self._sequences[instance]),
            priority=0,
            num_prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            payload=encode_request(request),
        )
        self._mailbox.send(incarnation.address, submit)
        return stream

    async def migrate(self, stream: Stream, source: str, destination: str, mode: str = "live") -> MigrationSummary:
        reply = await self.instances[source].order(
            Verb.MIGRATE,
            request_id=stream.request_id,
            destination=self.instances[destination].incarnation,
            mode=mode,
        )
        assert reply.summary is not None
        return reply.summary

    def abort(self, *streams: Stream) -> None:
        """End these wherever they are, and forget them."""
        ids = tuple(stream.request_id for stream in streams)
        for instance in self.instances.values():
            self._mailbox.send(instance.incarnation.address, Abort(ids))
        for request_id in ids:
            self._streams.pop(request_id, None)

    async def close(self) -> None:
        await asyncio.gather(*(instance.stop() for instance in self.instances.values()))
        self._receiver.cancel()
        self._mailbox.close()

    async def _receive(self) -> None:
        while True:
            message = await self._mailbox.receive()
            match message:
                case Frame():
                    self._take_frame(message)
                case SubmitAnswer(refusal=str()):
                    stream = self._streams.get(message.request_id)
                    if stream is not None:
                        stream.refusal = message.refusal
                        stream.changed()
                case _:
                    pass

    def _take_frame(self, frame: Frame) -> None:
        for entry in frame.entries:
            stream = self._streams.get(entry.request_id)
            if stream is None:
                continue
            for index, token_id in enumerate(entry.token_ids):
                stream.take(entry.offset + index, Token(token_id, frame.instance, frame.sent_s))
            stream.finished = stream.finished or entry.finish_reason is not None
            stream.changed()
