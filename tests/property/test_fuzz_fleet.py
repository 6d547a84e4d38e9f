"""What do hostile messages of members do to a gateway's router and to the orchestrator's core? They never raise.

An exception in either would end the process that holds them: every open stream, or every decision.
"""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest

from instance.errors import MalformedFleetMessage
from instance.mailbox import decode, encode
from instance.messages import (
    ALL_CACHED,
    HASH_BYTES,
    CachedBlocks,
    FleetMessage,
    Frame,
    LoadReport,
    OutputEntry,
    OwnerChanged,
    PriorityChanged,
    RequestReport,
    StepTotals,
    SubmitAnswer,
)
from instance.replay import STAMP_BYTES, ReplayGuard, Session
from instance.seal import MAC_BYTES, Seal
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.core import Orchestrator
from orchestrator.events import InstanceStarted, ReportReceived, RequestsReceived, Ticked
from orchestrator.gateway.router import Router
from orchestrator.gateway.types import Outgoing, RouterParams
from orchestrator.policy.admission import NO_ASKS, Asks, OnOverload
from orchestrator.policy.autoscale import AutoscaleParams
from orchestrator.policy.targets import Targets
from orchestrator.state import CoreParams, ScalingParams
from tests.support.mutate import Mutator
from tests.support.reports import load_report, request_load, request_report

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
"""numpy's: of what is divided by zero, a log would be full."""
SEAL, HERE = Seal("test"), "tcp://gateway"
HEADER_BYTES = 1 + MAC_BYTES + STAMP_BYTES
NAMES = ("instance-0", "instance-1")
LOAD = load_report("instance-0", step=7, num_running=2, free_blocks=900)
PREFIX = tuple(range(1, 7))
"""Hashes of blocks."""
WANTED = (NO_ASKS, Asks(Targets(0.5, 0.02)), Asks(Targets(ttft_s=0.01), OnOverload.REJECT))


def with_steps(load: LoadReport, num_steps: int) -> LoadReport:
    """Of an instance whose speed can be learned."""
    steps = StepTotals(num_steps, 9 * num_steps, 9 * num_steps, 0, 9 * num_steps, 1000 * num_steps, 0, 0.05 * num_steps)
    return msgspec.structs.replace(load, steps=steps, max_step_tokens=2048, max_running=64)


def messages_of(mutator: Mutator, num_frames: int) -> list[FleetMessage]:
    """Those of the frames that a member's parser lets through."""
    found: list[FleetMessage] = []
    session, guard = Session(), ReplayGuard()
    for _ in range(num_frames):
        frame = mutator.frame()
        body = session.stamp() + frame[HEADER_BYTES:]
        version = frame[:1] or b"\0"  # of a frame cut to nothing: or the MAC's first byte would be taken for it
        try:
            found.append(decode(version + SEAL.mac(HERE, body) + body, SEAL, HERE, guard))
        except MalformedFleetMessage:
            continue
    return found


def members() -> list[Incarnation]:
    return [Incarnation(InstanceId(name), Epoch(1), f"tcp://{name}") for name in NAMES]


def outgoing(number: int) -> Outgoing:
    request_id = f"r{number % 20}"
    asks, prefix = WANTED[number % 3], PREFIX[: number % 4]
    return Outgoing(
        RequestId(request_id), request_id, 0, 100, 50, b"payload", lambda other: other.encode(), asks, prefix
    )


def hashes(values: tuple[int, ...]) -> bytes:
    return b"".join(value.to_bytes(HASH_BYTES, "big") for value in values)


def test_a_router_takes_six_thousand_hostile_frames() -> None:
    router = Router(HERE, RouterParams(dispatch_timeout_s=3.0, suspect_for_s=5.0, unanswered_for_s=1.0))
    router.set_members(members(), 0.0)
    valid: tuple[FleetMessage, ...] = (
        *(with_steps(load_report(name, step=9, free_blocks=900), num) for name in NAMES for num in (5, 9)),
        *(CachedBlocks(name, 1, 16, ALL_CACHED, 0, hashes(PREFIX)) for name in NAMES),
        *(CachedBlocks(name, 1, 16, 0, 3, hashes(PREFIX[:3]), hashes(PREFIX[3:])) for name in NAMES),
        *(SubmitAnswer(f"r{number}", "instance-0", 1) for number in range(20)),
        SubmitAnswer("r1", "instance-0", 1, "busy", False),
        *(Frame("instance-0", 1, 8, 0.5, (OutputEntry(f"r{n}", 0, (1, 2)),), LOAD) for n in range(20)),
        Frame("instance-1", 1, 8, 0.5, (OutputEntry("r1", 2, (3,), 1), OutputEntry("r2", 5, (4,))), LOAD),
        OwnerChanged("r1", "instance-1", 1, 2),
        PriorityChanged("r1", "instance-1", 1, -10),
    )
    mutator = Mutator(11, [encode(message, SEAL, HERE, Session()) for message in valid], HEADER_BYTES)
    kinds: Counter[str] = Counter()
    now_s = 0.0
    for number, message in enumerate(messages_of(mutator, 6_000)):
        kinds[type(message).__name__] += 1
        now_s += 0.01
        router.on_message(message, now_s)
        if number % 7 == 0 and RequestId(f"r{number % 20}") not in router.relay:
            router.submit(outgoing(number), now_s)
        if number % 11 == 0:
            router.tick(now_s)
        if number % 50 == 0:
            router.check_integrity()
    router.tick(now_s + 100.0)
    router.check_integrity()
    assert min(kinds[kind.__name__] for kind in (LoadReport, Frame, SubmitAnswer, OwnerChanged, CachedBlocks)) > 20, (
        kinds
    )


@pytest.mark.parametrize("is_automatic", [False, True])
def test_the_core_takes_four_thousand_hostile_reports(is_automatic: bool) -> None:
    scaling = ScalingParams(can_start=True, is_automatic=is_automatic, autoscale=AutoscaleParams(period_s=0.1))
    core = Orchestrator(CoreParams(scaling=scaling))
    for incarnation in members():
        core.on(InstanceStarted(incarnation, f"actor-{incarnation.instance}", "tiny", 16, 1000, process_id=7), 0.0)
    valid: tuple[FleetMessage, ...] = (
        *(with_steps(load_report(name, step=9, free_blocks=10, num_running=9), n) for name in NAMES for n in (5, 9)),
        *(
            request_report(name, *(request_load(f"r{n}", tpot_s=tpot_s, ttft_s=1.0) for n in range(5)), step=9)
            for name in NAMES
            for tpot_s in (None, 0.001, 0.5)
        ),
    )
    mutator = Mutator(12, [encode(message, SEAL, HERE, Session()) for message in valid], HEADER_BYTES)
    kinds: Counter[str] = Counter()
    now_s = 0.0
    for message in messages_of(mutator, 4_000):
        kinds[type(message).__name__] += 1
        now_s += 0.05
        if isinstance(message, LoadReport):
            core.on(ReportReceived(message), now_s)
        elif isinstance(message, RequestReport):
            core.on(RequestsReceived(message), now_s)
        core.on(Ticked(), now_s)
    assert min(kinds[kind.__name__] for kind in (LoadReport, RequestReport)) > 200, kinds
