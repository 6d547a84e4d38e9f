"""How many instances should there be, and which one is the cheapest to empty? Frozen view in, decision out.

The signal is the mean freeness in decode steps, kept between `low_steps` and `high_steps`: one instance more when it
has been below for `period_s`, one less when it has been above for three times as long *and* one less would hold the
load with room to spare *and* the load does not grow such that it would soon be wanted back. Source of the band: Sun et
al., Llumnix (OSDI'24).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from instance.messages import LoadReport, RequestLoad
from orchestrator.policy.load import LoadParams, running_blocks
from orchestrator.policy.moves import InstanceView, freeness_steps, steps_left

MAX_SEEN = 24
"""Looks that are remembered for a trend."""


@dataclass(frozen=True, slots=True)
class AutoscaleParams:
    """Thresholds in decode steps, as those of rebalancing: how long memory lasts at the present batch."""

    low_steps: float = 160.0
    """Llumnix's 10 blocks of 16 tokens."""
    high_steps: float = 960.0
    """Llumnix's 60 blocks of 16 tokens."""
    floor_steps: float = 0.0
    """No instance counts as less: one prompt that fits nowhere must not call for an instance by itself."""
    cap_steps: float = 1920.0
    """No instance counts as more. Twice `high_steps`: an empty instance beside one that is full makes a mean of
    `high_steps`, which calls for nothing; that is a matter for rebalancing."""
    margin_steps: float = 160.0
    """An instance is only given up when the others would then have `low_steps` and so many more."""
    period_s: float = 10.0
    """The mean must have been below for so long, without a break. As in Llumnix, which looks every 10 s."""
    calm_periods: int = 3
    """And above for so many such periods: who waits pays for a start that comes late, nobody for an end that does."""
    cooldown_s: float = 60.0
    """After a change of the target none is given up for so long, and after one by hand nothing is decided. Otherwise
    one more is started at once: those that are to come count as empty, so that one need does not start two."""
    settle_s: float = 60.0
    """After an instance began to serve none is given up for so long: it starts empty, and fills slowly."""
    trend_s: float = 60.0
    """Over so long is it seen whether freeness falls: longer than calm must last, so that no burst is taken for a
    trend."""
    horizon_s: float = 120.0
    """None is given up where at this pace freeness would leave the band from above before. What has been given up is
    back only when load has filled the others, a need has lasted `period_s`, and it has started."""
    max_pending: int = 2
    """Instances wanted that do not serve yet; no further one is asked for while there are so many."""
    request_cost_blocks: float = 4.0
    """What moving one request costs besides its blocks: a hand-shake, a stop, a slot."""
    fixed_cost_blocks: float = 100_000.0
    """What a request that cannot be moved costs: its instance stays until it has ended."""
    load: LoadParams = field(default_factory=LoadParams)
    """The headroom that counts as used, as in every other freeness."""


@dataclass(frozen=True, slots=True)
class FleetView:
    """What is known of the fleet. A draining instance is neither load nor room here."""

    instances: tuple[InstanceView, ...]
    """Those whose report is fresh."""
    num_unheard: int
    """Instances that serve, but have not said lately how full they are."""
    num_pending: int
    """Wanted and not serving yet: being started, or still to be started."""
    num_retiring: int
    """Being emptied, to be stopped."""
    newest_age_s: float
    """Since the latest instance began to serve."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Fewest and most instances; 1 <= fewest <= most."""

    fewest: int
    most: int

    def clamp(self, number: int) -> int:
        return max(self.fewest, min(self.most, number))


@dataclass(frozen=True, slots=True)
class Trend:
    """What must be remembered between two looks."""

    below_since_s: float | None = None
    above_since_s: float | None = None
    changed_s: float = -math.inf
    """When the target was last changed, by whomever."""
    is_by_hand: bool = False
    """That change."""
    seen: tuple[tuple[float, float], ...] = ()
    """(time in s, the mean) of looks of the last `trend_s`, since the last change: MAX_SEEN at most, in order."""


@dataclass(frozen=True, slots=True)
class Decision:
    target: int
    reason: str
    signal_age_s: float
    """Age of the oldest report it rests on; infinite when there was none."""
    mean_steps: float | None
    """The signal; None when nobody has said lately how full it is."""


def plan_autoscale(
    fleet: FleetView, target: int, limits: Limits, trend: Trend, params: AutoscaleParams, now_s: float
) -> tuple[Decision, Trend]:
    """What the target should be now, and what to remember. The target moves by one at most, and stays within limits."""
    serving = [view for view in fleet.instances if not view.draining]
    age_s = max((view.signal_age_s for view in serving), default=math.inf)
    mean = mean_steps([view.load for view in serving], fleet.num_pending, params)
    trend = _followed(trend, mean, params, now_s)

    def decided(to: int, reason: str) -> tuple[Decision, Trend]:
        kept = limits.clamp(to)
        after = trend if kept == target else Trend(changed_s=now_s)
        return Decision(kept, reason, age_s, mean), after

    if limits.clamp(target) != target:
        return decided(target, f"the limits are {limits.fewest} and {limits.most}")
    if mean is None:
        return decided(target, "nobody has said lately how full it is")
    says = f"mean freeness {mean:.0f} decode steps"
    is_below = trend.below_since_s is not None
    since_s = trend.below_since_s if is_below else trend.above_since_s
    if since_s is None:
        return decided(target, f"{says}, within {params.low_steps:.0f} to {params.high_steps:.0f}")
    says += f", {'below' if is_below else 'above'} {params.low_steps if is_below else params.high_steps:.0f}"
    lasting_s = params.period_s * (1 if is_below else params.calm_periods)
    if now_s - since_s < lasting_s:
        return decided(target, f"{says}, not yet for {lasting_s:g} s")
    says += f" for {lasting_s:g} s"
    if now_s - trend.changed_s < params.cooldown_s and (trend.is_by_hand or not is_below):
        return decided(target, f"{says}; cooling down")
    if is_below:
        obstacle = _why_not_more(fleet, target, limits, params)
        return decided(target, f"{says}; {obstacle}") if obstacle else decided(target + 1, says)
    obstacle = _why_not_fewer(fleet, serving, target, limits, params) or _why_not_yet(trend, mean, params)
    return decided(target, f"{says}; {obstacle}") if obstacle else decided(target - 1, says)


def mean_steps(loads: list[LoadReport], num_pending: int, params: AutoscaleParams) -> float | None:
    """Mean freeness, each instance's bounded by floor and cap; one that is to come counts as empty. None: nobody's."""
    if not loads:
        return None
    bounded = [max(params.floor_steps, min(params.cap_steps, freeness_steps(load, params.load))) for load in loads]
    return (sum(bounded) + num_pending * params.cap_steps) / (len(bounded) + num_pending)


def _followed(trend: Trend, mean: float | None, params: AutoscaleParams, now_s: float) -> Trend:
    """Since when the mean has been outside; a moment inside starts the period anew."""
    is_below = mean is not None and mean < params.low_steps
    is_above = mean is not None and mean > params.high_steps
    return replace(
        trend,
        seen=_remembered(trend.seen, mean, params, now_s),
        below_since_s=(now_s if trend.below_since_s is None else trend.below_since_s) if is_below else None,
        above_since_s=(now_s if trend.above_since_s is None else trend.above_since_s) if is_above else None,
    )


def _remembered(
    seen: tuple[tuple[float, float], ...], mean: float | None, params: AutoscaleParams, now_s: float
) -> tuple[tuple[float, float], ...]:
    """With this look, unless the last one is too recent; without those that are too old. Unknown: nothing is."""
    if mean is None:
        return ()
    if seen and now_s - seen[-1][0] < params.trend_s / MAX_SEEN:
        return seen
    recent = [look for look in seen if now_s - look[0] <= params.trend_s]
    return (*recent[1 - MAX_SEEN :], (now_s, mean))


def trend_per_s(seen: tuple[tuple[float, float], ...]) -> float:
    """Decode steps a second, by least squares; 0 of fewer than two looks."""
    if len(seen) < 2:
        return 0.0
    middle_s = math.fsum(at_s for at_s, _ in seen) / len(seen)
    spread = math.fsum((at_s - middle_s) ** 2 for at_s, _ in seen)
    return math.fsum((at_s - middle_s) * mean for at_s, mean in seen) / spread


def _why_not_yet(trend: Trend, mean: float, params: AutoscaleParams) -> str:
    """Empty: the load does not grow so fast that the instance would soon be wanted back."""
    ahead = mean + params.horizon_s * min(0.0, trend_per_s(trend.seen))
    return f"at this pace {max(0.0, ahead):.0f} in {params.horizon_s:g} s" if ahead < params.high_steps else ""


def _why_not_more(fleet: FleetView, target: int, limits: Limits, params: AutoscaleParams) -> str:
    """Empty: nothing speaks against it."""
    if target >= limits.most:
        return f"{limits.most} is the most"
    if fleet.num_pending >= params.max_pending:
        return f"{fleet.num_pending} are still to come"
    return ""


def _why_not_fewer(
    fleet: FleetView, serving: list[InstanceView], target: int, limits: Limits, params: AutoscaleParams
) -> str:
    """Empty: nothing speaks against it."""
    if target <= limits.fewest or len(serving) <= 1:
        return f"{max(1, limits.fewest)} is the fewest"
    if fleet.num_pending or fleet.num_retiring:
        return "another change is under way"
    if fleet.num_unheard:
        return f"{fleet.num_unheard} have not said lately how full they are"
    if fleet.newest_age_s < params.settle_s:
        return f"the latest instance has served for {fleet.newest_age_s:.0f} s only"
    after = steps_after([view.load for view in serving], params)
    if after < params.low_steps + params.margin_steps:
        return f"one less would leave {after:.0f}"
    return ""


def steps_after(loads: list[LoadReport], params: AutoscaleParams) -> float:
    """Decode steps left for the fleet as a whole once one of these instances is gone and its load is not.

    Pooled, since moves and dispatch even the load out: blocks that nobody uses and nobody waits for, over all requests.
    Cautious: all that waits counts, headroom once for each instance that has it now, and the largest instance is taken
    to be the one that goes.
    """
    largest = max(loads, key=lambda load: load.total_blocks * load.block_size)
    spare = -float(largest.total_blocks * largest.block_size)
    num_requests = 0
    for load in loads:
        waiting = max(load.waiting_blocks, load.head_of_line_blocks)
        headroom = params.load.headroom_of(load.running_by_priority)
        used = running_blocks(load) + load.reserved_blocks + waiting + headroom
        spare += (load.total_blocks - used) * load.block_size
        num_requests += load.num_running + load.num_waiting
    # An idle instance counts as a batch of one, as it does by itself.
    return min(params.cap_steps, steps_left(spare, max(len(loads) - 1, num_requests), block_size=1))


def emptying_cost_blocks(requests: tuple[RequestLoad, ...], params: AutoscaleParams) -> float:
    """What emptying an instance with these requests costs, in blocks to be moved; what cannot be moved counts dear."""
    movable = sum(request.num_blocks + params.request_cost_blocks for request in requests if request.movable)
    return movable + params.fixed_cost_blocks * sum(not request.movable for request in requests)


def choose_victim(
    views: tuple[InstanceView, ...], params: AutoscaleParams, is_one_left: bool = False
) -> InstanceView | None:
    """The serving instance that is the cheapest to empty; of equals the last by name. None: it would be the last one.

    `is_one_left`: another one serves that is not among `views`. What is on its way to an instance counts there by the
    blocks it has set aside; what is on its way from it does not.
    """
    serving = [view for view in views if not view.draining]
    if not serving or (len(serving) == 1 and not is_one_left):
        return None
    return min(
        sorted(serving, key=lambda view: view.instance, reverse=True),
        key=lambda view: emptying_cost_blocks(view.requests, params) + view.load.reserved_blocks,
    )
