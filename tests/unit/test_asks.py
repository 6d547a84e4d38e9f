"""What headers ask for, and how an answer says why it is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.gateway.asks import AnswerNotes, BadHeader, StatusWithFirstEvent, asks_of
from orchestrator.gateway.errors import Failure, FailureKind
from orchestrator.policy.admission import NO_ASKS, Asks, OnOverload
from orchestrator.policy.targets import MAX_CLASSES, Targets, parse_classes

CLASSES = parse_classes("interactive=500/50, bulk=60000/-")


def test_without_headers_nothing_is_asked_for() -> None:
    assert asks_of({}, {}) is NO_ASKS
    assert asks_of({}, CLASSES) is NO_ASKS
    assert asks_of({"x-kvferry-on-overload": "queue"}, CLASSES) is NO_ASKS


@pytest.mark.parametrize(
    ("headers", "targets"),
    [
        ({"x-kvferry-slo-ttft-ms": "250"}, Targets(0.25)),
        ({"x-llm-d-slo-ttft-ms": "250"}, Targets(0.25)),
        ({"x-kvferry-slo-ttft-ms": "250", "x-llm-d-slo-ttft-ms": "9"}, Targets(0.25)),
        ({"x-kvferry-slo-tpot-ms": "12.5"}, Targets(None, 0.0125)),
        ({"x-kvferry-slo-class": "interactive"}, Targets(0.5, 0.05)),
        ({"x-llm-d-inference-objective": "bulk"}, Targets(60.0)),
        ({"x-llm-d-inference-objective": "of another server"}, Targets()),
        ({"x-kvferry-slo-class": "interactive", "x-kvferry-slo-tpot-ms": "20"}, Targets(0.5, 0.02)),
    ],
)
def test_targets_come_from_the_request_and_then_from_its_class(headers: dict[str, str], targets: Targets) -> None:
    assert asks_of(headers, CLASSES).targets == targets


def test_a_class_named_default_is_that_of_all_that_name_none() -> None:
    classes = parse_classes("default=1000/-,bulk=60000/-")
    assert asks_of({}, classes).targets == Targets(1.0)
    assert asks_of({"x-kvferry-slo-class": "bulk"}, classes).targets == Targets(60.0)
    assert asks_of({"x-llm-d-inference-objective": "unknown"}, classes).targets == Targets(1.0)
    assert asks_of({"x-kvferry-slo-ttft-ms": "5"}, classes).targets == Targets(0.005)


def test_a_request_may_ask_to_be_rejected_with_or_without_targets() -> None:
    assert asks_of({"x-kvferry-on-overload": "Reject"}, {}) == Asks(Targets(), OnOverload.REJECT)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (
            {"x-kvferry-slo-ttft-ms": "soon"},
            "x-kvferry-slo-ttft-ms must be a number of milliseconds above 0, such as 500",
        ),
        ({"x-kvferry-slo-ttft-ms": "0"}, "x-kvferry-slo-ttft-ms must be"),
        ({"x-kvferry-slo-ttft-ms": "nan"}, "x-kvferry-slo-ttft-ms must be"),
        ({"x-kvferry-slo-ttft-ms": "1e99"}, "x-kvferry-slo-ttft-ms must be"),
        ({"x-kvferry-slo-tpot-ms": "-5"}, "x-kvferry-slo-tpot-ms must be"),
        ({"x-llm-d-slo-ttft-ms": ""}, "x-llm-d-slo-ttft-ms must be"),
        ({"x-kvferry-on-overload": "panic"}, "x-kvferry-on-overload must be queue or reject"),
        ({"x-kvferry-slo-class": "vip"}, r"names no class of this server \(there are: bulk, interactive\)"),
    ],
)
def test_a_header_that_cannot_be_meant_is_told_in_one_line(headers: dict[str, str], message: str) -> None:
    with pytest.raises(BadHeader, match=message) as caught:
        asks_of(headers, CLASSES)
    assert caught.value.header in headers


@pytest.mark.parametrize("text", ["a", "a=", "a=5", "=5/5", "a b=5/5", "a=5/x", "a=5/5/5", "a=5/5,a=5/5", "ä=5/5"])
def test_classes_that_cannot_be_read_are_told_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        parse_classes(text)
    assert "\n" not in str(caught.value)


def test_the_number_of_classes_is_bounded() -> None:
    text = ",".join(f"c{number}=5/5" for number in range(MAX_CLASSES + 1))
    with pytest.raises(ValueError, match="at most 64"):
        parse_classes(text)
    assert parse_classes("") == {}


# ---- a stream's status
START = {"type": "http.response.start", "status": 200, "headers": []}


class Client:
    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def send(self, message: Any) -> None:
        self.messages.append(message)

    async def receive(self) -> Any:
        raise AssertionError("an answer reads nothing")


def event(text: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


async def test_a_streams_status_waits_for_its_first_event_and_then_everything_passes() -> None:
    client, notes = Client(), AnswerNotes()
    send = StatusWithFirstEvent({"type": "http"}, client.receive, client.send, notes)
    await send(START)
    assert client.messages == []
    await send(event(b"one"))
    notes.failure = Failure(FailureKind.INSTANCE_LOST, "too late to be a status")
    await send(event(b"two", more=False))
    assert client.messages == [START, event(b"one"), event(b"two", more=False)]


async def test_a_stream_that_fails_before_its_first_event_gets_the_status_of_its_failure() -> None:
    client, notes = Client(), AnswerNotes()
    send = StatusWithFirstEvent({"type": "http"}, client.receive, client.send, notes)
    await send(START)
    notes.failure = Failure(FailureKind.SLO, "not in time", "slo_ttft", 3.0)
    await send(event(b'data: {"error"}'))
    await send(event(b"data: [DONE]", more=False))
    start, body = client.messages
    assert start["status"] == 429
    assert json.loads(body["body"])["error"] == {
        "message": "not in time",
        "type": "Too Many Requests",
        "param": None,
        "code": 429,
    }


async def test_an_error_that_vllm_answered_itself_is_left_as_it_is() -> None:
    client, notes = Client(), AnswerNotes(Failure(FailureKind.SLO, "not in time"))
    send = StatusWithFirstEvent({"type": "http"}, client.receive, client.send, notes)
    await send({**START, "status": 429})
    await send(event(b"{}", more=False))
    assert client.messages == [{**START, "status": 429}, event(b"{}", more=False)]
