"""Do the policies' parameters change all at once or not at all, within their ranges?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from orchestrator.core import Orchestrator
from orchestrator.effects import Answer, PolicyRefused, PolicyUpdated, Refused, Result, UpdateMembers
from orchestrator.errors import RefusalKind
from orchestrator.events import PolicyUpdateRequested, PolicyValue, Token
from orchestrator.policy.rebalance import RebalanceParams
from orchestrator.state import CoreParams
from orchestrator.tuning import parameters

STARTED_WITH = CoreParams(rebalance=RebalanceParams(threshold_steps=100.0), max_migrations_out=3)


def ask(core: Orchestrator, *changes: tuple[str, PolicyValue | None], etag: str = "", dry: bool = False) -> Result:
    answer, *_ = core.on(PolicyUpdateRequested(Token(1), changes, etag, dry), 1.0)
    assert isinstance(answer, Answer)
    return answer.result


def test_every_parameter_can_be_read_written_and_put_back() -> None:
    core = Orchestrator(STARTED_WITH)
    before = core.policy()
    for path, parameter in parameters(STARTED_WITH).items():
        for end in (parameter.low, parameter.high):
            result = ask(core, (path, parameter.kind(end)))
            assert isinstance(result, PolicyUpdated) and dict(core.policy().values)[path] == end
            others = {name: value for name, value in core.policy().values if name != path}
            assert others == {name: value for name, value in before.values if name != path}, "nothing else has changed"
        assert isinstance(ask(core, (path, None)), PolicyUpdated)
        assert core.policy() == before


def test_how_to_dispatch_is_told_to_the_gateways_at_once_and_only_when_it_has_changed() -> None:
    core = Orchestrator(STARTED_WITH)

    def told(path: str, value: float, *, dry: bool = False) -> list[float]:
        effects = core.on(PolicyUpdateRequested(Token(1), ((path, value),), "", dry), 1.0)
        return [effect.dispatch.prefix_weight for effect in effects if isinstance(effect, UpdateMembers)]

    assert told("dispatch.prefix_weight", 3.0, dry=True) == []
    assert told("dispatch.prefix_weight", 3.0) == [3.0]
    assert told("dispatch.prefix_weight", 3.0) == []
    assert told("rebalance.rest_s", 3.0) == []


def test_a_change_says_what_was_and_what_is() -> None:
    core = Orchestrator(STARTED_WITH)
    result = ask(core, ("rebalance.threshold_steps", 5), ("rebalance.enabled", True), ("drain.max_moves", 4))
    assert isinstance(result, PolicyUpdated)
    assert result.changes == (("rebalance.threshold_steps", 100.0, 5.0), ("drain.max_moves", 16, 4))
    assert result.params.rebalance == replace(STARTED_WITH.rebalance, threshold_steps=5.0)
    assert result.etag == core.policy().etag


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rebalance.threshold_steps", -1.0),
        ("rebalance.threshold_steps", math.nan),
        ("rebalance.margin_steps", math.inf),
        ("rebalance.rest_s", 3601.0),
        ("rebalance.max_moves", 0),
        ("rebalance.max_moves", 2.0),
        ("rebalance.enabled", 1),
        ("drain.retry_s", True),
        ("stale_after_s", 0.1),
        ("max_migrations_out", 4),
        ("nothing.of_the_kind", 1),
    ],
)
def test_one_wrong_value_changes_nothing_and_each_wrong_one_is_named(path: str, value: PolicyValue) -> None:
    core = Orchestrator(STARTED_WITH)
    before = core.policy()
    result = ask(core, ("rebalance.margin_steps", 7.0), (path, value), ("drain.max_moves", -1))
    assert isinstance(result, PolicyRefused)
    assert [violation.field for violation in result.violations] == [path, "drain.max_moves"]
    assert core.policy() == before


def test_only_to_be_checked_changes_nothing() -> None:
    core = Orchestrator(STARTED_WITH)
    before = core.policy()
    result = ask(core, ("rebalance.margin_steps", 7.0), dry=True)
    assert isinstance(result, PolicyUpdated) and result.changes and result.etag != before.etag
    assert core.policy() == before


def test_an_etag_of_another_policy_is_overtaken() -> None:
    core = Orchestrator(STARTED_WITH)
    first = core.policy().etag
    assert isinstance(ask(core, ("rebalance.margin_steps", 7.0), etag=first), PolicyUpdated)
    refused = ask(core, ("rebalance.margin_steps", 8.0), etag=first)
    assert isinstance(refused, Refused) and refused.kind is RefusalKind.OVERTAKEN
    assert dict(core.policy().values)["rebalance.margin_steps"] == 7.0
