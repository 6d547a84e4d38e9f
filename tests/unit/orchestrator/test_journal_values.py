"""Does whatever a part of the core may keep come back from JSON as it was, also what two parts share?"""

from __future__ import annotations

from collections import OrderedDict, deque

import msgspec
import numpy as np
import pytest

from migration.types import InstanceId, RequestId
from orchestrator.core import Orchestrator
from orchestrator.errors import JournalError
from orchestrator.journal.values import Unwritable, core_of, core_state, plain, value_of
from orchestrator.resting import RestingPlace
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load


def again(core: Orchestrator) -> Orchestrator:
    return core_of(msgspec.json.decode(msgspec.json.encode(core_state(core))))


def with_part(value: object) -> Orchestrator:
    core = Orchestrator(CoreParams())
    vars(core)["_part"] = value
    return core


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, None, True, "a", (), ("b", (1,))],
        {("a", 1): {"b": [3]}, "c": float("-inf")},
        OrderedDict([("b", 1), ("a", 2)]),
        {1, 2, 3},
        frozenset({"a", "b"}),
        deque([1, 2], maxlen=2),
        deque(["a"]),
        b"\x00\xff",
        load_report(),
        (request_load("r1"), request_load("r2")),
        (request_load("r1"), "no request"),
        [load_report("instance-1")],
        CoreParams(max_waiters=3),
    ],
)
def test_values_come_back_as_they_were(value: object) -> None:
    found = vars(again(with_part(value)))["_part"]
    assert type(found) is type(value) and found == value


def test_arrays_come_back_with_their_shape_and_type_and_can_be_written_to() -> None:
    value = np.array([[1.5, np.inf], [np.nan, -0.0]])
    found = vars(again(with_part(value)))["_part"]
    assert found.dtype == value.dtype and np.array_equal(found, value, equal_nan=True)
    found[0, 0] = 2.0
    assert plain(np.float64(1.5)) == 1.5


def test_what_two_parts_share_they_share_again_and_a_ring_is_a_ring() -> None:
    core = with_part(None)
    rests: RestingPlace[RequestId] = vars(core)["_request_rests"]
    vars(core)["_part"] = {"the same": rests, "members": vars(core)["_instances"], "core": core}
    found = again(core)
    part = vars(found)["_part"]
    part["the same"].rest(RequestId("r1"), 9.0)
    assert vars(found)["_request_rests"].names() == {"r1"} and rests.names() == frozenset()
    assert part["members"] is vars(found)["_instances"] and part["core"] is found
    assert vars(found)["_drain_rests"] is not part["the same"], "the control: equal, not shared"


@pytest.mark.parametrize("value", [lambda: 1, object(), InstanceId, JournalError("no"), 1j])
def test_what_cannot_be_written_is_named(value: object) -> None:
    with pytest.raises(Unwritable):
        core_state(with_part([value]))


def test_what_is_too_deep_is_no_reason_to_run_out_of_stack() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(Unwritable, match="deep"):
        plain(deep)
    written: list[object] = []
    for _ in range(5000):
        written = [written]
    with pytest.raises(JournalError, match="deep"):
        value_of(written)


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "orchestrator.core:deque", "orchestrator.cli:main"])
def test_a_journal_makes_nothing_that_is_not_a_class_of_ours(name: str) -> None:
    with pytest.raises(JournalError, match="no class of this version"):
        value_of({"$": name})
