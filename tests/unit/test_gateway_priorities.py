"""Which of header, body and API key says how urgent an HTTP request is?"""

from __future__ import annotations

import pytest

from orchestrator.gateway.priorities import Asked, BadPriority, PriorityRules, key_digest
from orchestrator.policy.levels import MAX_PRIORITY

KEYS = {key_digest(b"vip-key"): -10, key_digest(b"bulk-key"): 10}
RULES = PriorityRules(key_classes=KEYS)
VIP = {"authorization": "Bearer vip-key"}
BULK = {"authorization": "bearer  bulk-key "}


@pytest.mark.parametrize(
    ("headers", "in_body", "priority"),
    [
        ({}, 0, 0),
        ({}, 4, 4),
        ({"x-kvferry-priority": "high"}, 0, -10),
        ({"x-kvferry-priority": "-3"}, 4, -3),
        ({"x-kvferry-priority": "0"}, 4, 0),
        ({"x-llm-d-inference-objective": "low"}, 4, 10),
        ({"x-llm-d-inference-objective": "low", "x-kvferry-priority": "high"}, 4, -10),
        (VIP, 0, -10),
        (BULK, 0, 10),
        ({"authorization": "Bearer unknown"}, 0, 0),
        ({"authorization": "Basic vip-key"}, 0, 0),
        ({"authorization": "vip-key"}, 0, 0),
        ({"authorization": "Bearer"}, 3, 3),
    ],
)
def test_the_header_goes_before_the_body_and_the_body_before_the_key(
    headers: dict[str, str], in_body: int, priority: int
) -> None:
    assert RULES.asked(headers).priority(in_body) == priority


@pytest.mark.parametrize(
    ("headers", "in_body", "priority"),
    [
        (VIP | {"x-kvferry-priority": "normal"}, 0, 0),
        (VIP, 5, 5),
        (VIP | {"x-kvferry-priority": "-50"}, 0, -10),
        (BULK | {"x-kvferry-priority": "high"}, 0, 10),
        (BULK, -99, 10),
        (BULK | {"x-kvferry-priority": "20"}, 0, 20),
    ],
)
def test_a_request_may_be_less_urgent_than_its_keys_class_but_not_more(
    headers: dict[str, str], in_body: int, priority: int
) -> None:
    assert RULES.asked(headers).priority(in_body) == priority


def test_an_objective_of_llm_d_that_is_no_level_is_passed_over() -> None:
    assert RULES.asked({"x-llm-d-inference-objective": "of another server"}).priority(4) == 4


@pytest.mark.parametrize("header", ["x-kvferry-priority"])
def test_a_header_that_is_no_priority_is_named(header: str) -> None:
    with pytest.raises(BadPriority, match="'urgent' is no priority") as caught:
        RULES.asked({header: "urgent"} | VIP)
    assert caught.value.header == header and str(caught.value).startswith(header)
    assert "vip-key" not in str(caught.value)


@pytest.mark.parametrize("in_body", [MAX_PRIORITY + 1, -MAX_PRIORITY - 1, 10**30])
def test_a_number_in_the_body_that_no_message_holds_is_refused(in_body: int) -> None:
    with pytest.raises(ValueError, match="priority is"):
        Asked().priority(in_body)


def test_rules_show_no_digest() -> None:
    assert key_digest(b"vip-key") not in repr(RULES)


def test_a_key_of_any_bytes_is_looked_up_without_an_error() -> None:
    headers = {"authorization": "Bearer " + "schl\u00fcssel".encode().decode("latin-1")}
    rules = PriorityRules(key_classes={key_digest("schl\u00fcssel".encode()): -7})
    assert rules.asked(headers).priority(0) == -7
