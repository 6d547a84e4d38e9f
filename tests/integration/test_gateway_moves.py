"""The gateway over whole instances (fake engines, real inboxes and carriers): streams move, and nobody notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from instance.fake_model import FakeRequest
from migration.types import RequestId
from orchestrator.gateway.service import GatewayService
from orchestrator.gateway.spec import GatewayConfig, Member
from tests.support.fleet import TOKEN, Fleet, expected_output, fleet_of
from tests.support.scripted_instance import encode_for_script
from tests.support.word_model import make_word_model, words

PROMPT = tuple(range(100, 160))
MODEL = "words"


class Front:
    def __init__(self, service: GatewayService, fleet: Fleet, client: openai.AsyncOpenAI) -> None:
        self.service, self.fleet, self.client = service, fleet, client
        self.router = service.loop.router

    async def stream(self, num_tokens: int, **more: Any) -> Any:
        return await self.client.completions.create(
            model=MODEL, prompt=words(*PROMPT), max_tokens=num_tokens, stream=True, **more
        )

    def has_first_tokens(self) -> bool:
        return all(self.router.relay.num_tokens(request_id) > 3 for request_id in self.request_ids())

    def request_ids(self) -> tuple[RequestId, ...]:
        return tuple(
            request_id
            for member in self.fleet.members.values()
            for request_id in self.router.relay.owned_by((member.instance, member.epoch))
        )

    async def move(self, request_id: RequestId) -> str:
        """To the other instance, from where it is by now; returns the outcome."""
        owner = self.router.relay.owner(request_id)
        assert owner is not None
        other = next(member for name, member in self.fleet.members.items() if name != owner[0])
        return (await self.fleet.services[owner[0]].migrate(request_id, other)).outcome


async def text_of(stream: Any) -> str:
    return "".join([choice.text async for chunk in stream for choice in chunk.choices])


async def eventually(is_so: Any) -> None:
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110 - it waits for sockets, which set no event of ours
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_word_model(tmp_path_factory.mktemp("model") / "words")


@pytest_asyncio.fixture
async def front(model: Path) -> AsyncIterator[Front]:
    async with fleet_of(2, "--step-time-ms", "4") as fleet:
        service = GatewayService(encode=encode_for_script)
        started = await service.start(GatewayConfig((str(model), "--served-model-name", MODEL), port=0, token=TOKEN))
        client = openai.AsyncOpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0, timeout=30)
        try:
            service.set_members(Member(one.instance, one.epoch, one.address) for one in fleet.members.values())
            await eventually(lambda: len(service.loop.router.view(service.loop.now_s()).instances) == 2)
            yield Front(service, fleet, client)
        finally:
            await client.close()
            await service.stop()


async def test_a_stream_moved_three_times_there_and_back_gives_the_same_text(front: Front) -> None:
    undisturbed = await text_of(await front.stream(300))
    stream = await front.stream(300)
    reading = asyncio.create_task(text_of(stream))
    await eventually(lambda: front.request_ids() and front.has_first_tokens())
    (request_id,) = front.request_ids()
    assert [await front.move(request_id) for _ in range(6)] == ["committed"] * 6
    moved = await reading
    assert moved == undisturbed == " " + words(*expected_output(FakeRequest(PROMPT, 300)))
    assert front.router.counts.moved == 6
    await front.fleet.check_rest()


async def test_other_tokens_would_be_noticed(front: Front) -> None:
    """The negative control: another seed is another text."""
    first, second = await text_of(await front.stream(50, seed=1)), await text_of(await front.stream(50, seed=2))
    assert first != second


async def test_many_streams_that_move_all_the_time_are_exact(front: Front) -> None:
    # Token 0 is the model's end of text, which the text of an answer leaves out.
    seeds = [seed for seed in range(20) if 0 not in expected_output(FakeRequest(PROMPT, 440, seed))][:8]
    streams = await asyncio.gather(*[front.stream(440, seed=seed) for seed in seeds])
    reading = [asyncio.create_task(text_of(stream)) for stream in streams]
    await eventually(lambda: front.request_ids() and front.has_first_tokens())
    outcomes: list[str] = []
    for _ in range(3):
        for request_id in front.request_ids():
            if request_id in front.router.relay:
                outcomes.append(await front.move(request_id))
    texts = await asyncio.gather(*reading)
    assert texts == [" " + words(*expected_output(FakeRequest(PROMPT, 440, seed))) for seed in seeds]
    assert outcomes.count("committed") >= 8
    assert set(outcomes) <= {"committed", "finished_at_source"}
    await front.fleet.check_rest()


async def test_a_client_that_goes_away_while_its_request_moves_leaves_nothing_anywhere(front: Front) -> None:
    for _ in range(5):
        stream = await front.stream(400)
        await anext(aiter(stream))
        await eventually(lambda: front.request_ids() and front.has_first_tokens())
        (request_id,) = front.request_ids()
        moving = asyncio.create_task(front.move(request_id))
        await asyncio.sleep(0)
        await stream.close()
        await moving
        await eventually(lambda: front.router.num_requests == 0)

    async def is_at_rest() -> bool:
        loads = [await service.loop.call(lambda engine: engine.load()) for service in front.fleet.services.values()]
        return all(load.num_running + load.num_waiting + load.reserved_blocks == 0 for load in loads)

    async with asyncio.timeout(10):
        while not await is_at_rest():  # noqa: ASYNC110 - as in `eventually`
            await asyncio.sleep(0.01)
    await front.fleet.check_rest()


async def test_the_death_of_the_source_after_a_move_is_no_loss(front: Front) -> None:
    stream = await front.stream(300)
    reading = asyncio.create_task(text_of(stream))
    await eventually(lambda: front.request_ids() and front.has_first_tokens())
    (request_id,) = front.request_ids()
    owner = front.router.relay.owner(request_id)
    assert owner is not None
    assert await front.move(request_id) == "committed"
    gone = await front.fleet.kill(owner[0])
    front.service.member_lost(gone.instance, gone.epoch)
    assert await reading == " " + words(*expected_output(FakeRequest(PROMPT, 300)))
