"""What of a fitted fleet goes into a file? Its step times and its size, for `kvferry simulate compare --twin`; pure.

The step times stand in the shape of `step_time_models.json`, so that `--profiles FILE --model fitted` reads them, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.sim.fitting import Fit
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.observed import Observed
from orchestrator.sim.steptime import LLUMNIX_FLEET, StepTimes, from_profile

SCHEMA = 1
MODEL = "fitted"
"""The name of its step times."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A fleet that can be simulated: its engines, and how many. By default that of Llumnix's evaluation."""

    times: StepTimes = LLUMNIX_FLEET
    engine: LengthConfig = field(default_factory=LengthConfig)
    num_instances: int = 16
    num_gateways: int = 1


def fit_lines(fit: Fit, seen: Observed) -> list[str]:
    """For people."""
    engine, plural = seen.engine, "s" if seen.num_instances > 1 else ""
    lines = [
        f"{seen.num_instances} instance{plural} of {engine.num_blocks:,} blocks of {engine.block_size} tokens,"
        f" {engine.max_num_seqs} requests and {engine.max_num_batched_tokens:,} tokens a step at most",
        f"{fit.num_steps:,} steps in {fit.busy_s:.1f} s, told in {fit.num_windows:,} reports",
        "",
    ]
    for term in fit.terms:
        error = "never seen" if math.isinf(term.error_s) else f"+- {1e6 * term.error_s:.4g}"
        lines.append(f"{term.name:<8} {1e6 * term.seconds:>10.4g} us {error:<12} {term.unit}")
    lines += [
        f"{'between':<8} {1e6 * fit.between_s:>10.4g} us {'':<12} from a step to the next one",
        "",
        f"a report's time is off by {100 * fit.median_error:.1f} % (median), {100 * fit.p95_error:.1f} % (P95);"
        f" {100 * fit.stalled_share:.1f} % of the time was in stalls",
    ]
    return lines + [f"not told: {warning}" for warning in fit.warnings]


def written(fit: Fit, seen: Observed, source: str) -> dict[str, Any]:
    """In terms of JSON. `source`: where the journal was."""
    return {
        "kvferry_fit": SCHEMA,
        "journal": source,
        "models": {MODEL: _profile(fit)},
        "engine": asdict(seen.engine),
        "fleet": {"instances": seen.num_instances, "gateways": seen.num_gateways},
        "fit": {
            "terms": {
                term.name: {
                    "seconds": term.seconds,
                    "standard_error": term.error_s if math.isfinite(term.error_s) else None,
                    "of": term.unit,
                }
                for term in fit.terms
            },
            "between_steps_s": fit.between_s,
            "windows": fit.num_windows,
            "steps": fit.num_steps,
            "busy_s": fit.busy_s,
            "median_error": fit.median_error,
            "p95_error": fit.p95_error,
            "stalled_share": fit.stalled_share,
            "warnings": list(fit.warnings),
        },
    }


def twin_of(values: Mapping[str, Any]) -> Twin:
    """What `written` wrote. Raises ValueError when it is something else."""
    if not isinstance(values, Mapping) or values.get("kvferry_fit") != SCHEMA:
        raise ValueError("it is no fit of this version: make one with `kvferry simulate fit JOURNAL --json FILE`")
    try:
        fleet = values["fleet"]
        return Twin(
            from_profile(values, MODEL),
            LengthConfig(**values["engine"]),
            int(fleet["instances"]),
            int(fleet["gateways"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"it is no whole fit ({type(error).__name__}: {error})") from error


def _profile(fit: Fit) -> dict[str, Any]:
    """See `orchestrator.sim.steptime.from_profile`."""
    times, attention = fit.times, fit.times.attention
    return {
        "linear": {
            "hinge": {
                "k0_ms": 1e3 * (times.base_s - fit.between_s),
                "k1_ms_per_token": 1e3 * times.token_s,
                "T0_tokens": times.bend_tokens,
                "k2_ms_per_token_above_T0": 1e3 * times.bent_token_s,
            }
        },
        "cpu": {"base_ms": 1e3 * fit.between_s},
        "attn_decode": {
            "per_step_ms": 1e3 * attention.decode_s,
            "per_seq_ms": 1e3 * attention.sequence_s,
            "per_ctx_token_ms": 1e3 * attention.context_s,
        },
        "attn_prefill": {
            "per_chunk_ms": 1e3 * attention.chunk_s,
            "per_token_ms": 1e3 * attention.token_s,
            "per_token2_ms": 1e3 * attention.square_s,
            "per_token_x_ctx_ms": 1e3 * attention.cross_s,
            "per_ctx_token_ms": 1e3 * attention.before_s,
        },
    }
