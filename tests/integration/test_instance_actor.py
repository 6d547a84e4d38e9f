"""Does an instance live and die as a Ray actor should? Fake engines in two actors of a local Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from instance.spec import EngineKind, InstanceSpec, InstanceStarted, MigrationSummary
from migration.types import Epoch, Incarnation, InstanceId
from tests.support.fleet import Gateway, a_request, expected_output

PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray  # noqa: PLC0415 - after conftest has set the environment, and only for these tests

    started_here = not ray.is_initialized()
    if started_here:
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=2,
            object_store_memory=80 << 20,
            log_to_driver=False,
            namespace="kvferry",
        )
    yield ray
    if started_here:
        ray.shutdown()


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.mailbox.open()
    hearing = asyncio.create_task(gateway.run())
    yield gateway
    hearing.cancel()
    await asyncio.wait((hearing,))
    gateway.mailbox.close()


def make(ray: Any, name: str) -> Any:
    from instance.actor import InstanceActor  # noqa: PLC0415 - imports ray

    return InstanceActor.options(num_cpus=0, name=f"kvferry-{name}-1").remote()  # type: ignore[attr-defined]


async def start(actor: Any, name: str, *flags: str) -> Incarnation:
    spec = InstanceSpec(name, 1, EngineKind.FAKE, ("fake", "--step-time-ms", "2", *flags), token="test")
    async with asyncio.timeout(PATIENCE_S):
        started = msgspec.json.decode(await actor.start.remote(msgspec.json.encode(spec)), type=InstanceStarted)
    assert (started.instance, started.epoch, started.model) == (name, 1, "fake")
    return Incarnation(InstanceId(name), Epoch(1), started.address)


async def test_a_request_moves_between_two_actors_and_one_of_them_may_be_killed(ray: Any, gateway: Gateway) -> None:
    actors = [make(ray, name) for name in ("a", "b")]
    first, second = [await start(actor, name) for actor, name in zip(actors, ("a", "b"), strict=True)]
    deaths = [asyncio.ensure_future(_end_of(ray, actor)) for actor in actors]
    request = a_request(1, 100, 1000)
    gateway.submit(first, "r", request)
    await gateway.until(lambda: gateway.num_tokens("r") >= 20)
    async with asyncio.timeout(PATIENCE_S):
        told = msgspec.json.decode(
            await actors[0].migrate.remote("r", msgspec.json.encode(second), "live"), type=MigrationSummary
        )
    assert told.outcome == "committed", told
    os.kill(await actors[0].__ray_call__.remote(_process_id), signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        assert "ActorDied" in await deaths[0]
    await gateway.until(lambda: gateway.is_whole("r"))
    assert gateway.tokens("r") == expected_output(request)
    await actors[1].drain.remote()
    gateway.submit(second, "late", request)
    await gateway.until(lambda: "late" in gateway.answers)
    assert "draining" in str(gateway.answers["late"].refusal)
    assert not deaths[1].done()
    async with asyncio.timeout(PATIENCE_S):
        await actors[1].stop.remote()
        assert await deaths[1] == "stopped"
    ray.kill(actors[1])


async def test_an_actor_whose_engine_breaks_dies(ray: Any, gateway: Gateway) -> None:
    actor = make(ray, "broken")
    member = await start(actor, "broken", "--fail-at-step", "5")
    death = asyncio.ensure_future(_end_of(ray, actor))
    gateway.submit(member, "r", a_request(2, 10, 100))
    async with asyncio.timeout(PATIENCE_S):
        assert "ActorDied" in await death


async def test_a_start_that_fails_says_what_to_do_in_one_line(ray: Any) -> None:
    actor = make(ray, "misfit")
    with pytest.raises(Exception, match="--no-such-flag") as failed:
        await start(actor, "misfit", "--no-such-flag")
    cause = failed.value.cause  # type: ignore[attr-defined]
    assert type(cause).__name__ == "StartError" and "\n" not in str(cause)
    ray.kill(actor)


def _process_id(_actor: object) -> int:
    return os.getpid()


async def _end_of(ray: Any, actor: Any) -> str:
    try:
        await actor.lifetime.remote()
    except ray.exceptions.RayActorError as error:
        return type(error).__name__
    return "stopped"
