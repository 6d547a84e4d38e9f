"""Which fleets are compared? Each arm dispatches and moves by its own rules, over the same engines and requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from orchestrator.core import Orchestrator
from orchestrator.errors import ConfigError
from orchestrator.policy.columns import DispatchParams, Rule
from orchestrator.policy.dispatch import DispatchBook
from orchestrator.policy.rebalance import Plan
from orchestrator.sim.baselines import (
    BaselineBook,
    fewest_requests,
    infaas,
    least_free,
    llumnix_freeness,
    llumnix_plan,
)
from orchestrator.state import CoreParams

LLUMNIX_THRESHOLD = 3.0
"""Blocks a request."""
LLUMNIX_TUNED_THRESHOLD = 10.0
"""What its artifact has for M-M and S-L instead."""

MakeBook = Callable[[DispatchParams, Random], DispatchBook]


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    about: str
    rule: Rule = Rule.FREENESS
    make_book: MakeBook | None = None
    """None: production's."""
    plans: tuple[Plan, ...] | None = None
    """None: production's."""
    moves: bool = True
    """False: nothing moves, not even out of an instance that is to be stopped: it is waited for."""
    is_control: bool = False
    """Must come out worse than all others; only compared where it is asked for."""

    def core_params(self, params: CoreParams) -> CoreParams:
        params = replace(params, is_rebalancing=self.moves, dispatch=replace(params.dispatch, rule=self.rule))
        return params if self.moves else replace(params, max_migrations_out=0, max_migrations_in=0)

    def make_core(self, params: CoreParams) -> Orchestrator:
        if self.plans is None:
            return Orchestrator(params)
        theirs: type[Orchestrator] = type("Theirs", (Orchestrator,), {"plans": self.plans})
        return theirs(params)


def _two_random(params: DispatchParams, rng: Random) -> DispatchBook:
    return BaselineBook(params, fewest_requests, of_two=rng)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("round-robin", "each instance in turn", rule=Rule.ROUND_ROBIN, moves=False),
        Arm(
            "least-requests",
            "the instance with the fewest requests",
            make_book=lambda params, _: BaselineBook(params, fewest_requests),
            moves=False,
        ),
        Arm("power-of-two", "of two at random the one with fewer requests", make_book=_two_random, moves=False),
        Arm(
            "infaas++",
            "the instance with the least memory used and queued for",
            make_book=lambda params, _: BaselineBook(params, infaas),
            moves=False,
        ),
        Arm(
            "llumnix",
            "as its paper states it: dispatch by freeness, and moves from below a threshold to above it",
            make_book=lambda params, _: BaselineBook(params, llumnix_freeness),
            plans=(llumnix_plan(LLUMNIX_THRESHOLD),),
        ),
        Arm(
            "llumnix-10",
            "the same with the threshold that its artifact has for M-M and S-L",
            make_book=lambda params, _: BaselineBook(params, llumnix_freeness),
            plans=(llumnix_plan(LLUMNIX_TUNED_THRESHOLD),),
        ),
        Arm(
            "inverted",
            "a control that must lose: dispatch to the instance that is the least free",
            make_book=lambda params, _: BaselineBook(params, least_free),
            moves=False,
            is_control=True,
        ),
        Arm("dispatch", "ours, but nothing moves", moves=False),
        Arm("ours", "ours"),
    )
}


def arm_of(name: str) -> Arm:
    """Raises ConfigError for no such name."""
    if name not in ARMS:
        raise ConfigError(f"no arm named {name!r}; there: {', '.join(ARMS)}")
    return ARMS[name]
