"""Whatever requests do while their priority is changed: each caller is answered once, and "done" means done.

A small world behind the real core: requests that move, finish and are reported late; instances that answer a change
late, or not at all. Its truth is kept here, apart from what the core believes.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from instance.types import PriorityAnswer, PriorityOutcome, RequestStatus
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.core import Orchestrator
from orchestrator.effects import Answer, Refused, Reprioritised, SetPriority, StartMigration
from orchestrator.errors import RefusalKind
from orchestrator.events import (
    Event,
    InstanceLost,
    InstanceStarted,
    MigrateRequested,
    MigrationEnded,
    MigrationFigures,
    PriorityAnswered,
    PriorityRequested,
    ReportReceived,
    RequestsReceived,
    Token,
    WaiterGone,
)
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load, request_report

NAMES = (InstanceId("a"), InstanceId("b"), InstanceId("c"))
NUM_REQUESTS = 3


@dataclass(slots=True)
class Truth:
    """One request as it is."""

    owner: InstanceId
    priority: int = 0
    is_alive: bool = True
    move: StartMigration | None = None
    is_stopped: bool = False


class World:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.core = Orchestrator(CoreParams(is_rebalancing=False))
        self.now_s = 0.0
        self.num_steps = 0
        self.alive = list(NAMES)
        self.requests = {f"r{number}": Truth(rng.choice(NAMES)) for number in range(NUM_REQUESTS)}
        self.orders: list[SetPriority] = []
        self.over: list[tuple[StartMigration, Outcome]] = []
        """Migrations that have ended and the core has not heard of."""
        self.answers: Counter[Token] = Counter()
        self.gone: set[Token] = set()
        self.wanted: dict[Token, tuple[str, int]] = {}
        self.made: dict[int, int] = {}
        """Change -> the priority an instance has set for it."""
        self.kinds: Counter[str] = Counter()
        for name in NAMES:
            self.on(InstanceStarted(Incarnation(name, Epoch(1), f"tcp://{name}"), f"actor-{name}", "tiny", 16, 1000))
            self.report(name)

    def on(self, event: Event) -> None:
        effects = self.core.on(event, self.now_s)
        self.core.check_integrity()
        for effect in effects:
            match effect:
                case SetPriority():
                    self.orders.append(effect)
                case StartMigration():
                    self.start(effect)
                case Answer(token=token, result=result):
                    self.answers[token] += 1
                    assert token not in self.gone, "nobody waits for this answer"
                    if token in self.wanted:
                        self.check(token, result)
                case _:
                    pass

    def check(self, token: Token, result: object) -> None:
        request_id, priority = self.wanted[token]
        if isinstance(result, Reprioritised):
            self.kinds["done"] += 1
            assert (result.request_id, result.priority) == (request_id, priority)
            assert priority in self.made.values(), "it says done, and no instance has done it"
        else:
            assert isinstance(result, Refused)
            self.kinds[result.kind.value] += 1
            if result.kind is RefusalKind.NOT_FOUND and "has ended" in result.reason:
                assert not self.requests[request_id].is_alive, "it lives, and is said to have ended"

    def report(self, name: InstanceId) -> None:
        self.num_steps += 1
        owned = [
            request_load(request_id, priority=truth.priority)
            for request_id, truth in self.requests.items()
            if truth.is_alive and truth.owner == name
        ]
        self.on(ReportReceived(load_report(name, step=self.num_steps, num_running=len(owned))))
        self.on(RequestsReceived(request_report(name, *owned, step=self.num_steps)))

    def start(self, move: StartMigration) -> None:
        truth = self.requests[move.request_id]
        if not truth.is_alive or truth.owner != move.source.instance or truth.move is not None:
            self.over.append((move, Outcome.FINISHED_AT_SOURCE))
            return
        truth.move, truth.is_stopped = move, False

    def advance(self, truth: Truth) -> None:
        """One stage further: stop, then commit, or give up."""
        move = truth.move
        if move is None:
            return
        if not truth.is_stopped:
            truth.is_stopped = True
        elif self.rng.random() < 0.7 and move.destination.instance in self.alive:
            truth.owner, truth.move, truth.is_stopped = move.destination.instance, None, False
            self.over.append((move, Outcome.COMMITTED))
        else:
            truth.move, truth.is_stopped = None, False
            self.over.append((move, Outcome.REFUSED))

    def carry_out(self) -> None:
        """An instance does what it was told, as it stands with it; or its answer is lost."""
        if not self.orders:
            return
        order = self.orders.pop(self.rng.randrange(len(self.orders)))
        truth, owner = self.requests[order.request_id], order.owner.instance
        if owner not in self.alive:
            self.on(PriorityAnswered(order.number, None, RefusalKind.OVERTAKEN, "its process ended"))
        elif not truth.is_alive or truth.owner != owner:
            self.on(PriorityAnswered(order.number, PriorityAnswer(PriorityOutcome.NOT_HERE)))
        elif truth.move is not None and truth.is_stopped:
            self.on(PriorityAnswered(order.number, PriorityAnswer(PriorityOutcome.ON_THE_MOVE)))
        else:
            previous, truth.priority = truth.priority, order.priority
            self.made[order.number] = order.priority
            given = PriorityAnswer(PriorityOutcome.SET, previous, RequestStatus.RUNNING)
            is_lost = self.rng.random() < 0.1
            self.on(PriorityAnswered(order.number, None if is_lost else given))

    def tell_end(self) -> None:
        if self.over:
            move, outcome = self.over.pop(0)
            self.on(MigrationEnded(move.number, outcome, "", MigrationFigures()))

    def end(self, truth: Truth) -> None:
        if truth.move is not None:
            self.over.append((truth.move, Outcome.FINISHED_AT_SOURCE))
        truth.is_alive, truth.move, truth.is_stopped = False, None, False

    def lose(self, name: InstanceId) -> None:
        self.alive.remove(name)
        for truth in self.requests.values():
            if truth.owner == name:
                move, truth.move, truth.is_alive = truth.move, None, False
                if move is not None:
                    self.over.append((move, Outcome.SOURCE_LOST))
        self.on(InstanceLost(name, Epoch(1), "killed"))

    def act(self, number: int) -> None:
        self.now_s += 0.05
        request_id, truth = self.rng.choice(list(self.requests.items()))
        actions = ["ask", "carry", "move", "advance", "over", "report", "gone", "end", "lose"]
        match self.rng.choices(actions, [4, 6, 5, 8, 4, 4, 1, 0.3, 0.1])[0]:
            case "ask":
                token, priority = Token(number), self.rng.randrange(-50, 50)
                self.wanted[token] = (request_id, priority)
                self.on(PriorityRequested(token, request_id, str(priority), "test"))
            case "carry":
                self.carry_out()
            case "move":
                self.on(MigrateRequested(Token(10_000 + number), request_id, self.rng.choice(NAMES)))
            case "advance":
                self.advance(truth)
            case "over":
                self.tell_end()
            case "report":
                self.report(self.rng.choice(self.alive))
            case "gone" if self.wanted:
                token = self.rng.choice(list(self.wanted))
                if not self.answers[token]:
                    self.gone.add(token)
                    self.on(WaiterGone(token))
            case "end":
                self.end(truth)
            case "lose" if len(self.alive) > 1:
                self.lose(self.rng.choice(self.alive))


def run(seed: int) -> World:
    world = World(random.Random(seed))
    for number in range(1, 200):
        world.act(number)
    for _ in range(200):
        for truth in world.requests.values():
            world.advance(truth)
        world.tell_end()
        world.carry_out()
    assert not world.orders and not world.over
    return world


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_each_caller_is_answered_once_and_done_means_done(seed: int) -> None:
    world = run(seed)
    for token in world.wanted:
        assert world.answers[token] == (0 if token in world.gone else 1)


def test_the_world_is_rich_enough_to_mean_something() -> None:
    kinds: Counter[str] = Counter()
    num_followed = 0
    for seed in range(40):
        world = run(seed)
        kinds += world.kinds
        num_followed += sum(truth.priority != 0 for truth in world.requests.values())
    assert kinds["done"] > 400
    assert (
        min(kinds[kind.value] for kind in (RefusalKind.NOT_FOUND, RefusalKind.OVERTAKEN, RefusalKind.UNAVAILABLE)) > 3
    )
    assert num_followed > 50
