"""How does `kvferry scale` look on a terminal? One line for what holds, and one for each change on the way there."""

from __future__ import annotations

import time

from orchestrator.admin.client import AdminClient
from orchestrator.admin.convert import INSTANCES
from orchestrator.admin.pb.kvferry.admin.v1 import scaling_pb2 as pb

LOOK_S = 0.5


def line(scaling: pb.Scaling) -> str:
    """What holds, and what is being done about it."""
    wanted = f"{scaling.target_instances} wanted" if scaling.HasField("target_instances") else "no number wanted"
    mode = "automatic" if scaling.automatic else "by hand"
    parts = [f"{scaling.num_instances} there, {wanted} ({mode}, {scaling.min_instances} to {scaling.max_instances})"]
    for word, names in (("starting", scaling.starting), ("emptying", scaling.retiring)):
        if names:
            parts.append(f"{word} {', '.join(name.removeprefix(INSTANCES) for name in names)}")
    if scaling.HasField("mean_freeness_steps"):
        parts.append(f"mean freeness {scaling.mean_freeness_steps:.0f} decode steps")
    if scaling.num_start_failures:
        parts.append(f"{scaling.num_start_failures} starts failed, next in {scaling.retry_in_s:.0f} s")
    if scaling.reason:
        parts.append(f"latest: {scaling.reason}")
    return "instances: " + "; ".join(parts)


def is_reached(scaling: pb.Scaling) -> bool:
    """As many as wanted are there, and nothing is under way any more."""
    is_quiet = not scaling.starting and not scaling.retiring
    return is_quiet and scaling.HasField("target_instances") and scaling.num_instances == scaling.target_instances


def follow(client: AdminClient, scaling: pb.Scaling, deadline_s: float | None) -> bool:
    """Print each change until the target is reached; False when the deadline comes first."""
    until_s = None if deadline_s is None else time.monotonic() + deadline_s
    said = ""
    while True:
        now = line(scaling)
        if now != said:
            print(now, flush=True)
            said = now
        if is_reached(scaling):
            return True
        if until_s is not None and time.monotonic() >= until_s:
            return False
        time.sleep(LOOK_S)
        scaling = client.scaling()
