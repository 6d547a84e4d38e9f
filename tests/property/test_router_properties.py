"""Whatever instances do and in whatever order their words arrive: a client sees the tokens of one run, in order, once.

A small world: instances that accept or refuse, step, hand requests to each other, fall silent and die; messages of one
sender stay in order (as ZeroMQ keeps them), those of two senders do not. Token k of run n is `1000 n + k`.
"""

from __future__ import annotations

import random
from collections import deque

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.messages import Abort, FleetMessage, Frame, OutputEntry, OwnerChanged, Submit, SubmitAnswer
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.gateway.errors import FailureKind
from orchestrator.gateway.router import Router
from orchestrator.gateway.types import Deliver, Effect, Fail, Outgoing, RouterParams, Send
from tests.support.idle_report import report

NUM_TOKENS = 6
FINISH = 1
NAMES = "abc"


class Host:
    def __init__(self, name: str) -> None:
        self.name = name
        self.runs: dict[str, tuple[int, int]] = {}
        """Request -> (run, output tokens so far)."""
        self.ended: set[str] = set()
        self.said: deque[FleetMessage] = deque()
        self.num_steps = 0


class World:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.router = Router(
            "tcp://gateway", RouterParams(dispatch_timeout_s=3.0, suspect_for_s=5.0, unanswered_for_s=1.0)
        )
        self.now_s = 0.0
        self.hosts = {name: Host(name) for name in NAMES}
        self.delivered: dict[str, list[int]] = {}
        self.ends: dict[str, FailureKind | None] = {}
        self.aborted: set[str] = set()
        self.num_runs = 0
        self.perform(self.router.set_members([self.incarnation(name) for name in NAMES], 0.0))

    def incarnation(self, name: str) -> Incarnation:
        return Incarnation(InstanceId(name), Epoch(1), f"tcp://{name}")

    def perform(self, effects: list[Effect]) -> None:
        self.router.check_integrity()
        for effect in effects:
            match effect:
                case Send(address=address, message=message):
                    host = self.hosts.get(address[-1])
                    if host is not None:
                        self.hear(host, message)
                case Deliver(entries=entries):
                    for entry in entries:
                        assert entry.request_id not in self.ends, "output after the end"
                        self.delivered.setdefault(entry.request_id, []).extend(entry.token_ids)
                        if entry.finish_reason is not None:
                            self.ends[entry.request_id] = None
                case Fail(request_id=request_id, failure=failure):
                    assert request_id not in self.ends, "a second end"
                    self.ends[request_id] = failure.kind
                case _:
                    pass

    def hear(self, host: Host, message: FleetMessage) -> None:
        match message:
            case Submit(request_id=request_id, output_token_ids=output):
                refusal = "busy" if request_id in host.ended or self.rng.random() < 0.3 else None
                if refusal is None and request_id not in host.runs:
                    self.num_runs += not output
                    run = output[0] // 1000 if output else self.num_runs
                    assert output == tuple(1000 * run + k for k in range(len(output))), "it goes on after its output"
                    host.runs[request_id] = (run, len(output))
                host.said.append(SubmitAnswer(request_id, host.name, 1, refusal))
            case Abort(request_ids=request_ids):
                host.ended.update(request_ids)
                for request_id in request_ids:
                    host.runs.pop(request_id, None)
            case _:
                pass

    def step(self, host: Host) -> None:
        host.num_steps += 1
        entries = []
        for request_id, (run, done) in list(host.runs.items()):
            size = min(self.rng.randint(1, 2), NUM_TOKENS - done)
            is_last = done + size == NUM_TOKENS
            ids = tuple(1000 * run + done + k for k in range(size))
            entries.append(OutputEntry(request_id, done, ids, FINISH if is_last else None))
            host.runs[request_id] = (run, done + size)
            if is_last:
                del host.runs[request_id]
        load = msgspec.structs.replace(report(host.name), step=host.num_steps)
        host.said.append(Frame(host.name, 1, host.num_steps, 0.0, tuple(entries), load))

    def migrate(self, source: Host, destination: Host) -> None:
        if source is destination or not source.runs:
            return
        request_id = self.rng.choice(sorted(source.runs))
        if request_id not in destination.ended and request_id not in destination.runs:
            destination.runs[request_id] = source.runs.pop(request_id)
            offset = destination.runs[request_id][1]
            destination.said.append(OwnerChanged(request_id, destination.name, 1, offset))

    def deliver(self, host: Host) -> None:
        if host.said:
            self.perform(self.router.on_message(host.said.popleft(), self.now_s))

    def kill(self, host: Host) -> None:
        del self.hosts[host.name]
        for _ in range(self.rng.randint(0, len(host.said))):
            self.deliver(host)
        late = list(host.said)
        self.perform(self.router.on_member_lost(InstanceId(host.name), Epoch(1), self.now_s))
        for message in late:
            self.perform(self.router.on_message(message, self.now_s))

    def act(self, num_submitted: int) -> None:
        host = self.rng.choice(list(self.hosts.values()))
        match self.rng.choices(
            ["step", "deliver", "migrate", "pass", "wait", "abort", "kill"], [8, 16, 4, 3, 0.4, 0.5, 0.2]
        )[0]:
            case "step":
                self.step(host)
            case "deliver":
                self.deliver(host)
            case "migrate":
                self.migrate(host, self.rng.choice(list(self.hosts.values())))
            case "pass":
                self.pass_time(0.05)
            case "wait":
                self.pass_time(self.rng.choice([0.6, 1.1, 11.0]))
            case "abort" if num_submitted:
                request_id = f"r{self.rng.randrange(num_submitted)}"
                self.aborted.add(request_id)
                self.perform(self.router.abort([request_id]))
            case "kill" if len(self.hosts) > 1:
                self.kill(host)

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.perform(self.router.tick(self.now_s))

    def settle(self) -> None:
        """Everybody works and speaks until nothing is left."""
        for _ in range(400):
            for host in list(self.hosts.values()):
                self.step(host)
                while host.said:
                    self.deliver(host)
            self.pass_time(0.05)
            if not self.router.num_requests:
                return
        raise AssertionError(f"{self.router.num_requests} requests never end")


def run(seed: int, num_requests: int = 6, num_actions: int = 250) -> World:
    world = World(random.Random(seed))
    for host in world.hosts.values():
        world.step(host)
        world.deliver(host)
    for position in range(num_actions):
        if position % 20 == 0 and position // 20 < num_requests:
            request_id = RequestId(f"r{position // 20}")
            outgoing = Outgoing(request_id, request_id, 0, 20, NUM_TOKENS, b"", lambda _: b"")
            world.perform(world.router.submit(outgoing, world.now_s))
        world.act(min(position // 20 + 1, num_requests))
    world.settle()
    return world


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_each_request_ends_once_with_the_tokens_of_one_run(seed: int) -> None:
    world = run(seed)
    for number in range(6):
        request_id = f"r{number}"
        tokens = world.delivered.get(request_id, [])
        assert len({token // 1000 for token in tokens}) <= 1, "tokens of two runs"
        assert [token % 1000 for token in tokens] == list(range(len(tokens)))
        if request_id not in world.aborted:
            assert request_id in world.ends
            if world.ends[request_id] is None:
                assert len(tokens) == NUM_TOKENS
    for host in world.hosts.values():
        for request_id in host.runs:
            assert request_id.split("~")[0] not in world.ends or "~" in request_id or request_id in world.aborted


def test_the_world_is_rich_enough_to_mean_something() -> None:
    """Refusals, moves, second attempts, revivals and aborts all happen, and most requests still complete."""
    worlds = [run(seed) for seed in range(40)]
    counts = [world.router.counts for world in worlds]
    assert sum(one.refused for one in counts) > 100
    assert sum(one.moved for one in counts) > 100
    assert sum(one.redispatched for one in counts) > 10
    ends = [end for world in worlds for end in world.ends.values()]
    assert sum(one.revived for one in counts) > 10
    assert ends.count(None) > len(ends) / 2
