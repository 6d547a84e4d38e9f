"""What does an instance take in, what does it say of itself, and how does it end?"""

from __future__ import annotations

import asyncio

import pytest

from instance.errors import StartError
from instance.mailbox import Mailbox
from instance.messages import Abort, MigrationEnvelope
from instance.service import InstanceService
from instance.spec import EngineKind, InstanceSpec
from tests.integration.test_instance_pair import migrate
from tests.support.fleet import a_request, expected_output, fleet_of


async def test_a_submission_for_another_epoch_is_refused_and_a_repeated_one_answered_again() -> None:
    async with fleet_of(1) as fleet:
        fleet.gateway.submit(fleet.members["i0"], "old", a_request(15), epoch=0)
        await fleet.gateway.until(lambda: "old" in fleet.gateway.answers)
        assert "epoch" in str(fleet.gateway.answers["old"].refusal) and not fleet.gateway.answers["old"].final
        request = a_request(16, 20, 1500)
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
        assert sorted(refused) == ["r3", "r4", "r5"], "some at once, some when the engine was asked"
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
    request = a_request(20, 50, 1500)
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
        fleet.gateway.subscribe(fleet.members["i0"], lease_s=30.0, with_requests=True)
        await fleet.gateway.until(lambda: fleet.gateway.num_reports["i0"] >= 3)
        idle = fleet.gateway.reports["i0"]
        assert (idle.free_blocks, idle.num_running, idle.state) == (256, 0, "serving")
        await fleet.gateway.until(lambda: "i0" in fleet.gateway.request_reports)
        assert fleet.gateway.request_reports["i0"].requests == ()
        await fleet.run("i0", "r", a_request(21, 100, 1500), 5)
        busy = fleet.gateway.reports["i0"]
        assert busy.num_running == 1 and busy.free_blocks < 256 and busy.submits_seen == 1
        assert busy.step > idle.step and busy.step_time_s > 0
        await fleet.finish("r")
        fleet.gateway.subscribe(fleet.members["i0"], lease_s=0.01)
        async with asyncio.timeout(20):
            while fleet.services["i0"].agent.num_subscribers:
                await fleet.services["i0"].loop.call(lambda engine: None)


async def test_an_instance_whose_engine_breaks_ends_and_says_why_once() -> None:
    async with fleet_of(1, "--fail-at-step", "10") as fleet:
        service = fleet.services["i0"]
        fleet.gateway.submit(fleet.members["i0"], "r", a_request(22))
        with pytest.raises(Exception, match="FakeEngineBroke") as died:
            async with asyncio.timeout(20):
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
        assert asyncio.get_running_loop().time() - begun_s < 15.0
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
