"""The gateway from the client's side, over instances whose every habit the test decides (no engine, no Ray)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from orchestrator.gateway.errors import GatewayError
from orchestrator.gateway.http import check_port_free
from orchestrator.gateway.service import GatewayService, keep_alive_s
from orchestrator.gateway.spec import GatewayConfig
from orchestrator.gateway.types import RouterParams
from orchestrator.policy.dispatch import DispatchParams
from tests.support.fleet import TOKEN
from tests.support.scripted_instance import ScriptedInstance, encode_for_script, expected_tokens
from tests.support.word_model import make_word_model, words

PROMPT = (5, 6)
MODEL = "words"


class Front:
    """A gateway, its instances a and b, and clients of it."""

    def __init__(self, service: GatewayService, url: str, instances: list[ScriptedInstance]) -> None:
        self.service, self.url = service, url
        self.a, self.b = instances
        self.http = httpx.AsyncClient(base_url=url, timeout=20)
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)

    async def complete(self, num_tokens: int = 6, **more: Any) -> Any:
        return await self.openai.completions.create(model=MODEL, prompt=words(*PROMPT), max_tokens=num_tokens, **more)

    async def has_joined(self, *instances: ScriptedInstance) -> None:
        """These are the members, and each has reported."""
        self.service.set_members([one.member for one in instances])
        router, loop = self.service.loop.router, self.service.loop
        await eventually(lambda: len(router.view(loop.now_s()).instances) == len(instances))

    @property
    def num_requests(self) -> int:
        return self.service.loop.router.num_requests


async def eventually(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110 - it waits for other tasks and for sockets, which set no event of ours
            await asyncio.sleep(0.005)


def text_of(num_tokens: int, prompt: tuple[int, ...] = PROMPT) -> str:
    return " " + words(*expected_tokens(prompt, num_tokens))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_word_model(tmp_path_factory.mktemp("model") / "words")


def config(model: Path, **changes: Any) -> GatewayConfig:
    changes = {"port": 0, "token": TOKEN, **changes}
    return GatewayConfig((str(model), "--served-model-name", MODEL), **changes)


@pytest_asyncio.fixture
async def front(model: Path) -> AsyncIterator[Front]:
    instances = [await ScriptedInstance("a").open(), await ScriptedInstance("b").open()]
    # Without slow start: two idle instances are equal from the first, however far apart their first reports came. And
    # a test that stands still for some seconds does not lose them.
    dispatch = DispatchParams(slow_start_s=0.0, max_report_age_s=60.0)
    params = RouterParams(dispatch, dispatch_timeout_s=0.5, orphan_grace_s=0.1)
    service = GatewayService(params, encode_for_script)
    started = await service.start(config(model))
    it = Front(service, started.url, instances)
    try:
        await it.has_joined(it.a, it.b)
        yield it
    finally:
        await it.http.aclose()
        await it.openai.close()
        await service.stop()
        for instance in instances:
            await instance.close()


async def test_completions_and_chat_answer_with_each_token_once(front: Front) -> None:
    completion = await front.complete()
    assert completion.choices[0].text == text_of(6)
    assert completion.choices[0].finish_reason == "length"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 6)
    messages: Any = [{"role": "user", "content": words(*PROMPT)}]
    chat = await front.openai.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    assert chat.choices[0].message.content == text_of(4, (*PROMPT, 1))
    assert front.num_requests == 0


async def test_streams_carry_every_token_and_the_usage(front: Front) -> None:
    stream = await front.complete(8, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text_of(8)
    assert chunks[-1].usage.completion_tokens == 8


async def test_n_answers_are_spread_over_the_instances(front: Front) -> None:
    completion = await front.complete(n=3)
    assert [choice.text for choice in completion.choices] == [text_of(6)] * 3
    counts = sorted((len(front.a.submitted), len(front.b.submitted)))
    assert counts == [1, 2]
    assert {one.external_id for one in front.a.submitted} == {one.external_id for one in front.b.submitted}


async def test_a_stop_string_ends_the_answer_and_frees_the_instance(front: Front) -> None:
    stop = words(expected_tokens(PROMPT, 3)[2])
    completion = await front.complete(400, stop=stop)
    assert completion.choices[0].text == text_of(2) + " "
    assert completion.choices[0].finish_reason == "stop"
    await eventually(lambda: not front.a.running and not front.b.running)
    assert front.num_requests == 0


async def test_a_client_that_goes_away_leaves_no_request_behind(front: Front) -> None:
    payload = {"model": MODEL, "prompt": words(*PROMPT), "max_tokens": 500, "stream": True}
    async with front.http.stream("POST", "/v1/completions", json=payload) as response:
        await anext(response.aiter_lines())
        assert front.num_requests == 1
    # It may have been changing hands: everybody is told, each through an inbox of its own.
    await eventually(lambda: front.num_requests == 0 and front.a.aborted == front.b.aborted != [])
    assert not front.a.running and not front.b.running


async def test_a_client_that_goes_away_before_the_answer_leaves_no_request_behind(front: Front) -> None:
    front.a.is_paused = front.b.is_paused = True
    waiting = asyncio.create_task(front.complete(5))
    await eventually(lambda: bool(front.a.running or front.b.running))
    waiting.cancel()
    await eventually(lambda: front.num_requests == 0 and not front.a.running and not front.b.running)


async def test_a_refusal_is_not_seen_by_the_client(front: Front) -> None:
    front.a.refusal = "the queue is full"
    completions = await asyncio.gather(*[front.complete() for _ in range(4)])
    assert [one.choices[0].text for one in completions] == [text_of(6)] * 4
    assert front.a.submitted and len(front.b.submitted) == 4


async def test_a_draining_instance_is_not_asked(front: Front) -> None:
    front.a.state = "draining"
    view = front.service.loop.router.view
    await eventually(lambda: view(front.service.loop.now_s()).instances[0].report.state == "draining")
    await asyncio.gather(*[front.complete() for _ in range(3)])
    assert not front.a.submitted
    assert len(front.b.submitted) == 3


async def test_when_every_instance_stays_busy_the_client_is_asked_to_come_back(front: Front) -> None:
    front.a.refusal = front.b.refusal = "the queue is full"
    response = await front.http.post("/v1/completions", json={"model": MODEL, "prompt": "w5", "max_tokens": 3})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"
    message = response.json()["error"]["message"]
    assert message.startswith("every instance is busy (")
    assert message.endswith("the queue is full); please retry later")
    assert front.num_requests == 0


async def test_a_request_no_instance_could_run_is_the_clients_mistake(front: Front) -> None:
    front.a.refusal = front.b.refusal = "it needs 40 blocks, the instance has 32"
    front.a.is_final = front.b.is_final = True
    with pytest.raises(openai.BadRequestError, match="it needs 40 blocks, the instance has 32"):
        await front.complete(n=2)
    assert front.num_requests == 0


async def test_without_instances_there_is_a_503_that_says_so_also_for_streams(front: Front) -> None:
    assert (await front.http.get("/health")).status_code == 200
    front.service.set_members([])
    for stream in (False, True):
        payload = {"model": MODEL, "prompt": "w5", "max_tokens": 3, "stream": stream}
        response = await front.http.post("/v1/completions", json=payload)
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "no instance is ready yet; please retry later"
        assert response.headers["retry-after"] == "1"
    assert (await front.http.get("/health")).status_code == 503
    assert (await front.http.get("/live")).status_code == 200


async def test_a_prompt_that_is_too_long_is_openais_400(front: Front) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await front.openai.completions.create(model=MODEL, prompt=words(*range(3, 600)), max_tokens=5)
    assert "maximum" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        await front.openai.completions.create(model="other", prompt="w5", max_tokens=5)


async def test_min_tokens_with_more_stop_ids_than_vllm_can_take_is_a_400(front: Front) -> None:
    more = {"min_tokens": 2, "stop_token_ids": list(range(10, 140))}
    with pytest.raises(openai.BadRequestError, match="min_tokens takes at most 128 stop tokens"):
        await front.complete(extra_body=more)
    completion = await front.complete(extra_body=more | {"stop_token_ids": [10]})
    assert completion.choices[0].text == text_of(6)
    assert front.num_requests == 0


async def test_the_request_id_is_echoed_and_reaches_the_instance(front: Front) -> None:
    payload = {"model": MODEL, "prompt": "w5", "max_tokens": 2}
    response = await front.http.post("/v1/completions", json=payload, headers={"x-request-id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    (submit,) = front.a.submitted + front.b.submitted
    assert "mine-1" in submit.external_id
    for bad in ("x" * 200, "a b"):
        response = await front.http.post("/v1/completions", json=payload, headers={"x-request-id": bad})
        made = response.headers["x-request-id"]
        assert made != bad and len(made) == 32


async def test_the_rest_of_vllms_surface_is_there(front: Front) -> None:
    models = await front.openai.models.list()
    assert [one.id for one in models.data] == [MODEL]
    tokens = await front.http.post("/tokenize", json={"model": MODEL, "prompt": words(*PROMPT)})
    assert tokens.json()["tokens"] == list(PROMPT)
    text = await front.http.post("/detokenize", json={"model": MODEL, "tokens": list(PROMPT)})
    assert text.json()["prompt"] == words(*PROMPT)
    assert (await front.http.get("/version")).status_code == 200


async def test_vllms_metrics_count_requests_and_latencies(front: Front) -> None:
    await front.complete(n=2)
    lines = (await front.http.get("/metrics")).text.splitlines()
    label = f'engine="0",model_name="{MODEL}"'
    assert f"vllm:time_to_first_token_seconds_count{{{label}}} 2.0" in lines
    assert f"vllm:generation_tokens_total{{{label}}} 12.0" in lines
    assert f'vllm:request_success_total{{engine="0",finished_reason="length",model_name="{MODEL}"}} 2.0' in lines


async def test_streams_of_an_instance_that_dies_go_on_elsewhere_with_each_token_once(front: Front) -> None:
    streams = [await front.complete(300, stream=True) for _ in range(2)]
    firsts = [await anext(aiter(stream)) for stream in streams]
    assert all(first.choices[0].text for first in firsts)
    await front.a.close()
    front.service.member_lost("a", 1)

    async def rest(stream: Any, first: Any) -> str:
        text: str = first.choices[0].text
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    assert await asyncio.gather(*map(rest, streams, firsts)) == [text_of(300)] * 2
    assert sum(bool(submit.output_token_ids) for submit in front.b.submitted) == 1
    assert (await front.complete()).choices[0].text == text_of(6)


async def test_a_request_without_tokens_survives_the_death_of_its_instance(front: Front) -> None:
    front.a.is_paused = front.b.is_paused = True
    waiting = [asyncio.create_task(front.complete()) for _ in range(2)]
    await eventually(lambda: len(front.a.running) == len(front.b.running) == 1)
    await front.a.close()
    front.service.member_lost("a", 1)
    front.b.is_paused = False
    completions = await asyncio.gather(*waiting)
    assert [one.choices[0].text for one in completions] == [text_of(6)] * 2


async def test_two_gateways_share_one_port_and_both_answer(front: Front, model: Path) -> None:
    first, second = (GatewayService(encode=encode_for_script) for _ in range(2))
    try:
        started = await first.start(config(model, reuse_port=True))
        port = int(started.url.rsplit(":", 1)[1])
        again = await second.start(config(model, port=port, reuse_port=True, gateway="gateway-1"))
        assert started.url == again.url
        for service in (first, second):
            service.set_members([front.a.member, front.b.member])
        await eventually(
            lambda: all(not service.loop.router.why_nobody_serves(service.loop.now_s()) for service in (first, second))
        )
        for _ in range(200):  # the kernel spreads connections by their ports
            async with httpx.AsyncClient(base_url=started.url) as client:
                response = await client.post("/v1/completions", json={"model": MODEL, "prompt": "w5", "max_tokens": 2})
            assert response.status_code == 200
            if all(service.loop.router.counts.dispatched for service in (first, second)):
                break
        assert all(service.loop.router.counts.dispatched for service in (first, second))
    finally:
        await first.stop()
        await second.stop()


async def test_a_port_in_use_is_one_clear_line(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = f"port {port} is in use on 127.0.0.1: choose another with --port"
        for reuse_port in (False, True):
            with pytest.raises(GatewayError, match=line):
                await GatewayService().start(config(model, port=port, reuse_port=reuse_port))
        with pytest.raises(GatewayError, match=line):
            check_port_free("127.0.0.1", port)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("./no-such-folder",), "no-such-folder"),
        (("MODEL", "--no-such-flag"), "no-such-flag"),
        (
            ("MODEL", "--enable-auto-tool-choice", "--tool-call-parser", "nonsense"),
            "invalid tool call parser: nonsense",
        ),
    ],
)
async def test_a_mistake_in_the_arguments_is_one_clear_line(model: Path, argv: tuple[str, ...], line: str) -> None:
    arguments = tuple(str(model) if one == "MODEL" else one for one in argv)
    with pytest.raises(GatewayError, match=line) as caught:
        await GatewayService().start(GatewayConfig(arguments, port=0, token=TOKEN))
    assert "\n" not in str(caught.value)


async def test_a_gateway_without_the_fleets_token_does_not_start(model: Path) -> None:
    with pytest.raises(GatewayError, match="token is empty"):
        await GatewayService().start(config(model, token=""))


def test_an_idle_connection_is_kept_longer_than_clients_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", raising=False)
    assert keep_alive_s() > (httpx.Limits().keepalive_expiry or 0.0) >= 5.0


async def test_an_idle_connection_is_kept_as_long_as_was_chosen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "1")
    service = GatewayService()
    started = await service.start(config(model))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(started.url.rsplit(":", 1)[1]))
        writer.write(b"GET /live HTTP/1.1\r\nhost: here\r\n\r\n")
        async with asyncio.timeout(20):
            assert (await reader.read()).startswith(b"HTTP/1.1 200"), (
                "and then the end, though the client keeps it open"
            )
        writer.close()
    finally:
        await service.stop()


async def test_stopping_ends_open_streams_soon_and_frees_the_port(front: Front, model: Path) -> None:
    front.a.is_paused = front.b.is_paused = True
    stream = await front.complete(300, stream=True)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    reader = asyncio.create_task(anext(aiter(stream)))
    await eventually(lambda: front.num_requests == 1)
    await front.service.stop()
    assert loop.time() - began_s < 15.0
    with pytest.raises(openai.APIError, match="this gateway is being stopped; please retry"):
        await reader
    await eventually(lambda: not front.a.running and not front.b.running)
    async with asyncio.timeout(1):
        await front.service.lifetime()
    check_port_free("127.0.0.1", int(front.url.rsplit(":", 1)[1]))
    with pytest.raises(httpx.ConnectError):
        await front.http.get("/live")
