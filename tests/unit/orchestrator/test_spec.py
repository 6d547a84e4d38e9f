"""Does an orchestrator that takes over know all that the one before it was started with?"""

from __future__ import annotations

import msgspec

from instance.spec import InstanceSpec
from orchestrator.policy.dispatch import Rule
from orchestrator.runtime.actor import core_params
from orchestrator.runtime.spec import OrchestratorSpec, ScalingSpec, successor

FIRST = OrchestratorSpec(
    host="127.0.0.1",
    admin_port=0,
    tick_s=0.25,
    threshold_steps=300.0,
    margin_steps=7.0,
    rest_s=3.0,
    max_migrations=3,
    priority_levels="high:-10:64,normal:0",
    key_priorities=(("a" * 64, -10),),
    journal="/somewhere/j",
    log_level="WARNING",
    token="test",
    scaling=ScalingSpec(InstanceSpec(instance="", epoch=1, token="test"), most=4, first_epoch=2, is_automatic=True),
)


def test_it_differs_in_what_is_asked_for_and_in_nothing_else() -> None:
    after = successor(FIRST, rebalance=False, dispatch=Rule.ROUND_ROBIN)
    assert (after.rebalance, after.dispatch) == (False, Rule.ROUND_ROBIN)
    same = ("rebalance", "dispatch", "scaling")
    for name in FIRST.__struct_fields__:
        assert name in same or getattr(after, name) == getattr(FIRST, name), name
    assert core_params(after).rebalance == core_params(FIRST).rebalance
    assert successor(FIRST, rebalance=True).dispatch is FIRST.dispatch, "unless it is said"


def test_it_starts_no_instance_under_an_epoch_that_the_one_before_it_may_have_given() -> None:
    after = successor(FIRST, rebalance=True).scaling
    again = successor(successor(FIRST, rebalance=True), rebalance=True).scaling
    assert FIRST.scaling is not None and after is not None and again is not None
    assert again.first_epoch > after.first_epoch > FIRST.scaling.first_epoch + 1_000_000
    assert msgspec.structs.replace(after, first_epoch=2) == FIRST.scaling
    assert successor(msgspec.structs.replace(FIRST, scaling=None), rebalance=True).scaling is None
