"""What does an orchestrator's journal say of its engines? Their size, and what they computed between two reports; pure.

A report carries sums that only grow (`instance.messages.StepTotals`), so the difference of two is one exact equation of
the step times, however many reports were lost in between.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from instance.messages import LoadReport
from orchestrator.errors import ConfigError
from orchestrator.events import GatewayStarted, MigrationEnded, ReportReceived
from orchestrator.journal.lines import Entry, Line
from orchestrator.policy.steptime import Observation, between
from orchestrator.sim.lengths import LengthConfig


@dataclass(frozen=True, slots=True)
class Window:
    """Between two reports of one incarnation that had made steps meanwhile."""

    instance: str
    work: Observation
    wall_s: float
    """Between the arrivals of the two reports at the orchestrator."""
    was_busy: bool
    """Requests ran whenever it reported."""


@dataclass(slots=True)
class _Begun:
    """A window whose end has not been told yet: reports of no further step, in the middle of a long one or at rest."""

    report: LoadReport
    at_s: float
    is_busy: bool

    def window(self, report: LoadReport, now_s: float) -> Window | None:
        """What ends with this report."""
        self.is_busy = self.is_busy and report.num_running > 0
        if report.epoch != self.report.epoch or (work := between(self.report.steps, report.steps)) is None:
            return None
        return Window(report.instance, work, now_s - self.at_s, self.is_busy)


@dataclass(frozen=True, slots=True)
class Observed:
    """A journal, as far as it is about engines."""

    windows: tuple[Window, ...]
    engine: LengthConfig
    """Of each instance. A journal does not tell `max_model_len`: here all blocks. Nor does it tell `bytes_per_token`
    before something has moved: here the default."""
    num_instances: int
    num_gateways: int
    speculates: bool
    """Requests got more than one token in a step."""


def observed(lines: Iterable[Line], instance: str | None = None) -> Observed:
    """`instance`: of this one only, all of its incarnations. Raises ConfigError when none has told of steps, or when
    instances differ in size."""
    last: dict[str, _Begun] = {}
    windows: list[Window] = []
    gateways: set[str] = set()
    bytes_of_a_block: list[float] = []
    for line in lines:
        if not isinstance(line, Entry):
            continue
        match line.event:
            case ReportReceived(report):
                begun = last.get(report.instance)
                window = None if begun is None else begun.window(report, line.now_s)
                if begun is None or window is not None or begun.report.epoch != report.epoch:
                    last[report.instance] = _Begun(report, line.now_s, report.num_running > 0)
                if window is not None:
                    windows.append(window)
            case GatewayStarted(gateway=gateway):
                gateways.add(gateway)
            case MigrationEnded(figures=figures) if num_blocks := figures.copied_blocks + figures.tail_blocks:
                bytes_of_a_block.append(figures.num_bytes / num_blocks)
            case _:
                pass
    told = [begun.report for begun in last.values() if instance in (None, begun.report.instance)]
    if instance is not None and not told:
        raise ConfigError(f"no report of {instance!r} in it; there: {', '.join(sorted(last)) or 'none of anybody'}")
    windows = [one for one in windows if instance in (None, one.instance)]
    if not windows:
        raise ConfigError(
            "no report in it tells of steps: it is of a fleet that served nothing, or of an older kvferry"
        )
    return Observed(
        tuple(windows),
        _engine(told, bytes_of_a_block),
        num_instances=len({window.instance for window in windows}),
        num_gateways=max(1, len(gateways)),
        speculates=any(one.steps.num_decode_tokens > one.steps.num_decoding for one in told),
    )


def _engine(reports: list[LoadReport], bytes_of_a_block: list[float]) -> LengthConfig:
    sizes = {(one.total_blocks, one.block_size, one.max_running, one.max_step_tokens): one for one in reports}
    if len(sizes) > 1:
        names = ", ".join(f"{one.instance} ({one.total_blocks} blocks)" for one in sizes.values())
        raise ConfigError(f"the instances are of several sizes: {names}; choose one with --instance")
    ((num_blocks, block_size, max_running, max_step_tokens),) = sizes
    default = LengthConfig()
    of_a_token = round(statistics.median(bytes_of_a_block) / block_size) if bytes_of_a_block else 0
    return LengthConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=num_blocks * block_size,
        max_num_seqs=max_running or default.max_num_seqs,
        max_num_batched_tokens=max_step_tokens or default.max_num_batched_tokens,
        bytes_per_token=of_a_token or default.bytes_per_token,
    )
