"""Do prompts that begin alike find what real engines have cached of them? Two vLLM instances behind one gateway."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import httpx
import pytest

from instance.spec import InstanceSpec
from orchestrator.gateway.service import GatewayService
from orchestrator.gateway.spec import GatewayConfig
from orchestrator.policy.dispatch import DispatchParams, Rule
from tests.support.gateway_thread import GatewayThread
from tests.support.model import tiny_model_path
from tests.support.standalone import start_instances

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]  # two engines start; a busy machine takes its time

MODEL = "tiny"
BLOCK_SIZE = 32
PREFIX_BLOCKS = 12
NUM_GROUPS = 4
ARGV = (
    str(tiny_model_path()),
    *("--served-model-name", MODEL),
    *("--max-model-len", "1024"),
    *("--kv-cache-memory-bytes", str(48 << 20)),
    *("--block-size", str(BLOCK_SIZE)),
    *("--max-num-seqs", "16"),
    "--enable-prompt-tokens-details",
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayThread]:
    specs = [InstanceSpec(f"instance-{n}", 1, engine_argv=ARGV, token="test") for n in range(2)]
    processes = start_instances(specs, tmp_path_factory.mktemp("logs"))
    thread = GatewayThread()
    try:
        thread.start(GatewayConfig(ARGV, port=0, token="test"), [process.member for process in processes])
        yield thread
        thread.stop()
    finally:
        for process in processes:
            process.stop()


def prompts_of(key: int) -> list[list[int]]:
    """One of each group, with an end of its own."""
    prompts = []
    for group in range(NUM_GROUPS):
        beginning, own = Random(group), Random(1000 * key + group)
        prompts.append([beginning.randrange(3, 500) for _ in range(PREFIX_BLOCKS * BLOCK_SIZE)])
        prompts[-1] += [own.randrange(3, 500) for _ in range(9)]
    return prompts


def cached_tokens(gateway: GatewayThread, prompt: list[int], salt: str) -> int:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0.0, "cache_salt": salt}
    answer = httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return int((answer.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def num_known(service: GatewayService) -> int:
    """Hashes the gateway has been told of."""
    return service.loop.router._book.prefixes.num_hashes


def have_told(service: GatewayService) -> bool:
    """Each instance has said what it has. (They say it apart: with one of them only, the other's old news look new.)"""
    return bool((service.loop.router._book.prefixes.num_held > 0).all())


TAKING_TURNS = DispatchParams(rule=Rule.ROUND_ROBIN, slow_start_s=0.0)
HEEDING = DispatchParams(slow_start_s=0.0)


def fill(gateway: GatewayThread, salt: str) -> None:
    """Compute the beginning of groups 0 and 2 on one instance, of 1 and 3 on the other."""
    gateway.ask(lambda service: service.set_dispatch(TAKING_TURNS))
    assert [cached_tokens(gateway, prompt, salt) for prompt in prompts_of(0)] == [0] * NUM_GROUPS


def test_every_prompt_finds_the_beginning_that_was_computed_for_another(gateway: GatewayThread) -> None:
    fill(gateway, "heeded")
    gateway.ask(lambda service: service.set_dispatch(HEEDING))
    gateway.until(lambda service: num_known(service) >= NUM_GROUPS * PREFIX_BLOCKS)
    for number in (1, 2, 3):
        turned = prompts_of(number)[number % 2 :] + prompts_of(number)[: number % 2]
        found = [cached_tokens(gateway, prompt, "heeded") for prompt in turned]
        assert found == [PREFIX_BLOCKS * BLOCK_SIZE] * NUM_GROUPS


def test_control_by_turns_each_comes_to_the_other_instance_and_is_computed_again(gateway: GatewayThread) -> None:
    fill(gateway, "by turns")
    turned = prompts_of(1)[1:] + prompts_of(1)[:1]
    assert [cached_tokens(gateway, prompt, "by turns") for prompt in turned] == [0] * NUM_GROUPS


def test_what_was_just_computed_is_known_in_a_moment(gateway: GatewayThread) -> None:
    """Not with the next subscription only, which asks for all: what changes is told by itself."""
    gateway.ask(lambda service: service.set_dispatch(HEEDING))
    gateway.until(have_told)
    before = gateway.ask(num_known)
    prompt = prompts_of(7)[0]
    assert cached_tokens(gateway, prompt, "new") == 0
    gateway.until(lambda service: num_known(service) >= before + PREFIX_BLOCKS)
    assert cached_tokens(gateway, prompt, "new") == PREFIX_BLOCKS * BLOCK_SIZE
