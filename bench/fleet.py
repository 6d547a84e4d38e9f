"""How does a bench drive real instances without Ray or HTTP? Stand-alone processes; this process is their gateway."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from instance.mailbox import Mailbox
from instance.messages import Abort, Frame, OutputEntry, Submit, SubmitAnswer
from instance.spec import InstanceSpec, InstanceStarted, MigrationSummary
from instance.standalone import Order, Reply, StartFailed, Verb, told
from instance.vllm.codec import encode_request
from migration.types import Epoch, Incarnation, InstanceId

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ("instance.standalone",)
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
    accepted: bool = False
    """The instance it was sent to has said so."""
    refusal: str | None = None
    end: int | None = None
    """Number of its tokens, known when it has finished."""
    last: OutputEntry | None = None
    """The entry that finished it."""
    extras: dict[int, OutputEntry] = field(default_factory=dict)
    """By offset: entries that hold more than tokens (logprobs ...)."""
    _early: dict[int, Token] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, offset: int, token: Token) -> None:
        if offset < len(self.tokens) or offset in self._early:
            self.repeated += 1
            return
        self._early[offset] = token
        while (following := self._early.pop(len(self.tokens), None)) is not None:
            self.tokens.append(following)

    def take_entry(self, entry: OutputEntry, frame: Frame) -> None:
        for index, token_id in enumerate(entry.token_ids):
            self.take(entry.offset + index, Token(token_id, frame.instance, frame.sent_s))
        if entry.extra:
            self.extras.setdefault(entry.offset, entry)
        if entry.finish_reason is not None:
            self.finished, self.end, self.last = True, entry.offset + len(entry.token_ids), entry
        self.changed()

    @property
    def is_whole(self) -> bool:
        """It has finished and every token of it is here."""
        return self.end is not None and len(self.tokens) >= self.end

    def changed(self) -> None:
        self._changed.set()

    async def wait(self, is_reached: Callable[[], bool]) -> None:
        """Return when that is so. Raises FleetError when it was refused."""
        while not is_reached():
            if self.refusal is not None:
                raise FleetError(f"{self.request_id} was refused: {self.refusal}")
            self._changed.clear()
            await self._changed.wait()

    async def wait_tokens(self, num_tokens: int) -> None:
        """Return when so many are there or it has finished. Raises FleetError when it was refused, or stands still."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await self.wait(lambda: len(self.tokens) >= num_tokens or self.finished)


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
    async def start(cls, spec: InstanceSpec, program: Sequence[str] = PROGRAM, log: Path | None = None) -> Instance:
        """`log`: where its stderr goes instead of ours. Raises FleetError with the instance's own words."""
        argument, environment = told(spec)
        with ExitStack() as stack:
            stderr = None if log is None else stack.enter_context(log.open("wb"))
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                *program,
                argument,
                cwd=ROOT,
                env=os.environ | environment,
                start_new_session=True,  # Ctrl-C is for the bench, which then stops its instances
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
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
    async def running(
        cls,
        names: Sequence[str],
        engine_argv: Sequence[str],
        program: Sequence[str] = PROGRAM,
        logs: Path | None = None,
        **limits: Any,
    ) -> AsyncIterator[Fleet]:
        """Start all at once; stop all at the end, whatever happens. Raises FleetError when one does not start.

        `program`: a module that does what `instance.standalone` does, and its first arguments. `logs`: the folder
        of what they print, instead of our stderr. `limits`: fields of `InstanceSpec`.
        """
        token = secrets.token_hex(16)
        specs = [
            InstanceSpec(
                instance=name,
                epoch=1,
                engine_argv=tuple(engine_argv),
                token=token,
                **limits,
            )
            for name in names
        ]
        starts = (Instance.start(spec, program, logs and logs / f"{spec.instance}.log") for spec in specs)
        results = await asyncio.gather(*starts, return_exceptions=True)
        instances = [result for result in results if isinstance(result, Instance)]
        mailbox = Mailbox(token)
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
        return self.send(instance, request)

    def send(self, instance: str, request: EngineCoreRequest) -> Stream:
        """Send a request of token ids as it is. Its id must be new."""
        params = request.sampling_params
        assert params is not None and request.prompt_token_ids is not None
        stream = self._streams[request.request_id] = Stream(request.request_id)
        incarnation = self.instances[instance].incarnation
        submit = Submit(
            request_id=request.request_id,
            external_id=request.external_req_id or request.request_id,
            gateway_address=self._mailbox.address,
            epoch=incarnation.epoch,
            sequence=next(self._sequences[instance]),
            priority=request.priority,
            num_prompt_tokens=len(request.prompt_token_ids),
            max_tokens=params.max_tokens or 0,
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

    def forget(self, *streams: Stream) -> None:
        """What still comes for these is dropped."""
        for stream in streams:
            self._streams.pop(stream.request_id, None)

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
                case SubmitAnswer():
                    stream = self._streams.get(message.request_id)
                    if stream is not None:
                        stream.refusal, stream.accepted = message.refusal, message.refusal is None
                        stream.changed()
                case _:
                    pass

    def _take_frame(self, frame: Frame) -> None:
        for entry in frame.entries:
            stream = self._streams.get(entry.request_id)
            if stream is None:
                continue
            stream.take_entry(entry, frame)
