"""Which runs of the protocol are explored? Small requests, and how much goes wrong at once; `LONG` takes minutes."""

from __future__ import annotations

from dataclasses import replace

from migration.params import MigrationParams, Mode
from migration.types import Progress, Reservation, StoppedRequest
from tests.support.protocol_scenario import Disturbance, Scenario

_TABLE = (tuple(range(8)),)
_EMPTY: tuple[tuple[int, ...], ...] = ((),)


def _params(mode: Mode = Mode.LIVE) -> MigrationParams:
    return MigrationParams(mode=mode, max_stages=1, slack_blocks=1, max_cancel_sends=1)


LIVE = Scenario(
    _params(),
    looks=(Progress(5, 6, 0, _TABLE), Progress(6, 7, 0, _TABLE)),
    stopped=StoppedRequest(b"state", 7, 3, 0, _TABLE),
    reserved=Reservation(0, 4, _TABLE),
)
"""One stage of two blocks, and a tail of two; room for the slack must be asked for."""
CACHED = replace(
    LIVE,
    looks=(Progress(7, 8, 0, _TABLE), Progress(8, 9, 0, _TABLE)),
    stopped=StoppedRequest(b"state", 9, 4, 0, _TABLE),
    reserved=Reservation(2, 5, _TABLE),
)
"""The first block is there already."""
GROWS = replace(LIVE, reserved=Reservation(0, 1, _TABLE), stopped=StoppedRequest(b"state", 11, 3, 0, _TABLE))
"""No room for the stage, nor for what is decoded before the stop."""
STAGES = replace(
    LIVE,
    params=replace(LIVE.params, max_stages=2, max_cancel_sends=2),
    looks=(Progress(5, 6, 0, _TABLE), Progress(9, 10, 0, _TABLE), Progress(10, 11, 0, _TABLE)),
    stopped=StoppedRequest(b"state", 11, 6, 0, _TABLE),
)
"""Two stages; room must be asked for in each."""
BLOCKING = replace(LIVE, params=_params(Mode.BLOCKING), looks=LIVE.looks[:1])
RECOMPUTE = replace(
    LIVE,
    params=_params(Mode.RECOMPUTE),
    stopped=StoppedRequest(b"state", 0, 3, 0, _EMPTY),
    reserved=Reservation(0, 0, _EMPTY),
)
WAITING = replace(
    LIVE,
    looks=(Progress(0, 6, 0, _EMPTY),),
    stopped=StoppedRequest(b"state", 0, 0, 0, _EMPTY),
    reserved=Reservation(0, 0, _EMPTY),
)

D = Disturbance
CRASHES = (D.SOURCE_CRASH, D.DESTINATION_CRASH, D.RESTART)
FENCES = (D.SOURCE_FENCED, D.DESTINATION_FENCED)
ORDERS = (D.FINISH, D.WITHDRAWAL, D.DRAIN)


def under(scenario: Scenario, *disturbances: Disturbance, faults: int = 0, in_flight: int = 2) -> Scenario:
    return replace(scenario, disturbances=frozenset(disturbances), num_faults=faults, max_in_flight=in_flight)


UNTOLD = replace(under(LIVE, D.SOURCE_CRASH, D.RESTART, in_flight=3), is_death_told=False)
"""Only the lease frees what was held for a source that died."""

QUICK = {
    "live, three in flight": under(LIVE, in_flight=3),
    "live, both crash and restart, three in flight": under(LIVE, *CRASHES, in_flight=3),
    "live, the source dies and nobody is told": UNTOLD,
    "live, either is declared dead": under(LIVE, *FENCES, in_flight=1),
    "live, a fault": under(LIVE, faults=1, in_flight=1),
    "live, the client leaves": under(LIVE, D.ABORT, in_flight=1),
    "growing": under(GROWS),
    "growing, it finishes, is called off, the destination shuts down": under(GROWS, *ORDERS, in_flight=1),
    "blocks are cached, a crash": under(CACHED, *CRASHES),
    "blocking, a crash": under(BLOCKING, *CRASHES),
    "recompute, crashes, the client leaves": under(RECOMPUTE, *CRASHES, D.ABORT, in_flight=1),
    "waiting, crashes, the client leaves": under(WAITING, *CRASHES, D.ABORT, in_flight=1),
}
LONG = {
    "live, three in flight, two faults": under(LIVE, faults=2, in_flight=3),
    "live, three in flight, crashes, a fault": under(LIVE, *CRASHES, faults=1, in_flight=3),
    "live, three in flight, declared dead, a fault": under(LIVE, *FENCES, faults=1, in_flight=3),
    "live, three in flight, the client leaves, crashes": under(LIVE, *CRASHES, D.ABORT, in_flight=3),
    "live, the client leaves, a fault": under(LIVE, D.ABORT, faults=1),
    "live, it finishes, is called off, the destination shuts down, a fault": under(LIVE, *ORDERS, faults=1),
    "live, everything from outside at once": under(LIVE, *Disturbance, in_flight=1),
    "growing, three in flight, crashes, a fault": under(GROWS, *CRASHES, faults=1, in_flight=3),
    "growing, the client leaves, three in flight": under(GROWS, D.ABORT, in_flight=3),
    "two stages, crashes, three in flight": under(STAGES, *CRASHES, in_flight=3),
    "two stages, a fault": under(STAGES, faults=1),
    "blocking, crashes, the client leaves, a fault": under(BLOCKING, *CRASHES, D.ABORT, faults=1),
    "recompute, crashes, the client leaves, a fault": under(RECOMPUTE, *CRASHES, D.ABORT, faults=1),
    "waiting, crashes, the client leaves, a fault": under(WAITING, *CRASHES, D.ABORT, faults=1),
}
PAIRS = (
    under(GROWS, faults=1, in_flight=1),
    under(GROWS, D.ABORT, in_flight=1),
    under(GROWS, *ORDERS, in_flight=1),
    under(GROWS, *CRASHES, in_flight=1),
    under(LIVE),
    under(GROWS),
    under(RECOMPUTE, D.ABORT, in_flight=1),
)
"""Together they meet every pair of state and event that any run meets."""
