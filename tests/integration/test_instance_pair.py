"""Do requests move between two whole instances (fake engines, real inboxes and carriers) without anyone noticing?"""

from __future__ import annotations

import asyncio
import random

import pytest

from instance.errors import StartError
from instance.mailbox import Mailbox
from instance.messages import Abort, MigrationEnvelope, PriorityChanged
from instance.service import InstanceService
from instance.spec import Carrier, EngineKind, InstanceSpec, MigrationSummary
from instance.types import PriorityOutcome, RequestStatus
from migration.types import Incarnation
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
    rng = random.Random(seed)
    requests = {
        f"r{i}": a_request(rng.randrange(6), rng.randrange(1, 150), rng.randrange(100, 500), rng.randrange(2))
        for i in range(24)
    }
    flags = ["--num-gpu-blocks-override", "70", "--max-num-seqs", "6", "--max-num-batched-tokens", "64"]
    flags += ["--pipelined"] if seed % 2 else []
    async with fleet_of(3, *flags, max_migrations_out=8, max_migrations_in=8) as fleet:
        names = list(fleet.members)
        at = {request_id: rng.choice(names) for request_id in requests}
        for request_id, request in requests.items():
            fleet.gateway.submit(fleet.members[at[request_id]], request_id, request, priority=rng.randrange(3))
        outcomes: list[str] = []

        async def move_about(request_id: str, rng: random.Random) -> None:
            while not fleet.gateway.is_finished(request_id):
                destination = rng.choice([name for name in names if name != at[request_id]])
                told = await migrate(fleet, request_id, at[request_id], destination, rng.choice(["live", "blocking"]))
                outcomes.append(told.outcome)
                if told.outcome == "committed":
                    at[request_id] = destination
                await fleet.gateway.hear_more(rng.randrange(5, 40), unless_finished=request_id)

        await asyncio.gather(
            *(move_about(request_id, random.Random(f"{seed}/{request_id}")) for request_id in requests)
        )
        await fleet.finish(*requests)
        for request_id, request in requests.items():
            assert fleet.gateway.tokens(request_id) == expected_output(request), request_id
        await fleet.check_rest()
        assert outcomes.count("committed") >= 10, outcomes


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


async def test_a_draining_instance_takes_nothing_in_and_its_requests_can_leave() -> None:
    request = a_request(9, 100, 800)
    async with fleet_of(2) as fleet:
        await asyncio.gather(fleet.run("i0", "leaver", request, 5), fleet.run("i1", "stranger", request, 5))
        fleet.gateway.subscribe(fleet.members["i0"])
        fleet.services["i0"].drain()
        await fleet.gateway.until(lambda: getattr(fleet.gateway.reports.get("i0"), "state", "") == "draining")
        fleet.gateway.submit(fleet.members["i0"], "late", request)
        await fleet.gateway.until(lambda: "late" in fleet.gateway.answers)
        late = fleet.gateway.answers["late"]
        assert (late.refusal, late.final) == ("this instance is draining", False)
        told_in = await migrate(fleet, "stranger", "i1", "i0")
        assert (told_in.outcome, "draining" in told_in.reason) == ("refused", True), told_in
        assert (await migrate(fleet, "leaver", "i0", "i1")).outcome == "committed"
        await fleet.finish("leaver", "stranger")
        assert fleet.gateway.tokens("leaver") == fleet.gateway.tokens("stranger") == expected_output(request)
        fleet.services["i0"].undrain()
        await fleet.run("i0", "welcome", request, 5)
        await fleet.finish("welcome")
        await fleet.check_rest()


async def test_a_full_destination_refuses_and_nothing_leaks() -> None:
    request = a_request(10, 800, 500)
    async with fleet_of(2, "--num-gpu-blocks-override", "90") as fleet:
        await asyncio.gather(fleet.run("i0", "mover", request, 5), fleet.run("i1", "owner", a_request(11, 900, 500), 5))
        told = await migrate(fleet, "mover", "i0", "i1")
        assert told.outcome == "refused" and "blocks" in told.reason, told
        await fleet.finish("mover", "owner")
        assert fleet.gateway.tokens("mover") == expected_output(request)
        await fleet.check_rest()


@pytest.mark.parametrize("after", [0, 3, 6, 10, 15, 25, 40])
async def test_when_the_destination_dies_in_the_middle_the_source_goes_on(after: int) -> None:
    """1. The source copies stages. 2. The destination is killed. 3. The orchestrator tells the source that this epoch
    is over. 4. The source keeps (or takes back) the request, unless it was committed before: then the gateway rescues.
    """
    request = a_request(12, 1500, 400)
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", request, 5)
        moving = asyncio.create_task(migrate(fleet, "r", "i0", "i1"))
        for _ in range(after):
            await asyncio.sleep(0)
        lost = await fleet.kill("i1")
        fleet.services["i0"].member_lost(lost.instance, lost.epoch)
        told = await moving
        if told.outcome != "committed":
            await fleet.finish("r")
            assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()


async def test_when_the_source_dies_in_the_middle_the_destination_frees_what_it_held() -> None:
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", a_request(13, 3000, 400), 5)
        moving = asyncio.create_task(migrate(fleet, "r", "i0", "i1"))
        service = fleet.services["i1"]
        async with asyncio.timeout(10):
            while await service.loop.call(lambda engine: engine.load().reserved_blocks) == 0:
                pass
        lost = await fleet.kill("i0")
        moving.cancel()
        service.member_lost(lost.instance, lost.epoch)
        async with asyncio.timeout(10):
            while await service.loop.call(lambda engine: engine.load().reserved_blocks):
                pass
        fleet.gateway.abort(fleet.members["i1"], request_ids=("r",))  # If it had been committed just before.
        await until_idle(fleet)
        await fleet.check_rest()


async def test_a_destination_of_another_epoch_refuses() -> None:
    request = a_request(14, 100, 800)
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", request, 5)
        there = fleet.members["i1"]
        told = await fleet.services["i0"].migrate("r", Incarnation(there.instance, type(there.epoch)(7), there.address))
        assert told.outcome == "refused" and "epoch" in told.reason, told
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()


async def test_a_submission_for_another_epoch_is_refused_and_a_repeated_one_answered_again() -> None:
    async with fleet_of(1) as fleet:
        fleet.gateway.submit(fleet.members["i0"], "old", a_request(15), epoch=0)
        await fleet.gateway.until(lambda: "old" in fleet.gateway.answers)
        assert "epoch" in str(fleet.gateway.answers["old"].refusal) and not fleet.gateway.answers["old"].final
        request = a_request(16, 20, 100)
        await fleet.run("i0", "r", request, 3)
        del fleet.gateway.answers["r"]
        fleet.gateway.submit(fleet.members["i0"], "r", request)
        await fleet.finish("r")
        assert fleet.gateway.answers["r"].refusal is None
        assert fleet.gateway.tokens("r") == expected_output(request)


async def test_a_submission_is_refused_when_too_many_wait() -> None:
    async with fleet_of(1, "--max-num-seqs", "1", max_waiting=3) as fleet:
        await fleet.run("i0", "busy", a_request(17, 20, 3000), 3)
        for index in range(6):
            fleet.gateway.submit(fleet.members["i0"], f"r{index}", a_request(18, 20, 5))
        await fleet.gateway.until(lambda: len(fleet.gateway.answers) == 7)
        refused = [name for name, answer in fleet.gateway.answers.items() if answer.refusal is not None]
        assert refused == ["r3", "r4", "r5"]
        fleet.gateway.abort(fleet.members["i0"], request_ids=("busy",))
        await fleet.finish("r0", "r1", "r2")
        await fleet.check_rest()


async def test_a_request_that_can_never_run_is_refused_for_good() -> None:
    async with fleet_of(1, "--max-model-len", "100") as fleet:
        fleet.gateway.submit(fleet.members["i0"], "r", a_request(19, 90, 50))
        await fleet.gateway.until(lambda: "r" in fleet.gateway.answers)
        assert fleet.gateway.answers["r"].final and "100" in str(fleet.gateway.answers["r"].refusal)
        await fleet.check_rest()


async def test_malformed_and_foreign_messages_are_counted_and_change_nothing() -> None:
    request = a_request(20, 50, 150)
    async with fleet_of(1) as fleet:
        member, service = fleet.members["i0"], fleet.services["i0"]
        await fleet.run("i0", "r", request, 3)
        fleet.gateway.mailbox.send(member.address, MigrationEnvelope("x", 1, "tcp://127.0.0.1:1", 1, b"\xffrubbish"))
        fleet.gateway.mailbox.send(member.address, MigrationEnvelope("x", 1, "tcp://127.0.0.1:1", 9, b"\xffrubbish"))
        fleet.gateway.mailbox.send(member.address, fleet.gateway.answers["r"])
        stranger = Mailbox("guessed")
        await stranger.open()
        stranger.send(member.address, Abort(("r",)))
        await fleet.finish("r")
        stranger.close()
        assert fleet.gateway.tokens("r") == expected_output(request)
        assert service.agent.counts.malformed_migration == 2
        assert service.agent.counts.unexpected == 1
        assert service.mailbox.counts.strangers == 1, "an abort with another token aborts nothing"
        await fleet.check_rest()


async def test_subscribers_hear_of_load_and_requests_and_only_while_their_lease_runs() -> None:
    async with fleet_of(1) as fleet:
        fleet.gateway.subscribe(fleet.members["i0"], lease_s=0.35, with_requests=True)
        await fleet.gateway.until(lambda: fleet.gateway.num_reports["i0"] >= 3)
        idle = fleet.gateway.reports["i0"]
        assert (idle.free_blocks, idle.num_running, idle.state) == (256, 0, "serving")
        await fleet.gateway.until(lambda: "i0" in fleet.gateway.request_reports)
        assert fleet.gateway.request_reports["i0"].requests == ()
        await fleet.run("i0", "r", a_request(21, 100, 100), 5)
        busy = fleet.gateway.reports["i0"]
        assert busy.num_running == 1 and busy.free_blocks < 256 and busy.submits_seen == 1
        assert busy.step > idle.step and busy.step_time_s > 0
        await fleet.finish("r")
        async with asyncio.timeout(5):
            while fleet.services["i0"].agent.num_subscribers:
                await fleet.services["i0"].loop.call(lambda engine: None)


async def test_an_instance_whose_engine_breaks_ends_and_says_why_once() -> None:
    async with fleet_of(1, "--fail-at-step", "10") as fleet:
        service = fleet.services["i0"]
        fleet.gateway.submit(fleet.members["i0"], "r", a_request(22))
        with pytest.raises(Exception, match="FakeEngineBroke") as died:
            async with asyncio.timeout(5):
                await service.lifetime()
        assert type(died.value).__name__ == "EngineFailed"
        refused = await service.migrate("r", fleet.members["i0"])
        assert refused.outcome == "refused"


async def test_a_stop_is_prompt_even_while_a_commit_is_unanswered() -> None:
    """1. A request is being moved. 2. The destination dies and nobody tells the source. 3. The source is stopped."""
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", a_request(23, 500, 2000), 5)
        moving = asyncio.create_task(migrate(fleet, "r", "i0", "i1"))
        await asyncio.sleep(0)
        await fleet.kill("i1")
        begun_s = asyncio.get_running_loop().time()
        await fleet.services.pop("i0").stop()
        assert asyncio.get_running_loop().time() - begun_s < 3.0
        await moving


async def test_an_instance_without_a_token_does_not_start() -> None:
    with pytest.raises(StartError, match="token is empty"):
        await InstanceService().start(InstanceSpec("i0", 1, EngineKind.FAKE))


async def test_an_instance_of_another_fleet_takes_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. One instance was started with another token. 2. A request is moved to it. 3. Nobody answers, it stays."""
    request = a_request(16, 100, 400)
    async with fleet_of(1) as fleet:
        monkeypatch.setattr("tests.support.fleet.TOKEN", "another")
        there = await fleet.add("i1")
        await fleet.run("i0", "r", request, 5)
        moving = asyncio.create_task(fleet.services["i0"].migrate("r", there))
        await fleet.finish("r")
        assert (await moving).outcome in ("finished_at_source", "timed_out")
        assert fleet.services["i1"].mailbox.counts.strangers > 0 == fleet.services["i1"].mailbox.counts.received
        assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()


async def test_a_destination_that_was_declared_dead_is_refused_at_once() -> None:
    request = a_request(15, 100, 800)
    async with fleet_of(2) as fleet:
        await fleet.run("i0", "r", request, 5)
        there = fleet.members["i1"]
        fleet.services["i0"].member_lost(there.instance, there.epoch)
        told = await fleet.services["i0"].migrate("r", there)
        assert told.outcome == "refused" and "known to be dead" in told.reason, told
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()
