"""What does `kvferry simulate compare --suite NAME` do? Many days that belong together, their tables and figures."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import msgspec
import typer
from rich.console import Console

from orchestrator import cli_simulate_options as told

SUITES = ("paper",)


def play(name: str, num_requests: int | None, out: Path | None) -> None:
    """Raises ConfigError for no such suite."""
    from orchestrator.sim.compare import live_all  # noqa: PLC0415
    from orchestrator.sim.result import without_nan  # noqa: PLC0415
    from orchestrator.sim.suite import NUM_REQUESTS, Lasted, Told, jobs  # noqa: PLC0415
    from orchestrator.sim.suite_sheets import suite_sheets  # noqa: PLC0415

    told.require(name in SUITES, f"--suite {name}: there is {', '.join(SUITES)}")
    told.writable("--json", out)
    count = NUM_REQUESTS if num_requests is None else num_requests
    told.at_least_one("--requests", count)
    asked, lasted, began_s = jobs(count), list[Lasted](), time.monotonic()
    with Console(stderr=True).status("simulating") as status:
        for one, day in zip(asked, live_all([one.job for one in asked]), strict=True):
            lasted.append(Lasted(one, day))
            status.update(f"simulating: {len(lasted)} of {len(asked)} days")
    of_all = Told(lasted)
    told.show(suite_sheets(of_all), f"suite {name}, {count:,} requests a day")
    figures = {key: None if math.isnan(value) else value for key, value in of_all.figures().items()}
    figures["wall_s"] = time.monotonic() - began_s
    for key, value in figures.items():
        typer.echo(f"{key} {'none' if value is None else format(value, '.4g')}")
    if out is not None:
        days = [
            {
                "part": one.asked.part,
                "row": one.asked.row,
                "arm": one.asked.arm,
                "seed": one.day.seed,
                "requests_per_s": one.day.requests_per_s,
                "scores": without_nan(msgspec.to_builtins(one.day.scores)),
                "counts": msgspec.to_builtins(one.day.counts),
                "mean_instances": one.day.fleet.mean_instances,
                "fragmentation": one.day.fleet.fragmentation.mean,
                "outcomes": one.day.fleet.outcomes,
            }
            for one in lasted
        ]
        text = json.dumps({"suite": name, "requests": count, "figures": figures, "days": days}, allow_nan=False)
        told.write("--json", out, text + "\n")
