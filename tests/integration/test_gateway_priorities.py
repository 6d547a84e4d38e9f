"""How urgent is a request, from the client's side: by header, body and API key, and after a change while it serves?"""

from __future__ import annotations

from pathlib import Path

import msgspec

from orchestrator.gateway.priorities import PriorityRules, key_digest
from orchestrator.gateway.service import GatewayService
from orchestrator.gateway.spec import PrioritiesNow
from orchestrator.policy.levels import Levels, parse_levels
from tests.integration.test_gateway import MODEL, Front, config, front, model
from tests.support.scripted_instance import ScriptedInstance, encode_for_script

__all__ = ["front", "model"]


async def test_priority_comes_from_the_body_or_the_header(front: Front) -> None:
    payload = {"model": MODEL, "prompt": "w5", "max_tokens": 2}
    urgent = {"x-kvferry-priority": "-3"}
    await front.http.post("/v1/completions", json=payload | {"priority": 4})
    await front.http.post("/v1/completions", json=payload, headers=urgent)
    await front.http.post("/v1/completions", json=payload)
    submits = sorted(front.a.submitted + front.b.submitted, key=lambda one: one.priority)
    assert [one.priority for one in submits] == [-3, 0, 4]
    response = await front.http.post("/v1/completions", json=payload, headers={"x-kvferry-priority": "urgent"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "x-kvferry-priority"
    assert "give a level (high, normal, low) or a whole number" in error["message"]
    response = await front.http.post("/v1/completions", json=payload | {"priority": 2**31})
    assert response.status_code == 400 and "priority is 2147483648" in response.json()["error"]["message"]
    assert len(front.a.submitted + front.b.submitted) == 3, "none of these was sent"
    elsewhere = {"x-llm-d-inference-objective": "of another server"}
    assert (await front.http.post("/v1/completions", json=payload, headers=elsewhere)).status_code == 200


async def test_levels_and_classes_of_keys_are_those_of_the_configuration(model: Path) -> None:
    instance = await ScriptedInstance("a").open()
    service = GatewayService(None, encode_for_script)
    keys = ((key_digest(b"vip-key"), -20),)
    started = await service.start(config(model, priority_levels="vip:-20:64,bulk:5", key_priorities=keys))
    front = Front(service, started.url, [instance, instance])
    try:
        await front.has_joined(instance)
        payload = {"model": MODEL, "prompt": "w5", "max_tokens": 2}
        for headers in (
            {"x-kvferry-priority": "bulk"},
            {"x-llm-d-inference-objective": "vip"},
            {"authorization": "Bearer vip-key"},
            {"authorization": "Bearer vip-key", "x-kvferry-priority": "bulk"},
            {"authorization": "Bearer vip-key", "x-kvferry-priority": "-99"},
            {"authorization": "Bearer another"},
        ):
            assert (await front.http.post("/v1/completions", json=payload, headers=headers)).status_code == 200
        assert [one.priority for one in instance.submitted] == [5, -20, -20, 5, -20, 0]
    finally:
        await front.http.aclose()
        await front.openai.close()
        await service.stop()
        await instance.close()


async def test_levels_and_classes_that_change_hold_for_the_next_request(front: Front) -> None:
    payload = {"model": MODEL, "prompt": "w5", "max_tokens": 2}
    by_key = {"authorization": "Bearer vip-key"}

    async def send(**headers: str) -> int:
        return (await front.http.post("/v1/completions", json=payload, headers=headers)).status_code

    def told(levels: str, *keys: tuple[bytes, int]) -> PriorityRules:
        """As it comes over Ray."""
        classes = tuple((key_digest(key), priority) for key, priority in keys)
        encoded = msgspec.json.encode(PrioritiesNow(parse_levels(levels).levels, classes))
        now = msgspec.json.decode(encoded, type=PrioritiesNow)
        return PriorityRules(Levels(now.levels), dict(now.key_classes))

    assert await send(**by_key) == 200
    front.service.set_priorities(told("vip:-20:64,bulk:5", (b"vip-key", -20)))
    assert await send(**by_key) == 200
    assert await send(**{"x-kvferry-priority": "bulk"}) == 200
    assert await send(**{"x-kvferry-priority": "high"}) == 400, "the level of before is none any more"
    front.service.set_priorities(told("vip:-20:64,bulk:5"))
    assert await send(**by_key) == 200
    assert sorted(one.priority for one in front.a.submitted + front.b.submitted) == [-20, 0, 0, 5]
