"""How does an instance run without Ray? ``python -m instance.standalone SPEC_JSON``, for tests and benches.

The fleet's token is not in SPEC_JSON but in the environment: others can read a command line. The first line on stdout
is `InstanceStarted`, or ``{"error": ...}``. Then one `Order` a line on stdin, one `Reply` a line on stdout; it ends
with status 0 on SIGTERM or at the end of stdin. All else that is printed goes to stderr.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from enum import Enum
from typing import BinaryIO

import msgspec

from instance.engine import Engine
from instance.errors import EngineFailed, InstanceError, StartError
from instance.service import InstanceService
from instance.spec import InstanceSpec, MigrationSummary
from migration.types import Incarnation

_LOG = logging.getLogger(__name__)

TOKEN_VARIABLE = "KVFERRY_TOKEN"
BAD_INPUT_STATUS = 2
ENGINE_FAILED_STATUS = 70


class Verb(Enum):
    MIGRATE = "migrate"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    MEMBER_LOST = "member_lost"
    STEP_TIMES = "step_times"
    CHECK_INTEGRITY = "check_integrity"
    CENSUS = "census"


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line on stdin; `number` comes back in the reply."""

    number: int
    verb: Verb
    request_id: str = ""
    destination: Incarnation | None = None
    mode: str = "live"
    instance: str = ""
    epoch: int = 0


class Census(msgspec.Struct, frozen=True):
    """What is in the engine between two steps."""

    total_blocks: int
    free_blocks: int
    reserved_blocks: int
    requests: dict[str, tuple[str, int]]
    """By request id: running | waiting | preempted | migrating_out, and the KV blocks it holds."""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    number: int
    error: str = ""
    summary: MigrationSummary | None = None
    step_times: tuple[tuple[float, float, int, int], ...] = ()
    """(start_s, end_s, scheduled tokens, decoding requests) on time.monotonic()."""
    census: Census | None = None


class StartFailed(msgspec.Struct, frozen=True):
    error: str


class Standalone:
    """One service behind two pipes."""

    def __init__(self, service: InstanceService, out: BinaryIO) -> None:
        self._service = service
        self._out = out
        self._tasks: set[asyncio.Task[None]] = set()

    def write(self, line: object) -> None:
        self._out.write(msgspec.json.encode(line) + b"\n")
        self._out.flush()

    async def serve(self, lines: asyncio.StreamReader) -> None:
        """Until the end of stdin. Orders run side by side."""
        while line := await lines.readline():
            task = asyncio.create_task(self._answer(line))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, line: bytes) -> None:
        try:
            order = msgspec.json.decode(line, type=Order)
        except msgspec.DecodeError as error:
            self.write(Reply(number=-1, error=str(error)))
            return
        try:
            self.write(await self._obey(order))
        except (InstanceError, AssertionError, ValueError) as error:
            self.write(Reply(number=order.number, error=f"{type(error).__name__}: {error}"))
        except Exception as error:  # noqa: BLE001 - without a reply whoever ordered it waits for ever
            _LOG.error("order %d raised %r", order.number, error, exc_info=error)
            self.write(Reply(number=order.number, error=f"{type(error).__name__}: {error}"))

    async def _obey(self, order: Order) -> Reply:
        service = self._service
        match order.verb:
            case Verb.MIGRATE:
                if order.destination is None:
                    raise ValueError("migrate needs a destination")
                summary = await service.migrate(order.request_id, order.destination, order.mode)
                return Reply(number=order.number, summary=summary)
            case Verb.DRAIN:
                service.drain()
            case Verb.UNDRAIN:
                service.undrain()
            case Verb.MEMBER_LOST:
                service.member_lost(order.instance, order.epoch)
            case Verb.STEP_TIMES:
                times = service.loop.step_times()
                rows = tuple((t.start_s, t.end_s, t.num_scheduled_tokens, t.num_decoding) for t in times)
                return Reply(number=order.number, step_times=rows)
            case Verb.CHECK_INTEGRITY:
                service.agent.check_integrity()
                await service.loop.call(lambda engine: engine.check_integrity())
            case Verb.CENSUS:
                return Reply(number=order.number, census=await service.loop.call(census_of))
        return Reply(number=order.number)


def census_of(engine: Engine) -> Census:
    load = engine.load()
    return Census(
        total_blocks=engine.facts.total_blocks,
        free_blocks=load.free_blocks,
        reserved_blocks=load.reserved_blocks,
        requests={view.request_id: (view.status.value, view.num_blocks) for view in engine.requests()},
    )


async def run(spec: InstanceSpec, out: BinaryIO) -> int:
    """Exit status."""
    service = InstanceService()
    standalone = Standalone(service, out)
    try:
        started = await service.start(spec)
    except StartError as error:
        standalone.write(StartFailed(str(error)))
        return BAD_INPUT_STATUS
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    standalone.write(started)
    ends = [
        asyncio.create_task(standalone.serve(lines)),
        asyncio.create_task(stopped.wait()),
        lifetime := asyncio.create_task(service.lifetime()),
    ]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    failed = lifetime.done() and isinstance(lifetime.exception(), EngineFailed)
    await service.stop()
    for end in ends:
        end.cancel()
    await asyncio.wait(ends)
    return ENGINE_FAILED_STATUS if failed else 0


def told(spec: InstanceSpec) -> tuple[str, dict[str, str]]:
    """What a process is started with: SPEC_JSON, and what its environment needs beside the rest."""
    return msgspec.json.encode(msgspec.structs.replace(spec, token="")).decode(), {TOKEN_VARIABLE: spec.token}


def spec_told(argument: str) -> InstanceSpec:
    """The other end of `told`; the token is taken out of the environment, so that no child inherits it. Raises
    StartError."""
    try:
        spec = msgspec.json.decode(argument, type=InstanceSpec)
    except msgspec.DecodeError as error:
        raise StartError(f"the one argument must be an InstanceSpec in JSON: {error}") from error
    if spec.token:
        raise StartError(f"the token belongs into {TOKEN_VARIABLE}: others can read a command line")
    return msgspec.structs.replace(spec, token=os.environ.pop(TOKEN_VARIABLE, ""))


def main() -> None:
    # The engine's libraries print to stdout: it becomes stderr for them, and the lines get the pipe for themselves.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        spec = spec_told(sys.argv[1] if len(sys.argv) == 2 else "")
    except StartError as error:
        out.write(msgspec.json.encode(StartFailed(str(error))) + b"\n")
        out.flush()
        sys.exit(BAD_INPUT_STATUS)
    status = asyncio.run(run(spec, out))
    out.flush()
    sys.exit(status)


if __name__ == "__main__":
    main()
