"""The OpenAI surface over two real vLLM engines: what vLLM serves for generation, the gateway serves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from bench.models.adapters import write_adapter
from instance.spec import InstanceSpec
from orchestrator.gateway.spec import GatewayConfig, Member
from tests.support.gateway_thread import GatewayThread
from tests.support.model import tiny_model_path
from tests.support.standalone import InstanceProcess, start_instances

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]  # two engines start; a busy machine takes its time

MODEL = "tiny"
PROMPT = "Once upon a time there was a fox"
MESSAGES: Any = [{"role": "user", "content": "Tell me a story about a fox."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "enum": ["fox", "hen"]},
        "legs": {"type": "integer", "minimum": 2, "maximum": 4},
    },
    "required": ["animal", "legs"],
    "additionalProperties": False,
}
ENDED = {"stop", "length"}
ADAPTERS = ("pirate", "poet")


def flags(adapters: dict[str, Path] | None = None) -> tuple[str, ...]:
    lora = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--lora-modules") if adapters else ()
    return (
        str(tiny_model_path()),
        *("--served-model-name", MODEL),
        *("--max-model-len", "1024"),
        *("--kv-cache-memory-bytes", str(48 << 20)),
        *("--block-size", "32"),
        *("--max-num-seqs", "16"),
        *("--scheduling-policy", "priority"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *lora,
        *(f"{name}={folder}" for name, folder in (adapters or {}).items()),
    )


class Surface:
    def __init__(self, gateway: GatewayThread, processes: list[InstanceProcess]) -> None:
        self.gateway, self.processes = gateway, processes
        self.http = httpx.Client(base_url=gateway.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60)

    def complete(self, max_tokens: int = 12, **more: Any) -> Any:
        more = {"prompt": PROMPT, "temperature": 0.0} | more
        return self.client.completions.create(model=MODEL, max_tokens=max_tokens, **more)

    def chat(self, max_tokens: int = 40, **more: Any) -> Any:
        more = {"messages": MESSAGES, "temperature": 0.0} | more
        return self.client.chat.completions.create(model=MODEL, max_tokens=max_tokens, **more)


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surface]:
    folder = tmp_path_factory.mktemp("adapters")
    argv = flags(
        {name: write_adapter(folder / name, seed, tiny_model_path()) for seed, name in enumerate(ADAPTERS, start=1)}
    )
    specs = [InstanceSpec(f"instance-{n}", 1, engine_argv=argv, token="test") for n in range(2)]
    processes = start_instances(specs, tmp_path_factory.mktemp("logs"))
    gateway = GatewayThread()
    try:
        gateway.start(GatewayConfig(argv, port=0, token="test"), [process.member for process in processes])
        it = Surface(gateway, processes)
        yield it
        it.http.close()
        it.client.close()
        gateway.stop()
    finally:
        for process in processes:
            process.stop()


def test_a_completion_and_a_chat_answer(surface: Surface) -> None:
    completion = surface.complete()
    assert completion.choices[0].text
    assert completion.choices[0].finish_reason in ENDED
    assert completion.usage.completion_tokens == 12
    chat = surface.chat()
    assert chat.choices[0].message.content
    assert chat.choices[0].finish_reason in ENDED
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def test_a_stream_is_the_same_text_as_one_answer_and_tells_its_usage(surface: Surface) -> None:
    chunks = list(surface.complete(40, stream=True, stream_options={"include_usage": True}))
    whole = surface.complete(40)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    deltas = [choice.delta.content or "" for chunk in surface.chat(stream=True) for choice in chunk.choices]
    assert "".join(deltas) == surface.chat().choices[0].message.content


def test_an_adapter_of_lora_modules_is_a_model_of_its_own_at_every_instance(surface: Surface) -> None:
    """Both are asked so often that both instances load both."""
    assert [model.id for model in surface.client.models.list()] == [MODEL, *ADAPTERS]

    def say(model: str) -> str:
        answer = surface.client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0.0)
        assert answer.model == model
        return str(answer.choices[0].text)

    said = {}
    for model in (MODEL, *ADAPTERS):
        with ThreadPoolExecutor(4) as pool:
            texts = set(pool.map(say, [model] * 4))
        assert len(texts) == 1, "the same at both instances"
        said[model] = texts.pop()
    assert len(set(said.values())) == 3, "the control: without its adapter a model says something else"
    assert say(MODEL) == said[MODEL]
    with pytest.raises(openai.NotFoundError):
        say("no-such-adapter")


def test_both_instances_give_the_same_greedy_and_seeded_text(surface: Surface) -> None:
    greedy = {surface.complete(20).choices[0].text for _ in range(4)}
    seeded = {surface.complete(20, temperature=1.0, seed=7).choices[0].text for _ in range(4)}
    assert len(greedy) == len(seeded) == 1
    others = {surface.complete(20, temperature=1.0, seed=seed).choices[0].text for seed in range(4)}
    assert len(others) > 1, "the control: other seeds, other texts"


def test_n_answers_with_logprobs(surface: Surface) -> None:
    completion = surface.complete(8, n=3, temperature=1.0, seed=3, logprobs=2)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice in completion.choices:
        assert len(choice.logprobs.tokens) == 8
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)
        assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)
    chat = surface.chat(5, logprobs=True, top_logprobs=3)
    assert all(len(one.top_logprobs) == 3 for one in chat.choices[0].logprobs.content)
    prompt = surface.complete(2, extra_body={"prompt_logprobs": 1})
    assert prompt.choices[0].model_extra["prompt_logprobs"]


def test_a_stop_string_ends_the_answer_before_it(surface: Surface) -> None:
    text = surface.complete(40).choices[0].text
    word = text.split()[3]
    stopped = surface.complete(40, stop=[word])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].text == text[: text.index(word)]


def test_answers_follow_a_json_schema(surface: Surface) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    answer = json.loads(surface.chat(60, response_format=wanted).choices[0].message.content)
    assert answer.keys() == {"animal", "legs"}
    assert answer["animal"] in ("fox", "hen")


def test_tools_are_called_when_they_must_be(surface: Surface) -> None:
    choice = {"type": "function", "function": {"name": "get_weather"}}
    named = surface.chat(60, tools=[TOOL], tool_choice=choice).choices[0]
    (call,) = named.message.tool_calls
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)
    required = surface.chat(80, tools=[TOOL], tool_choice="required").choices[0]
    assert required.message.tool_calls[0].function.name == "get_weather"
    assert surface.chat(tools=[TOOL], tool_choice="auto").choices[0].finish_reason in {*ENDED, "tool_calls"}


def test_penalties_and_the_other_sampling_parameters_pass(surface: Surface) -> None:
    more = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 5, "stop_token_ids": [5]}
    completion = surface.complete(20, temperature=0.8, seed=1, presence_penalty=0.5, extra_body=more)
    assert completion.usage.completion_tokens >= 5


def test_priority_is_accepted_by_body_and_header(surface: Surface) -> None:
    assert surface.complete(4, extra_body={"priority": -1}).choices[0].text
    assert surface.complete(4, extra_headers={"x-kvferry-priority": "5"}).choices[0].text


def test_many_requests_at_once_use_both_instances_and_leave_nothing(surface: Surface) -> None:
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda n: surface.complete(30, temperature=1.0, seed=n % 4).choices[0].text, range(24)))
    assert all(texts[n] == texts[n % 4] for n in range(24))
    surface.gateway.until(lambda service: service.loop.router.num_requests == 0)
    surface.gateway.until(
        lambda service: all(
            seen.report.num_running == 0 and seen.report.free_blocks == seen.report.total_blocks
            for seen in service.loop.router.view(service.loop.now_s()).instances
        )
    )


def test_a_client_that_goes_away_leaves_no_request_at_the_engines(surface: Surface) -> None:
    payload = {"model": MODEL, "prompt": PROMPT, "max_tokens": 900, "stream": True, "ignore_eos": True}
    with surface.http.stream("POST", "/v1/completions", json=payload) as response:
        next(response.iter_lines())
    surface.gateway.until(
        lambda service: (
            service.loop.router.num_requests == 0
            and all(seen.report.num_running == 0 for seen in service.loop.router.view(service.loop.now_s()).instances)
        )
    )


def test_the_operators_endpoints_answer(surface: Surface) -> None:
    assert [one.id for one in surface.client.models.list().data] == [MODEL, *ADAPTERS]
    tokens = surface.http.post("/tokenize", json={"model": MODEL, "prompt": "a fox"}).json()["tokens"]
    text = surface.http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"]
    assert text.strip().endswith("a fox")
    assert surface.http.get("/health").status_code == surface.http.get("/live").status_code == 200
    assert surface.http.get("/version").json()["version"]


def test_the_metrics_of_vllm_count(surface: Surface) -> None:
    surface.complete(4)
    lines = surface.http.get("/metrics").text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("vllm:"))}

    def total(metric: str) -> float:
        return sum(value for name, value in values.items() if name.startswith(metric + "{"))

    for metric in ("request_success_total", "prompt_tokens_total", "generation_tokens_total"):
        assert total(f"vllm:{metric}") > 0, metric
    for histogram in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert total(f"vllm:{histogram}_seconds_count") > 0, histogram
        assert 0 <= total(f"vllm:{histogram}_seconds_sum") < 600, histogram


def test_bad_requests_are_openais_errors_and_kill_no_engine(surface: Surface) -> None:
    for bad in (
        {"prompt": PROMPT * 400},
        {"temperature": -1.0},
        {"n": 0},
        {"extra_body": {"min_tokens": 2, "stop_token_ids": list(range(10, 200))}},
        {"extra_body": {"structured_outputs": {"regex": "(("}}},
        {"extra_body": {"logit_bias": {"999999": 1.0}}},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            surface.complete(**bad)
        assert caught.value.body["code"] == 400
    assert surface.complete(300, prompt=PROMPT * 80, temperature=1.0, seed=1).choices[0].finish_reason in ENDED
    assert surface.complete().choices[0].text


def test_the_death_of_an_instance_leaves_the_other_serving(surface: Surface) -> None:
    """The last one: it ends an engine for good."""
    gone: Member = surface.processes[0].member
    surface.processes[0].kill()
    surface.gateway.member_lost(gone)
    assert [surface.complete().choices[0].finish_reason for _ in range(4)]
    assert surface.http.get("/health").status_code == 200
