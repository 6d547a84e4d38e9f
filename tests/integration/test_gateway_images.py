"""Does a gateway send an instance each image whole, under a name that no other image has? No engine is needed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from orchestrator.gateway import core_client
from orchestrator.gateway.service import GatewayService
from orchestrator.gateway.spec import GatewayConfig
from tests.integration.test_gateway import eventually
from tests.support.fleet import TOKEN
from tests.support.image_model import NUM_IMAGE_TOKENS, Picture, image_model_path, question
from tests.support.scripted_instance import ScriptedInstance, encode_for_script

MODEL = "images"
Seen = list[Any]
"""EngineCoreRequests, as they leave a gateway."""


@asynccontextmanager
async def gateway(instance: ScriptedInstance, *flags: str) -> AsyncIterator[tuple[openai.AsyncOpenAI, Seen]]:
    seen: Seen = []

    def encode(request: Any) -> bytes:
        seen.append(request)
        return encode_for_script(request)

    service = GatewayService(encode=encode)
    argv = (str(image_model_path()), "--served-model-name", MODEL, *flags)
    started = await service.start(GatewayConfig(argv, port=0, token=TOKEN))
    client = openai.AsyncOpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0, timeout=20)
    try:
        service.set_members([instance.member])
        await eventually(lambda: len(service.loop.router.view(service.loop.now_s()).instances) == 1)
        yield client, seen
    finally:
        await client.close()
        await service.stop()


async def ask(client: openai.AsyncOpenAI, *pictures: Picture) -> None:
    messages: Any = question(*pictures)
    await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)


@pytest.mark.parametrize("flags", [(), ("--no-enable-prefix-caching",), ("--mm-processor-cache-gb", "2")])
async def test_images_travel_whole_each_time_and_are_named_by_their_content_at_every_gateway(
    flags: tuple[str, ...],
) -> None:
    """By a count, as vLLM names them when nothing is cached, the first of each gateway would have the same name."""
    instance = await ScriptedInstance("a").open()
    first, second = Picture(1), Picture(2)
    try:
        async with gateway(instance, *flags) as (client, here), gateway(instance, *flags) as (other_client, there):
            await ask(client, first)
            await ask(client, first, second)
            await ask(other_client, second)
    finally:
        await instance.close()
    features = [request.mm_features for request in (*here, *there)]
    assert [[feature.mm_position.length for feature in each] for each in features] == [
        [NUM_IMAGE_TOKENS],
        [NUM_IMAGE_TOKENS] * 2,
        [NUM_IMAGE_TOKENS],
    ]
    assert all(feature.data is not None for each in features for feature in each)
    (one,), (again, two), (elsewhere,) = [[feature.identifier for feature in each] for each in features]
    assert one == again and two == elsewhere and one != two


async def test_a_request_larger_than_an_inbox_reads_is_the_clients_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_client, "MAX_PAYLOAD_BYTES", 100)
    instance = await ScriptedInstance("a").open()
    try:
        async with gateway(instance) as (client, _):
            with pytest.raises(openai.BadRequestError, match="MiB with its images"):
                await ask(client, Picture(1), Picture(2))
    finally:
        await instance.close()
    assert instance.submitted == []
