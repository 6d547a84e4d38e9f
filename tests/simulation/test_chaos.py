"""Does a fleet keep its promises on days of faults? Some seeds of chaos, those that failed once, and broken fleets.

`python -m bench.chaos` plays a thousand.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from bench.chaos import main
from instance.messages import FleetMessage, Frame
from instance.types import CommittedRequest
from migration.types import Epoch, InstanceId, MigrationId, RequestId
from orchestrator.errors import ActorGone, CallFailed
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.gateway.types import Deliver
from orchestrator.sim.chaos import Day, Verdict, day_of, play, played_again, without_faults
from orchestrator.sim.faults import Fault, Kind, Scene, chaos
from orchestrator.sim.instance import SimInstance
from orchestrator.sim.invariants import replay_differs
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.world import World, WorldParams

SEEDS = range(24)
FAILED_ONCE = {
    11: "the frames with the last tokens of two requests were lost, and no later one showed the gap: never answered",
    25: "a request moved to an instance that its gateway did not hear, and ended there: never answered",
}
"""What was wrong when it was found. A change of `day_of` or of `chaos` gives a seed another day."""


def in_words(verdict: Verdict) -> str:
    return verdict.story() if verdict.broken else ""


@pytest.mark.parametrize("seed", sorted({*SEEDS, *FAILED_ONCE}))
def test_on_a_day_of_faults_every_promise_is_kept(seed: int) -> None:
    verdict = play(day_of(seed))
    assert in_words(verdict) == ""
    assert len(verdict.lived) == len(verdict.day.arrivals)


def test_the_same_day_of_faults_leaves_the_same_journal() -> None:
    for seed in (5, 8):
        day = day_of(seed)
        assert in_words(played_again(day, play(day))) == ""


def test_on_a_day_without_faults_no_request_fails() -> None:
    for seed in (5, 8):
        verdict = play(without_faults(day_of(seed)))
        assert in_words(verdict) == "" and verdict.failures == {}


def test_the_days_are_days_of_chaos() -> None:
    """All kinds of faults befall somebody, requests move, and some moves break off; most requests get their answer."""
    began, outcomes = Counter[str](), Counter[str]()
    num_whole = num_asked = 0
    for seed in range(100, 110):
        verdict = play(day_of(seed), replays=False)
        began.update(verdict.began)
        outcomes.update(verdict.outcomes)
        num_whole += sum(not one.error for one in verdict.lived)
        num_asked += len(verdict.lived)
    assert began.keys() == {kind.value for kind in Kind}
    assert outcomes["committed"] >= 12 and len(outcomes) >= 4
    assert num_whole > num_asked / 2


def test_the_bench_plays_seeds_and_counts_what_befell_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    assert main(["--seeds", "2", "--from", "7", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "2 days of chaos" in shown and "failing_seeds 0" in shown
    assert json.loads(file.read_text())["figures"]["seeds"] == 2


# ---------------------------------------------------------------------- schedules
def test_a_schedule_follows_from_its_seed_and_lies_within_its_span() -> None:
    scene = Scene(num_instances=4, num_gateways=2, span_s=20.0, scales=False)
    one, same, other = (chaos(Random(seed), scene) for seed in (1, 1, 2))
    assert one == same != other
    for seed in range(200):
        faults = chaos(Random(seed), scene)
        assert len(faults) >= 3 and list(faults) == sorted(faults, key=lambda fault: fault.at_s)
        assert all(0.0 <= fault.at_s <= 20.0 and fault.for_s <= 16.0 for fault in faults)
        assert all(fault.kind is not Kind.SCALE for fault in faults), "nobody could carry it out"
        assert all(fault.who != fault.other for fault in faults if fault.kind is Kind.PARTITION)


# ---------------------------------------------------------------------- what faults do
def with_faults(*faults: Fault, then: Callable[[World], Any], notice_s: float = 0.0) -> None:
    """A fleet without requests; `then` is awaited once its faults may begin."""

    async def day() -> None:
        world = World(WorldParams(num_instances=2, faults=faults, settle_s=0.1, notice_s=notice_s))

        async def epilogue() -> None:
            await then(world)

        world.epilogue = epilogue
        await world.play([])

    run_jumping(day())


def test_a_call_to_an_instance_that_is_cut_off_comes_through_late_or_not_at_all() -> None:
    async def then(world: World) -> None:
        loop, breaker = asyncio.get_running_loop(), world.breaker
        assert breaker is not None
        fault = Fault(0.0, Kind.PARTITION, "instance-1", "orchestrator", for_s=3.0)
        heal = breaker._begin(fault)
        assert heal is not None
        began_s = loop.time()
        with pytest.raises(CallFailed, match="instance-1-1 does not answer"):
            await world.fleet.set_draining("instance-1-1", True, 1.0)
        assert loop.time() - began_s == pytest.approx(1.0, abs=0.01)
        assert world.instances["instance-1"].agent.state.value == "serving"
        await world.fleet.set_draining("instance-0-1", False, 1.0)
        loop.call_later(2.0, heal)
        await world.fleet.set_draining("instance-1-1", True, 10.0)
        assert loop.time() - began_s == pytest.approx(3.0, abs=0.01)
        assert world.instances["instance-1"].agent.state.value == "draining"

    with_faults(Fault(0.0, Kind.LOSS, for_s=0.1, amount=0.0001), then=then)


def test_a_call_to_one_that_hangs_and_then_dies_says_that_it_is_gone() -> None:
    async def then(world: World) -> None:
        breaker = world.breaker
        assert breaker is not None and breaker._begin(Fault(0.0, Kind.HANG, "instance-1", for_s=9.0)) is not None
        asyncio.get_running_loop().call_later(2.0, world.kill_instance, "instance-1")
        with pytest.raises(ActorGone, match="instance-1-1 is gone"):
            await world.fleet.set_draining("instance-1-1", True, 5.0)

    with_faults(Fault(0.0, Kind.LOSS, for_s=0.1, amount=0.0001), then=then)


def test_what_is_sent_to_one_that_hangs_arrives_when_it_goes_on_and_in_order() -> None:
    async def then(world: World) -> None:
        breaker, instance = world.breaker, world.instances["instance-1"]
        assert breaker is not None
        heard: list[str] = []
        handle = instance.agent._handle
        instance.agent._handle = lambda message: (heard.append(message.address), handle(message))  # type: ignore
        end = breaker._begin(Fault(0.0, Kind.HANG, "instance-1", for_s=9.0))
        assert end is not None
        await asyncio.sleep(3.5)
        assert heard == []
        end()
        await asyncio.sleep(0.1)
        assert len(heard) >= 5 and {*heard} == {"sim://orchestrator", "sim://gateway-0"}, "who renews a subscription"

    with_faults(Fault(0.0, Kind.LOSS, for_s=0.1, amount=0.0001), then=then)


def test_a_crash_is_heard_of_late_and_the_next_incarnation_has_a_higher_epoch() -> None:
    async def then(world: World) -> None:
        assert world.instances["instance-1"].epoch == 2
        (first,) = [one for one in world.orchestrator.snapshot().instances if one.incarnation.epoch == 1][1:]
        assert first.incarnation.instance == "instance-1" and first.state.value == "stopped"

    with_faults(Fault(0.5, Kind.CRASH, "instance-1", for_s=2.0), then=then, notice_s=0.5)


# ---------------------------------------------------------------------- negative controls: broken fleets are found
def calm_day_with_moves() -> Day:
    """No fault but that requests are moved by hand."""
    moves = [
        Fault(1.0 + 0.2 * number, Kind.MOVE, f"instance-{number % 3}", amount=0.3, how="live") for number in range(30)
    ]
    day = day_of(1)
    params = replace(day.params, num_instances=3, faults=tuple(moves), give_up_s=20.0)
    return Day(day.seed, params, day.arrivals[:40])


def broken(sabotage: Callable[[World], None], day: Day | None = None) -> str:
    verdict = play(day or calm_day_with_moves(), sabotage=sabotage)
    story = verdict.story()
    assert verdict.broken and f"seed {verdict.day.seed}" in story and "move" in story
    return "\n".join(map(str, verdict.broken))


def at_each(break_it: Callable[[SimInstance], None]) -> Callable[[World], None]:
    def sabotage(world: World) -> None:
        attach = world.on_instance

        def attach_broken(instance: SimInstance) -> None:
            attach(instance)
            break_it(instance)

        world.on_instance = attach_broken

    return sabotage


def test_the_control_breaks_nothing() -> None:
    verdict = play(calm_day_with_moves())
    assert in_words(verdict) == "" and verdict.num_committed >= 5


def test_an_engine_that_forgets_to_free_a_block_is_found() -> None:
    def break_it(instance: SimInstance) -> None:
        engine, release = instance.engine, instance.engine.release

        def leaky(request_id: RequestId) -> bool:
            engine.batch.free -= 1
            return release(request_id)

        engine.release = leaky  # type: ignore[method-assign]

    found = broken(at_each(break_it))
    assert "blocks were lost" in found and "blocks free, and no request" in found


def test_an_engine_that_loses_the_last_token_when_it_takes_a_request_over_is_found() -> None:
    def break_it(instance: SimInstance) -> None:
        commit, batch = instance.engine.commit, instance.engine.batch

        def forgetful(migration_id: MigrationId, state: bytes) -> Any:
            committed = commit(migration_id, state)
            if isinstance(committed, CommittedRequest) and committed.num_output_tokens:
                sequence = batch.sequences[committed.request_id]
                sequence.tokens -= 1
                sequence.num_told -= 1
                batch.waiting_blocks += batch.blocks_for(sequence.tokens) - batch.blocks_for(sequence.tokens + 1)
                sequence.computed = min(sequence.computed, sequence.tokens - 1)
            return committed

        instance.engine.commit = forgetful  # type: ignore[method-assign]

    found = broken(at_each(break_it))
    assert "was told those at" in found and "alive, has brought to" in found


def test_a_gateway_that_forgets_what_it_has_told_when_an_instance_dies_is_found() -> None:
    """It begins anew what has begun: the client never hears it, since no token is told twice."""

    def sabotage(world: World) -> None:
        for gateway in world.gateways:
            gateway.router.relay.tokens = lambda _: ()  # type: ignore[assignment, method-assign]

    calm = calm_day_with_moves()
    crash = Fault(2.05, Kind.CRASH, "instance-1", for_s=2.0)
    day = Day(calm.seed, replace(calm.params, faults=(*calm.params.faults, crash)), calm.arrivals)
    assert in_words(play(day)) == ""
    assert "~2 at token 0, not" in broken(sabotage, day)


def test_a_source_that_goes_on_after_the_hand_over_is_found() -> None:
    def break_it(instance: SimInstance) -> None:
        engine = instance.engine

        def keep(request_id: RequestId) -> bool:
            engine.resume(request_id)
            return True

        engine.release = keep  # type: ignore[method-assign]

    assert "is stepped by" in broken(at_each(break_it))


def test_a_gateway_that_tells_its_clients_twice_is_found() -> None:
    def sabotage(world: World) -> None:
        for gateway in world.gateways:

            def twice(delivery: Deliver) -> None:
                world.clients._deliver(delivery)
                world.clients._deliver(delivery)

            gateway._on_deliver = twice

    assert "and was told those at" in broken(sabotage)


def test_frames_that_the_network_brings_twice_do_no_harm() -> None:
    """The relay drops what it has had: no negative control, but the reason why the one above needs a broken gateway."""

    def sabotage(world: World) -> None:
        carry = world.network.carry

        def twice(sender: str, receiver: str, message: FleetMessage) -> bool:
            if isinstance(message, Frame):
                carry(sender, receiver, message)
            return carry(sender, receiver, message)

        world.network.carry = twice  # type: ignore[method-assign]

    assert in_words(play(calm_day_with_moves(), sabotage=sabotage)) == ""


def test_a_request_that_fails_for_no_cause_is_found() -> None:
    def sabotage(world: World) -> None:
        failure = Failure(FailureKind.INSTANCE_LOST, "so it says")

        def fail_one() -> None:
            for gateway in world.gateways:
                gateway.fail_all(failure)

        asyncio.get_running_loop().call_later(4.0, fail_one)

    assert "nothing can have caused it: instance_lost: so it says" in broken(sabotage)


def test_a_request_that_ends_twice_or_too_early_is_found() -> None:
    def sabotage(world: World) -> None:
        deliver = world.clients._deliver

        def hasty(delivery: Deliver) -> None:
            entries = [replace_entry(entry) for entry in delivery.entries]
            deliver(replace(delivery, entries=tuple(entries)))

        def replace_entry(entry: Any) -> Any:
            return type(entry)(entry.request_id, entry.offset, entry.token_ids, finish_reason=0)

        for gateway in world.gateways:
            gateway._on_deliver = hasty

    found = broken(sabotage)
    assert "tokens after its end" in found and "ended with" in found


def test_a_request_that_is_never_answered_is_found() -> None:
    """Its frames are swallowed by a gateway that believes to have passed them on."""

    def sabotage(world: World) -> None:
        for gateway in world.gateways:
            gateway._on_deliver = lambda delivery: None

    assert "r0 was never answered: 0 tokens" in broken(sabotage)


def test_a_migration_that_never_ends_is_found() -> None:
    def sabotage(world: World) -> None:
        async def never(*_: object) -> Any:
            await asyncio.Event().wait()

        world.fleet.migrate = never  # type: ignore[assignment, method-assign]

    assert "has not ended" in broken(sabotage)


def test_a_core_that_decides_otherwise_is_found_by_the_replay() -> None:
    verdict = play(calm_day_with_moves())
    lines = list(verdict.journal)
    assert replay_differs(lines) is None
    at = next(number for number, line in enumerate(lines) if b"StartMigration" in line)
    lines[at] = lines[at].replace(b'"live"', b'"blocking"')
    differs = replay_differs(lines)
    assert differs is not None and "MigrationFinished" in differs


def test_a_day_that_hangs_on_something_else_than_its_seed_is_found() -> None:
    day = day_of(1)
    other = play(replace(day, params=replace(day.params, latency_s=day.params.latency_s * 1.01)), replays=False)
    assert "leaves another journal" in in_words(played_again(day, other))


def test_the_peers_of_one_that_crashed_are_told_its_epoch() -> None:
    day = day_of(1)
    crash = Fault(2.05, Kind.CRASH, "instance-1")
    seen: list[World] = []
    play(replace(day, params=replace(day.params, num_instances=3, faults=(crash,))), sabotage=seen.append)
    fenced = [world.instances["instance-0"].agent._fenced for world in seen]
    assert fenced == [{InstanceId("instance-1"): Epoch(1)}]
