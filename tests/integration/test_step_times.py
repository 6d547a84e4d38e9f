"""From the steps of an instance to the choice of a gateway: what is reported, what is learned, and who is asked then.

Whole instances (fake engines, real inboxes), one of which takes a hundred times as long for a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from migration.types import InstanceId
from orchestrator.gateway.service import GatewayService
from orchestrator.gateway.spec import GatewayConfig, Member
from orchestrator.policy.steptime import terms_of_step
from tests.support.fleet import TOKEN, Gateway, a_request, fleet_of
from tests.support.scripted_instance import encode_for_script
from tests.support.word_model import make_word_model, words

MODEL = "words"
FAST_MS, SLOW_MS = 2.0, 200.0
BETWEEN_MS = "100"
PATIENCE_S = 20.0


async def eventually(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110 - it waits for sockets, which set no event of ours
            await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_word_model(tmp_path_factory.mktemp("model") / "words")


async def test_reports_tell_what_the_steps_computed_and_how_long_they_took() -> None:
    async with fleet_of(1) as fleet:
        gateway: Gateway = fleet.gateway
        await fleet.run("i0", "r", a_request(1, num_prompt_tokens=60, max_tokens=20), 20)
        await gateway.until(lambda: gateway.reports["i0"].steps.num_decoding >= 19)
        steps, report = gateway.reports["i0"].steps, gateway.reports["i0"]
        assert (steps.num_prefill_tokens, steps.num_attended_pairs) == (60, 60 * 60 // 2)
        assert (steps.num_steps, steps.num_decode_tokens, steps.num_decoding) == (20, 19, 19)
        assert steps.num_context_tokens == sum(range(60, 79))
        assert steps.busy_s >= 20 * 0.001, "the pace of the fake engine is a step's least time"
        assert report.max_step_tokens > 0 and report.max_running > 0


async def test_a_gateway_learns_who_is_slow_and_asks_the_other_for_what_is_in_a_hurry(model: Path) -> None:
    async with fleet_of(1, "--step-time-ms", str(FAST_MS)) as fleet:
        await fleet.add("slow", "--step-time-ms", str(SLOW_MS))
        service = GatewayService(encode=encode_for_script)
        started = await service.start(GatewayConfig((str(model), "--served-model-name", MODEL), port=0, token=TOKEN))
        try:
            async with httpx.AsyncClient(base_url=started.url, timeout=30) as client:
                service.set_members(Member(one.instance, one.epoch, one.address) for one in fleet.members.values())
                router, loop = service.loop.router, service.loop
                await eventually(lambda: len(router.view(loop.now_s()).instances) == 2)

                async def ask(**headers: str) -> Any:
                    prompt = words(*range(100, 130))
                    payload = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "seed": 3}
                    renamed = {name.replace("_", "-"): value for name, value in headers.items()}
                    return await client.post("/v1/completions", json=payload, headers=renamed)

                def steps_seen(name: str) -> int:
                    seen = {one.instance: one.report.steps for one in router.view(loop.now_s()).instances}
                    return seen[InstanceId(name)].num_steps

                answers = await asyncio.gather(*[ask() for _ in range(4)])
                assert [one.status_code for one in answers] == [200] * 4
                await eventually(lambda: steps_seen("i0") > 0 and steps_seen("slow") > 0)
                times = router.pace.times
                decode = terms_of_step(0, 1, 100, 0)
                per = {
                    name: times.coefficients(member.instance, member.epoch) for name, member in fleet.members.items()
                }
                assert per["i0"] is not None and per["slow"] is not None
                assert float(per["slow"] @ decode) > SLOW_MS / 2e3 > float(per["i0"] @ decode)

                before = steps_seen("slow")
                for _ in range(6):
                    assert (await ask(x_kvferry_slo_tpot_ms=BETWEEN_MS)).status_code == 200
                assert steps_seen("slow") == before, "not one of them went to the slow one"
                hopeless = await ask(x_kvferry_slo_tpot_ms="0.001", x_kvferry_on_overload="reject")
                assert (hopeless.status_code, hopeless.headers["x-kvferry-reason"]) == (429, "slo_tpot")
        finally:
            await service.stop()
