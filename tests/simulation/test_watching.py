"""Is what a simulated world tells of a day what its requests have lived, and does looking change nothing?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from migration.types import Epoch, InstanceId, RequestId
from orchestrator.events import InstanceStarted
from orchestrator.sim.arms import ARMS
from orchestrator.sim.gaps import RUN_S, together
from orchestrator.sim.world import World, _Launcher
from tests.simulation.test_world import ROBIN, SMALL, asked, params, play


def test_looking_changes_nothing() -> None:
    def look_away(world: World) -> None:
        world.watch._instances = {}

    def live(meanwhile: Callable[[World], None]) -> tuple[bytes, list[float], list[int]]:
        lived, _, world = play(params(ROBIN, keeps_journal=True), asked(3), meanwhile)
        assert world.journal is not None
        return world.journal.text(), [one.last_s for one in lived], [len(one.instances) for one in world.watch.moments]

    (journal, last_s, seen), (other_journal, other_last_s, hardly_seen) = live(lambda _: None), live(look_away)
    assert (journal, last_s) == (other_journal, other_last_s)
    assert set(seen) == {2} and hardly_seen[-1] == 0


def test_gaps_losses_and_downtimes_add_up_to_what_clients_saw() -> None:
    lived, counts, world = play(params(ROBIN), asked(2, count=250))
    gaps = together(world.clients.gaps.values())
    assert gaps.num == sum(one.num_tokens - 1 for one in lived)
    assert gaps.sum_s == pytest.approx(sum(one.last_s - one.first_s for one in lived))
    losses = world.losses.by_request
    assert sum(loss.num_preemptions for loss in losses.values()) == counts.preemptions > 10
    assert not world.losses.is_any_open
    stood_still = [one for one in lived if (loss := losses.get(one.request_id)) and loss.num_preemptions == 1]
    # What it had got when it was preempted may be told a run later, and a gap may be found too short by as much.
    waited = [one for one in stood_still if one.longest_gap_s > losses[one.request_id].seconds - 2 * RUN_S]
    # One that had no token yet, or was preempted while it was computed, shows it in its first one.
    assert all(one.ttft_s > losses[one.request_id].seconds for one in stood_still if one not in waited)
    assert len(waited) > 5
    assert 0 < len(world.clients.downtimes_s) <= counts.migrations
    assert min(world.clients.downtimes_s) > 0.005, "a step of the destination's lies in it"


def test_a_day_is_seen_second_by_second() -> None:
    arrivals = asked(6)
    lived, counts, world = play(params(num_instances=3), arrivals, lambda world: world.kill_instance("instance-2"))
    moments = world.watch.moments
    assert [round(each.at_s, 6) for each in moments] == [float(second) for second in range(len(moments))]
    killed_s = arrivals[len(arrivals) // 3].at_s
    assert [len(each.instances) for each in moments] == [3 if each.at_s <= killed_s else 2 for each in moments]
    assert moments[0].instances["instance-0"].free_blocks == SMALL.num_blocks
    assert moments[-1].num_moves == counts.migrations
    assert max(one.num_running for each in moments for one in each.instances.values()) > 3
    assert max(each.fragmentation for each in moments) > 0
    began_s, settle_s = lived[0].sent_s - arrivals[0].at_s, world.params.settle_s
    assert world.presence.seconds(began_s, began_s + 1_000) == pytest.approx(2_000 + killed_s, abs=0.01)
    assert began_s == pytest.approx(settle_s, abs=0.1)


def test_an_instance_that_is_started_is_paid_for_while_it_starts() -> None:
    starting: list[asyncio.Future[InstanceStarted]] = []

    def start(world: World) -> None:
        starting.append(asyncio.ensure_future(_Launcher(world).start(InstanceId("late"), Epoch(1))))

    arrivals = asked(1)
    _, _, world = play(params(ARMS["dispatch"], start_s=5.0), arrivals, start)
    assert starting.pop().done()
    launched_s = world.params.settle_s + arrivals[len(arrivals) // 3].at_s
    assert world.presence.began_s["late-1"] == pytest.approx(launched_s, abs=0.01)


def test_first_requests_do_not_count() -> None:
    arrivals = asked(9, count=60)
    whole, _, world = play(params(), arrivals)
    all_of_it = together(world.clients.gaps.values()).num
    assert RequestId("r0") == whole[0].request_id

    def leave_out(world: World) -> None:
        world.clients.first_counted = 30

    _, _, world = play(params(), arrivals, leave_out)  # said after a third of them
    assert together(world.clients.gaps.values()).num == all_of_it - sum(one.num_tokens - 1 for one in whole[20:30])
