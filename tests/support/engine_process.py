"""How is an engine stepped that lives in a process of its own? `EngineProcess` is an Engine whose calls cross pipes.

For engines that do not bear another one beside them: `python -m tests.support.engine_process FLAG...` runs one.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import UnionType
from typing import IO, Any, Concatenate, ParamSpec, TypeVar, cast, get_args, get_origin, get_type_hints

import msgspec

from instance.engine import Engine
from instance.spec import Carrier
from instance.types import (
    CachedChanges,
    CommittedRequest,
    EngineFacts,
    EngineLoad,
    EngineRefusal,
    RequestView,
    StepResult,
    Submission,
)
from migration.errors import CopyFailed
from migration.ports import BlockMover
from migration.types import (
    BlockRange,
    BlockTable,
    CopyReceipt,
    Description,
    MigrationId,
    NotStopped,
    Progress,
    Refusal,
    RequestId,
    Reservation,
    StoppedRequest,
)

P = ParamSpec("P")
T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("tests.support.engine_process",)
STOP_S = 20.0
LENGTH_BYTES = 4


class Call(msgspec.Struct, frozen=True):
    method: str
    is_of_mover: bool
    arguments: dict[str, msgspec.Raw]


class Answer(msgspec.Struct, frozen=True):
    kind: str
    """Name of the value's type: a method may return several."""
    value: msgspec.Raw
    error: str = ""
    """Of a failed copy, or of a broken rule (the engine lives on)."""
    is_copy_failure: bool = False


class EngineProcess:
    """See `instance.engine.Engine`, and `instance.vllm.host.VllmEngine`, which runs on the other side."""

    def __init__(self, argv: tuple[str, ...], log: Path, program: tuple[str, ...] = PROGRAM) -> None:
        """Starts it; `wait` for it before the first call. `argv`: as of `vllm serve`."""
        command = [sys.executable, "-m", *program, *argv]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )
        self._mover = MoverProcess(self)

    def wait(self) -> None:
        self._facts = cast("EngineFacts", self._receive(EngineFacts))

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def mover(self) -> BlockMover:
        return self._mover

    def add(self, submission: Submission) -> EngineRefusal | None:
        return self._call(Engine.add, submission)

    def abort(self, request_ids: tuple[RequestId, ...]) -> None:
        self._call(Engine.abort, request_ids)

    def has_work(self) -> bool:
        return self._call(Engine.has_work)

    def step(self) -> StepResult:
        return self._call(Engine.step)

    def load(self) -> EngineLoad:
        return self._call(Engine.load)

    def requests(self) -> tuple[RequestView, ...]:
        return self._call(Engine.requests)

    def reset_prefix_cache(self) -> bool:
        return self._call(Engine.reset_prefix_cache)

    def take_cached_changes(self) -> CachedChanges | None:
        return self._call(Engine.take_cached_changes)

    def describe(self, request_id: RequestId) -> Description | Refusal | None:
        return self._call(Engine.describe, request_id)

    def progress(self, request_id: RequestId) -> Progress | None:
        return self._call(Engine.progress, request_id)

    def try_stop(self, request_id: RequestId, without_kv: bool = False) -> StoppedRequest | NotStopped | None:
        return self._call(Engine.try_stop, request_id, without_kv)

    def resume(self, request_id: RequestId) -> None:
        self._call(Engine.resume, request_id)

    def release(self, request_id: RequestId) -> bool:
        return self._call(Engine.release, request_id)

    def reserve(self, migration_id: MigrationId, description: Description, slack_blocks: int) -> Reservation | Refusal:
        return self._call(Engine.reserve, migration_id, description, slack_blocks)

    def grow(self, migration_id: MigrationId, num_tokens: int) -> Reservation | Refusal:
        return self._call(Engine.grow, migration_id, num_tokens)

    def is_ready(self, migration_id: MigrationId) -> bool | Refusal:
        return self._call(Engine.is_ready, migration_id)

    def commit(self, migration_id: MigrationId, state: bytes) -> CommittedRequest | Refusal:
        return self._call(Engine.commit, migration_id, state)

    def cancel(self, migration_id: MigrationId) -> None:
        self._call(Engine.cancel, migration_id)

    def check_integrity(self) -> None:
        self._call(Engine.check_integrity)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_S)
        self._process.stdout.close()

    def _call(self, method: Callable[Concatenate[Engine, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return cast("T", self.exchange(method, args, kwargs, is_of_mover=False))

    def exchange(
        self, method: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, Any], *, is_of_mover: bool
    ) -> object:
        bound = inspect.signature(method).bind(None, *args, **kwargs).arguments
        arguments = {name: msgspec.Raw(msgspec.msgpack.encode(bound[name])) for name in bound if name != "self"}
        assert self._process.stdin is not None
        write_frame(self._process.stdin, Call(method.__name__, is_of_mover, arguments))
        return self._receive(get_type_hints(method)["return"])

    def _receive(self, annotation: Any) -> object:
        assert self._process.stdout is not None
        frame = read_frame(self._process.stdout)
        if frame is None:
            raise AssertionError(f"the engine's process ended: {self._process.wait(STOP_S)}")
        answer = msgspec.msgpack.decode(frame, type=Answer)
        if answer.error:
            raise CopyFailed(answer.error) if answer.is_copy_failure else AssertionError(answer.error)
        kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        kind = next(kind for kind in kinds if _name(kind) == answer.kind)
        return msgspec.msgpack.decode(answer.value, type=kind)


class MoverProcess:
    """Its `BlockMover`. The calls wait: nothing else is to be done meanwhile."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine = engine

    def endpoints(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self._engine.exchange(BlockMover.endpoints, (), {}, is_of_mover=True))

    async def open(self, migration_id: MigrationId, block_table: BlockTable) -> None:
        self._engine.exchange(BlockMover.open, (migration_id, block_table), {}, is_of_mover=True)

    async def close(self, migration_id: MigrationId) -> None:
        self._engine.exchange(BlockMover.close, (migration_id,), {}, is_of_mover=True)

    async def push(
        self,
        migration_id: MigrationId,
        endpoints: tuple[str, ...],
        block_table: BlockTable,
        blocks: BlockRange,
        *,
        urgent: bool,
    ) -> CopyReceipt:
        arguments = (migration_id, endpoints, block_table, blocks)
        receipt = self._engine.exchange(BlockMover.push, arguments, {"urgent": urgent}, is_of_mover=True)
        return cast("CopyReceipt", receipt)


def write_frame(pipe: IO[bytes], value: object) -> None:
    payload = msgspec.msgpack.encode(value)
    pipe.write(len(payload).to_bytes(LENGTH_BYTES, "big") + payload)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """None: the other side has ended."""
    header = pipe.read(LENGTH_BYTES)
    return pipe.read(int.from_bytes(header, "big")) if len(header) == LENGTH_BYTES else None


def _name(kind: Any) -> str:
    return str((get_origin(kind) or kind).__name__)


def _obey(engine: Engine, call: Call, runner: asyncio.Runner) -> Answer:
    port: Any = BlockMover if call.is_of_mover else Engine
    owner: Any = engine.mover if call.is_of_mover else engine
    hints = get_type_hints(getattr(port, call.method))
    arguments = {name: msgspec.msgpack.decode(raw, type=hints[name]) for name, raw in call.arguments.items()}
    try:
        value = getattr(owner, call.method)(**arguments)
        if isinstance(value, Awaitable):
            value = runner.run(_result(value))
    except (AssertionError, CopyFailed) as error:
        return Answer("", msgspec.Raw(b"\xc0"), str(error) or repr(error), isinstance(error, CopyFailed))
    return _answer(value)


async def _result(value: Awaitable[T]) -> T:
    return await value


def _answer(value: object) -> Answer:
    return Answer(type(value).__name__, msgspec.Raw(msgspec.msgpack.encode(value)))


def main(argv: tuple[str, ...]) -> None:
    from instance.vllm.host import VllmEngine  # noqa: PLC0415 - the other side need not load vLLM
    from instance.vllm.rank import Carriage  # noqa: PLC0415

    # vLLM prints to stdout: it becomes stderr for it, and the frames get the pipe for themselves.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    engine = VllmEngine.from_argv(argv, Carriage(Carrier.TCP, "127.0.0.1", "a-token"))
    write_frame(out, _answer(engine.facts))
    with asyncio.Runner() as runner:
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            write_frame(out, _obey(engine, msgspec.msgpack.decode(frame, type=Call), runner))
    engine.close()


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
