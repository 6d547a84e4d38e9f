"""Which arm serves the same requests best? Each arm with each seed is one simulated day, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from random import Random

from orchestrator.policy.levels import parse_levels
from orchestrator.policy.targets import NO_TARGETS, Targets
from orchestrator.priority_classes import with_levels
from orchestrator.sim.arms import Arm, arm_of
from orchestrator.sim.arrivals import Arrival
from orchestrator.sim.asked import Drawn, Wanted
from orchestrator.sim.catalogue import workload_named
from orchestrator.sim.day import Day, Played
from orchestrator.sim.jumping_loop import few_collections, run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.measures import curves, fleet_measures
from orchestrator.sim.score import Beside, by_kind, littles_law_gap, num_warm_up
from orchestrator.sim.series import series_of, series_of_each
from orchestrator.sim.steptime import LLUMNIX_FLEET, StepTimes
from orchestrator.sim.workload import with_urgent
from orchestrator.sim.world import World, WorldParams
from orchestrator.state import CoreParams

MAX_LAW_GAP = 1e-6


@dataclass(frozen=True, slots=True)
class Scaled:
    """The fleet grows and shrinks by production's rule: mean freeness is kept in this band, in decode steps."""

    low_steps: float
    high_steps: float
    most: int = 16


@dataclass(frozen=True, slots=True)
class Question:
    """One workload, asked of each arm."""

    workload: str = "M-M"
    """See `catalogue.workload_named`."""
    requests_per_s: float = 7.5
    coefficient_of_variation: float = 1.0
    num_requests: int = 2_000
    num_instances: int = 16
    num_gateways: int = 1
    urgent_share: float = 0.0
    urgent_priority: int = -10
    """0: they are told apart in the figures alone."""
    urgent_headroom_blocks: int = 0
    """Kept free beside those that are more urgent than others."""
    scaled: Scaled | None = None
    """None: the number of instances stays."""
    times: StepTimes = field(default=LLUMNIX_FLEET)
    engine: LengthConfig = field(default_factory=LengthConfig)
    targets: Targets = NO_TARGETS
    """Of requests that bring none, for the share that met theirs. Nobody acts on them."""
    data: str = ""
    """The folder of published workloads; empty: there is none."""

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer that an instance takes."""
        return min(self.engine.max_model_len, self.engine.num_blocks * self.engine.block_size)

    def drawn(self, seed: int) -> Drawn:
        """Raises ConfigError when there is no such workload, or no such file."""
        rng = Random(seed)
        wanted = Wanted(self.requests_per_s, self.num_requests, self.longest, self.coefficient_of_variation)
        drawn = workload_named(self.workload, rng, wanted, Path(self.data) if self.data else None)
        if self.urgent_share:
            drawn = replace(drawn, arrivals=with_urgent(drawn.arrivals, rng, self.urgent_share, self.urgent_priority))
        return drawn

    def arrivals(self, seed: int) -> list[Arrival]:
        return self.drawn(seed).arrivals

    def world(self, arm: Arm, seed: int) -> WorldParams:
        return WorldParams(
            num_instances=self.num_instances,
            num_gateways=self.num_gateways,
            engine=self.engine,
            times=self.times,
            arm=arm,
            seed=seed,
            core=self._core(),
        )

    def _core(self) -> CoreParams:
        params = CoreParams()
        if self.scaled is not None:
            autoscale = replace(
                params.scaling.autoscale, low_steps=self.scaled.low_steps, high_steps=self.scaled.high_steps
            )
            most = self.scaled.most
            scaling = replace(
                params.scaling, can_start=True, is_automatic=True, most=most, capacity=most, autoscale=autoscale
            )
            params = replace(params, scaling=scaling)
        if self.urgent_headroom_blocks:
            levels = parse_levels(f"high:-10:{self.urgent_headroom_blocks},normal:0:0,low:10:0")
            params = with_levels(params, levels)
        return params


Job = tuple[Question, str, int]
"""A question, an arm and a seed: one day."""


def live(question: Question, arm: str, seed: int) -> Day:
    """Play one day in this process. Raises RuntimeError when the lives that were told do not add up."""
    return played(question, arm, seed).day


def played(question: Question, arm: str, seed: int, keeps_journal: bool = False) -> Played:
    """The same, with what is too much to keep of many days."""

    async def play() -> Played:
        loop, arrivals = asyncio.get_running_loop(), question.arrivals(seed)
        world = World(replace(question.world(arm_of(arm), seed), keeps_journal=keeps_journal))
        world.clients.first_counted = num_warm_up(len(arrivals))
        lived = await world.play(arrivals)
        if (gap := littles_law_gap(lived)) > MAX_LAW_GAP:
            raise RuntimeError(f"{arm}, seed {seed}: requests present and latencies differ by {gap:.1e} (Little's law)")
        beside = Beside(world.clients.gaps, world.losses.by_request, question.targets)
        # NaN: no token has come.
        ended_s = max((one.last_s for one in lived if one.last_s > 0.0), default=loop.time())
        instance_s = world.presence.seconds(lived[0].sent_s, ended_s)
        moments = world.watch.moments
        day = Day(
            arm=arm,
            seed=seed,
            scores=by_kind(lived, beside=beside),
            counts=world.counts(),
            virtual_s=loop.time(),
            requests_per_s=question.requests_per_s,
            fleet=fleet_measures(moments, instance_s, world.fleet.summaries, world.clients.downtimes_s),
            curves=curves(lived),
            series=series_of(moments),
        )
        return Played(day, series_of_each(moments), b"" if world.journal is None else world.journal.text())

    with few_collections():
        return run_jumping(play())


def compare(question: Question, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[Day]:
    """All days, seed by seed, as they come; as many at once as there are processors."""
    return live_all([(question, arm, seed) for seed in seeds for arm in arms])


def live_all(jobs: Sequence[Job]) -> Iterator[Day]:
    """Each day, in this order; as many at once as there are processors."""
    num_workers = min(len(jobs), os.cpu_count() or 1)
    if num_workers <= 1:
        yield from (live(*job) for job in jobs)
        return
    days: list[Future[Day]] = []
    others = active_children()
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        try:
            with _holding_ctrl_c():
                days += [pool.submit(live, *job) for job in jobs]  # starts the workers
            for day in days:
                yield day.result()
        finally:
            if not all(day.done() for day in days):  # Ctrl-C: the pool would wait for days that nobody wants
                for process in set(active_children()) - set(others):
                    process.terminate()


@contextmanager
def _holding_ctrl_c() -> Iterator[None]:
    """Processes that start meanwhile never hear it: it goes to all of a terminal's group, and the first of them says
    what becomes of the others. Here it is heard afterwards, whichever thread it came to."""
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt
