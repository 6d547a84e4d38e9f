"""Do requests move between two whole instances (fake engines, real inboxes and carriers) without anyone noticing?"""

from __future__ import annotations

import asyncio
import random

import pytest

from instance.messages import PriorityChanged, RequestLoad
from instance.spec import Carrier, MigrationSummary
from instance.types import PriorityOutcome, RequestStatus, Wishes
from tests.support.fleet import Fleet, a_request, expected_output, fleet_of


async def migrate(fleet: Fleet, request_id: str, source: str, destination: str, mode: str = "live") -> MigrationSummary:
    return await fleet.services[source].migrate(request_id, fleet.members[destination], mode)


@pytest.mark.parametrize("carrier", [Carrier.TCP, Carrier.SHM])
@pytest.mark.parametrize("mode", ["live", "blocking", "recompute"])
async def test_a_stream_goes_on_exactly_where_it_was_after_a_migration(mode: str, carrier: Carrier) -> None:
    request = a_request(1, num_prompt_tokens=300, max_tokens=800)
    async with fleet_of(2, carrier=carrier) as fleet:
        await fleet.run("i0", "r", request, 30)
        told = await migrate(fleet, "r", "i0", "i1", mode)
        assert (told.outcome, told.source, told.destination) == ("committed", "i0", "i1"), told
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        assert fleet.gateway.senders("r") == ["i0", "i1"]
        (changed,) = fleet.gateway.owners["r"]
        first_there = next(entry for instance, entry in fleet.gateway.entries["r"] if instance == "i1")
        assert (changed.instance, changed.epoch, changed.offset) == ("i1", 1, first_there.offset)
        if mode == "live":
            assert told.copied_blocks >= 18 and told.tail_blocks <= 3 and told.moved_tokens >= 330
        if mode == "recompute":
            assert (told.copied_blocks, told.tail_blocks) == (0, 0)
        await fleet.check_rest()


async def test_decoding_goes_on_while_the_stages_are_copied() -> None:
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", a_request(2, num_prompt_tokens=2000, max_tokens=500), 10)
        told = await migrate(fleet, "r", "i0", "i1")
        assert told.outcome == "committed" and told.steps_during_copy >= 1
        fleet.gateway.abort(*fleet.members.values(), request_ids=("r",))


async def test_a_stream_survives_many_moves_there_and_back_on_pipelined_engines() -> None:
    request = a_request(3, max_tokens=1000, seed=5)
    async with fleet_of(2, "--pipelined") as fleet:
        await fleet.run("i0", "r", request, 5)
        here, there, num_moves = "i0", "i1", 0
        while not fleet.gateway.is_finished("r") and num_moves < 20:
            told = await migrate(fleet, "r", here, there)
            if told.outcome != "committed":
                assert told.outcome == "finished_at_source", told
                break
            here, there, num_moves = there, here, num_moves + 1
        await fleet.finish("r")
        assert num_moves >= 10
        assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()


@pytest.mark.parametrize("seed", range(3))
async def test_any_moves_of_many_requests_under_traffic_are_exact(seed: int) -> None:
    """Until ten moves have been committed: on a busy machine requests may end before many can move."""
    rng = random.Random(seed)
    flags = ["--num-gpu-blocks-override", "70", "--max-num-seqs", "6", "--max-num-batched-tokens", "64"]
    flags += ["--pipelined"] if seed % 2 else []
    outcomes: list[str] = []
    async with fleet_of(3, *flags, max_migrations_out=8, max_migrations_in=8) as fleet:
        for batch in range(10):
            await move_many_about(fleet, f"{seed}-{batch}", rng, outcomes)
            await fleet.check_rest()
            if outcomes.count("committed") >= 10:
                return
    raise AssertionError(f"too few moves: {outcomes}")


async def move_many_about(fleet: Fleet, name: str, rng: random.Random, outcomes: list[str]) -> None:
    """24 requests, each of which moves again and again until it ends; `outcomes` grows."""
    requests = {
        f"{name}-r{i}": a_request(rng.randrange(6), rng.randrange(1, 150), rng.randrange(100, 500), rng.randrange(2))
        for i in range(24)
    }
    names = list(fleet.members)
    at = {request_id: rng.choice(names) for request_id in requests}
    for request_id, request in requests.items():
        fleet.gateway.submit(fleet.members[at[request_id]], request_id, request, priority=rng.randrange(3))

    async def move_about(request_id: str, rng: random.Random) -> None:
        while not fleet.gateway.is_finished(request_id):
            destination = rng.choice([name for name in names if name != at[request_id]])
            told = await migrate(fleet, request_id, at[request_id], destination, rng.choice(["live", "blocking"]))
            outcomes.append(told.outcome)
            if told.outcome == "committed":
                at[request_id] = destination
            await fleet.gateway.hear_more(rng.randrange(5, 40), unless_finished=request_id)

    await asyncio.gather(*(move_about(request_id, random.Random(request_id)) for request_id in requests))
    await fleet.finish(*requests)
    for request_id, request in requests.items():
        assert fleet.gateway.tokens(request_id) == expected_output(request), request_id


async def test_a_new_priority_is_told_to_the_gateway_and_in_both_reports_and_changes_no_token() -> None:
    request = a_request(6, 60, 600)
    async with fleet_of(1) as fleet:
        fleet.gateway.subscribe(fleet.members["i0"], with_requests=True)
        await fleet.run("i0", "r", request, 5)
        answer = await fleet.services["i0"].set_priority("r", -10)
        assert (answer.outcome, answer.previous, answer.status) == (PriorityOutcome.SET, 0, RequestStatus.RUNNING)

        def is_reported() -> bool:
            (shown,) = fleet.gateway.request_reports["i0"].requests or (None,)
            return shown is not None and shown.priority == -10

        await fleet.gateway.until(lambda: "i0" in fleet.gateway.request_reports and is_reported())
        await fleet.gateway.until(lambda: fleet.gateway.reports["i0"].running_by_priority == ((-10, 1),))
        assert fleet.gateway.priorities["r"] == [PriorityChanged("r", "i0", 1, -10)]
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        assert (await fleet.services["i0"].set_priority("r", 3)).outcome is PriorityOutcome.NOT_HERE
        assert len(fleet.gateway.priorities["r"]) == 1, "what was not changed is not told"


@pytest.mark.parametrize("flags", [(), ("--pipelined",)])
async def test_priorities_changed_in_the_middle_of_moves_are_kept_and_each_change_has_one_owner(
    flags: tuple[str, ...],
) -> None:
    """1. A request moves there and back without pause. 2. Its priority is changed all the while, at whichever instance
    has it. 3. Each change is made by one of them, or by none while it is stopped; the last one made counts."""
    request = a_request(7, num_prompt_tokens=200, max_tokens=1500)
    async with fleet_of(2, *flags) as fleet:
        await fleet.run("i0", "r", request, 5)
        owner, last, num_moves, kinds = "i0", 0, 0, set()
        while not fleet.gateway.is_finished("r") and num_moves < 12:
            other = "i1" if owner == "i0" else "i0"
            moving = asyncio.create_task(migrate(fleet, "r", owner, other))
            while not moving.done():
                answers = [await fleet.services[name].set_priority("r", last + 1) for name in (owner, other)]
                made = [answer for answer in answers if answer.outcome is PriorityOutcome.SET]
                kinds |= {answer.outcome for answer in answers}
                if made:
                    assert made[0].previous == last, "the change before was lost"
                    last += 1
                if len(made) == 2:
                    assert made[1].previous == last, "it was handed over between the two, with the new priority"
            if (await moving).outcome == "committed":
                owner, num_moves = other, num_moves + 1
        assert num_moves >= 8
        assert PriorityOutcome.SET in kinds and PriorityOutcome.NOT_HERE in kinds
        if not fleet.gateway.is_finished("r"):
            views = await fleet.services[owner].loop.call(lambda engine: engine.requests())
            assert [view.priority for view in views] == [last]
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()


async def test_two_requests_cross_each_other() -> None:
    one, two = a_request(4, 200, 800), a_request(5, 180, 800)
    async with fleet_of(2) as fleet:
        await asyncio.gather(fleet.run("i0", "one", one, 20), fleet.run("i1", "two", two, 20))
        told = await asyncio.gather(migrate(fleet, "one", "i0", "i1"), migrate(fleet, "two", "i1", "i0"))
        assert [summary.outcome for summary in told] == ["committed", "committed"]
        await fleet.finish("one", "two")
        assert (fleet.gateway.tokens("one"), fleet.gateway.tokens("two")) == (
            expected_output(one),
            expected_output(two),
        )
        await fleet.check_rest()


async def test_a_second_migration_of_a_moving_request_is_refused() -> None:
    request = a_request(6, 1000, 1500)
    async with fleet_of(3) as fleet:
        await fleet.run("i0", "r", request, 5)
        first = asyncio.create_task(migrate(fleet, "r", "i0", "i1"))
        await asyncio.sleep(0)
        second = await migrate(fleet, "r", "i0", "i2")
        assert (second.outcome, second.reason) == ("refused", "it is being moved already")
        assert (await first).outcome == "committed"
        away = await migrate(fleet, "r", "i1", "i1")
        assert away.outcome == "refused"
        fleet.gateway.abort(*fleet.members.values(), request_ids=("r",))
        await fleet.gateway.until(lambda: True)


async def test_the_bound_on_migrations_out_is_kept() -> None:
    async with fleet_of(2, max_migrations_out=1) as fleet:
        await asyncio.gather(*(fleet.run("i0", name, a_request(7, 400, 800), 5) for name in ("a", "b")))
        told = await asyncio.gather(migrate(fleet, "a", "i0", "i1"), migrate(fleet, "b", "i0", "i1"))
        assert sorted(summary.outcome for summary in told) == ["committed", "refused"]
        await fleet.finish("a", "b")
        await fleet.check_rest()


@pytest.mark.parametrize("after", range(0, 12, 2))
@pytest.mark.parametrize("heard_by", ["both", "source only", "destination only"])
async def test_an_abort_during_a_migration_ends_the_request_on_whichever_side_owns_it(
    after: int, heard_by: str
) -> None:
    """1. A request is being moved. 2. Its client leaves: the gateway tells every instance, and any of them may hear it
    first, or not at all. 3. Wherever the migration was, nobody may run the request on, and no block may stay held."""
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", a_request(8, 300, 3000), 5)
        moving = asyncio.create_task(migrate(fleet, "r", "i0", "i1"))
        for _ in range(after * 4):
            await asyncio.sleep(0)
        hearers = {"both": ("i0", "i1"), "source only": ("i0",), "destination only": ("i1",)}[heard_by]
        fleet.gateway.abort(*(fleet.members[name] for name in hearers), request_ids=("r",))
        told = await moving
        if heard_by == "destination only" and told.outcome != "committed":
            assert not fleet.gateway.is_finished("r")  # Lossless: the source has it still.
        if heard_by == "destination only":
            fleet.gateway.abort(*fleet.members.values(), request_ids=("r",))
        if heard_by == "source only" and told.outcome == "committed":
            # Committed before the source heard of it: only a broadcast can reach the new owner.
            fleet.gateway.abort(fleet.members["i1"], request_ids=("r",))
        await until_idle(fleet)
        await fleet.check_rest()
        again = a_request(8, 300, 30)
        fleet.gateway.submit(fleet.members["i0"], "r", again)
        await fleet.gateway.until(lambda: fleet.gateway.answers["r"].refusal is not None)
        assert fleet.gateway.answers["r"].final


async def until_idle(fleet: Fleet) -> None:
    async with asyncio.timeout(10):
        for service in fleet.services.values():
            # Every turn is a visit to the engine's thread, so this waits for it and does not spin.
            while service.agent.num_streams or await service.loop.call(lambda engine: len(engine.requests())):
                await service.loop.call(lambda engine: None)


async def reported(fleet: Fleet, instance: str, request_id: str) -> RequestLoad:
    """The request as that instance says it is, once it does."""
    fleet.gateway.subscribe(fleet.members[instance], with_requests=True)

    def told() -> list[RequestLoad]:
        report = fleet.gateway.request_reports.get(instance)
        return [one for one in report.requests if one.request_id == request_id] if report else []

    await fleet.gateway.until(lambda: bool(told()))
    return told()[0]


async def test_a_requests_targets_and_the_time_it_has_waited_go_with_it() -> None:
    """Its life until now is what it had waited before it came, and its age there: on both instances."""
    async with fleet_of(2) as fleet:
        wishes = Wishes(ttft_s=2.5, tpot_s=0.05, waited_s=100.0)
        fleet.gateway.submit(fleet.members["i0"], "r", a_request(31, 200, 3000), wishes=wishes)
        fleet.gateway.submit(fleet.members["i0"], "plain", a_request(32, 20, 3000))
        here = await reported(fleet, "i0", "r")
        assert (here.ttft_s, here.tpot_s, here.waited_s) == (2.5, 0.05, 100.0)
        plain = await reported(fleet, "i0", "plain")
        assert (plain.ttft_s, plain.tpot_s, plain.waited_s) == (None, None, 0.0)
        assert (await migrate(fleet, "r", "i0", "i1")).outcome == "committed"
        assert (await migrate(fleet, "plain", "i0", "i1")).outcome == "committed"
        there = await reported(fleet, "i1", "r")
        assert (there.ttft_s, there.tpot_s) == (2.5, 0.05)
        assert there.waited_s >= here.waited_s + here.arrived_s, "what it waited on the first one counts"
        plain_there = await reported(fleet, "i1", "plain")
        assert plain_there.tpot_s is None and plain_there.waited_s >= plain.arrived_s, "nor is it younger there"
        fleet.gateway.abort(*fleet.members.values(), request_ids=("r", "plain"))
