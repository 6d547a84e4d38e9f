"""Requests with targets, from the client's side, over instances that report whatever step times the test wants."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from instance.messages import StepTotals
from orchestrator.gateway.errors import GatewayError
from orchestrator.gateway.service import GatewayService
from tests.integration.test_gateway import MODEL, Front, config, eventually, front, model, text_of
from tests.support.scripted_instance import encode_for_script

__all__ = ["front", "model"]


# ---- targets
SLOW = StepTotals(100, 0, 800, 0, 800, 80_000, 0, 100.0)
"""A second a step."""
FAST = StepTotals(100, 0, 800, 0, 800, 80_000, 0, 0.1)
PAYLOAD = {"model": MODEL, "prompt": "w5", "max_tokens": 3}
SOON = {"x-kvferry-slo-ttft-ms": "200"}
OR_NOT = {"x-kvferry-on-overload": "reject"}


async def paced(front: Front, a: StepTotals, b: StepTotals) -> None:
    """From now on the instances report that their steps took so long."""
    front.a.steps, front.b.steps = a, b
    view = front.service.loop.router.view
    await eventually(lambda: [one.report.steps for one in view(front.service.loop.now_s()).instances] == [a, b])


async def test_a_request_with_a_target_goes_to_the_instance_that_can_meet_it(front: Front) -> None:
    await paced(front, SLOW, FAST)
    for number in range(4):
        headers = SOON if number % 2 else {"x-llm-d-slo-ttft-ms": "200"}
        response = await front.http.post("/v1/completions", json=PAYLOAD, headers=headers)
        assert response.status_code == 200 and "x-kvferry-reason" not in response.headers
    assert (len(front.a.submitted), len(front.b.submitted)) == (0, 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_asked_to_be_rejected_gets_a_429_with_the_reason_and_when_to_come_back(
    front: Front, stream: bool
) -> None:
    await paced(front, SLOW, SLOW)
    response = await front.http.post("/v1/completions", json=PAYLOAD | {"stream": stream}, headers=SOON | OR_NOT)
    assert response.status_code == 429
    assert (response.headers["x-kvferry-reason"], response.headers["retry-after"]) == ("slo_ttft", "1")
    message = response.json()["error"]["message"]
    assert message.startswith("the first token is predicted in ")
    assert message.endswith(" ms, 200 ms were asked for; please retry later")
    assert front.num_requests == 0 and not front.a.submitted and not front.b.submitted


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("many", [{"n": 2}, {"prompt": ["w5", "w6"], "n": 2}])
@pytest.mark.parametrize("reason", ["slo_ttft", "busy"])
async def test_several_answers_to_one_request_are_rejected_as_one(
    front: Front, stream: bool, many: dict[str, object], reason: str
) -> None:
    if reason == "busy":
        front.a.refusal = front.b.refusal = "the queue is full"
        headers = OR_NOT
    else:
        await paced(front, SLOW, SLOW)
        headers = SOON | OR_NOT
    response = await front.http.post("/v1/completions", json=PAYLOAD | many | {"stream": stream}, headers=headers)
    assert (response.status_code, response.headers.get("x-kvferry-reason")) == (429, reason)
    assert response.headers["retry-after"] == "1" and response.json()["error"]["message"].endswith("please retry later")
    await eventually(lambda: front.num_requests == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_did_not_is_served_late_rather_than_never(front: Front, stream: bool) -> None:
    await paced(front, SLOW, SLOW)
    response = await front.http.post("/v1/completions", json=PAYLOAD | {"stream": stream}, headers=SOON)
    assert response.status_code == 200
    assert len(front.a.submitted) + len(front.b.submitted) == 1


async def test_a_stream_that_may_be_rejected_but_is_not_is_whole(front: Front) -> None:
    await paced(front, SLOW, FAST)
    stream = await front.complete(8, stream=True, extra_headers=SOON | OR_NOT)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == text_of(8)


@pytest.mark.parametrize("stream", [False, True])
async def test_when_all_refuse_one_that_asked_to_be_rejected_does_not_wait(front: Front, stream: bool) -> None:
    front.a.refusal = front.b.refusal = "the queue is full"
    response = await front.http.post("/v1/completions", json=PAYLOAD | {"stream": stream}, headers=OR_NOT)
    assert response.status_code == 429 and response.headers["x-kvferry-reason"] == "busy"
    assert response.json()["error"]["message"] == "each of the 2 serving instances has refused it; please retry later"


async def test_reasons_of_other_failures_are_told_too(front: Front) -> None:
    front.a.refusal = front.b.refusal = "the queue is full"
    response = await front.http.post("/v1/completions", json=PAYLOAD)
    assert (response.status_code, response.headers["x-kvferry-reason"]) == (429, "busy")
    front.service.set_members([])
    response = await front.http.post("/v1/completions", json=PAYLOAD)
    assert (response.status_code, response.headers["x-kvferry-reason"]) == (503, "nobody")


async def test_a_target_that_cannot_be_read_is_a_400_that_names_its_header(front: Front) -> None:
    for headers in ({"x-kvferry-slo-ttft-ms": "soon"}, {"x-kvferry-on-overload": "x"}, {"x-kvferry-slo-class": "vip"}):
        response = await front.http.post("/v1/completions", json=PAYLOAD, headers=headers)
        (name,) = headers
        assert response.status_code == 400 and response.json()["error"]["param"] == name
        assert response.json()["error"]["message"].startswith(name)


async def test_a_class_gives_its_targets_to_who_names_it(front: Front, model: Path) -> None:
    other = GatewayService(encode=encode_for_script)
    started = await other.start(config(model, slo_classes="interactive=200/-,default=60000/-"))
    try:
        await paced(front, SLOW, FAST)
        other.set_members([front.a.member, front.b.member])
        await eventually(lambda: not other.loop.router.why_nobody_serves(other.loop.now_s()))
        view = other.loop.router.view
        await eventually(lambda: [one.report.steps for one in view(other.loop.now_s()).instances] == [SLOW, FAST])
        async with httpx.AsyncClient(base_url=started.url) as client:
            for headers in ({"x-kvferry-slo-class": "interactive"}, {"x-llm-d-inference-objective": "interactive"}):
                await client.post("/v1/completions", json=PAYLOAD, headers=headers)
        assert (len(front.a.submitted), len(front.b.submitted)) == (0, 2)
    finally:
        await other.stop()
    with pytest.raises(GatewayError, match="--slo-classes: 'x' is not of the form"):
        await GatewayService().start(config(model, slo_classes="x"))
