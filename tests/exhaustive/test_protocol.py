"""Can two engines own one request, or blocks stay reserved for nobody? All joint states of the two real machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.explorer import Exploration
from tests.support.protocol_mutations import MUTATIONS, Mutation, ResumesWhenCommitIsLate
from tests.support.protocol_scenario import Disturbance, Scenario
from tests.support.protocol_scenarios import CRASHES, LIVE, LONG, QUICK, under
from tests.support.protocol_world import ProtocolWorld

Record = Callable[[str, object], None]


def record(record_property: Record, name: str, found: Exploration[Any], *, is_mutation: bool) -> None:
    """For the last line of the session (conftest.py)."""
    record_property("name", name)
    record_property("num_states", found.num_states)
    record_property("trace", str(found.broken or ""))
    record_property("is_mutation", is_mutation)


def expect_sound(name: str, scenario: Scenario, record_property: Record) -> None:
    found = ProtocolWorld(scenario).explore()
    record(record_property, name, found, is_mutation=False)
    assert found.broken is None, str(found.broken)
    assert found.num_states > 500  # the world does offer choices


@pytest.mark.parametrize(("name", "scenario"), QUICK.items(), ids=QUICK.keys())
def test_never_two_owners_and_nothing_left_over(name: str, scenario: Scenario, record_property: Record) -> None:
    expect_sound(name, scenario, record_property)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "scenario"), LONG.items(), ids=LONG.keys())
def test_never_two_owners_however_much_goes_wrong_at_once(
    name: str, scenario: Scenario, record_property: Record
) -> None:
    expect_sound(name, scenario, record_property)


@pytest.mark.parametrize(("name", "mutation"), MUTATIONS.items(), ids=MUTATIONS.keys())
def test_a_mistake_is_found_with_the_shortest_way_to_it(name: str, mutation: Mutation, record_property: Record) -> None:
    found = mutation.world().explore()
    record(record_property, name, found, is_mutation=True)
    assert found.broken is not None
    assert found.broken.why == mutation.why, str(found.broken)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("disturbances", [(), CRASHES], ids=["nothing", "crashes"])
def test_leaving_out_messages_that_mean_nothing_hides_nothing(disturbances: tuple[Disturbance, ...]) -> None:
    scenario = under(LIVE, *disturbances, in_flight=3)
    whole, tidied = ProtocolWorld(scenario, is_tidied=False).explore(), ProtocolWorld(scenario).explore()
    assert whole.broken is None and tidied.broken is None
    assert whole.num_states > 3 * tidied.num_states


CONTROLS = {mutation.without_it: name for name, mutation in MUTATIONS.items()}


@pytest.mark.long
@pytest.mark.parametrize("scenario", [s for s in CONTROLS if s not in QUICK.values()], ids=lambda s: CONTROLS[s])
def test_where_a_mistake_is_found_the_real_machines_make_none(scenario: Scenario) -> None:
    """The control: it is the mistake that is found, not something in the scenario."""
    assert ProtocolWorld(scenario).explore().broken is None


def test_a_late_commit_is_resumed_by_its_own_timer_in_the_trace_of_the_classic_mistake() -> None:
    found = MUTATIONS["resumes when the answer to commit is late"].world().explore()
    assert found.broken is not None and "source: timer resend" in found.broken.steps


def test_a_step_that_the_table_does_not_know_is_caught() -> None:
    found = ProtocolWorld(under(LIVE), source_class=ResumesWhenCommitIsLate).explore()
    assert found.broken is not None and "COMMITTING -TimerFired-> " in found.broken.why
