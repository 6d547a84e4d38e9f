"""Do prompts that begin alike find what is cached of them, and what is that worth? Real engines, arms in turns.

    python -m bench.prefix_affinity [--quick] [--json FILE] [--rounds N] [--rate R]

Two CPU instances of the small model behind one gateway. Requests come at random times and belong to one of eight
groups; those of a group begin with the same 1,024 tokens. No instance has room for all eight beginnings beside what
runs, so a dispatch that does not heed them computes them again and again. Arms: *heeded* (`DispatchParams` as they
come) and *unheeded* (`prefix_weight` 0). A round sends one plan to each arm, in another order each time, under another
`cache_salt`: no arm finds what another has left. What was cached is what vLLM says of each request
(`prompt_tokens_details`); TTFT is what a streaming client saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.fleet import FleetError, Instance
from bench.report import Result, Value, spread_of, this_machine, write_result
from instance.spec import InstanceSpec
from orchestrator.gateway.service import GatewayService
from orchestrator.gateway.spec import GatewayConfig, Member
from orchestrator.policy.dispatch import DispatchParams

NUM_INSTANCES = 2
NUM_GROUPS = 8
PREFIX_TOKENS = 1_024
OWN_TOKENS = (16, 96)
ANSWER_TOKENS = (16, 48)
BLOCK_SIZE = 32
NUM_BLOCKS = 224
"""Of an instance: seven beginnings, with nothing else."""
ROUNDS, DURATION_S, RATE_PER_S = 4, 40.0, 3.0
QUICK_ROUNDS, QUICK_DURATION_S = 1, 15.0
REPORT_S = 30.0
"""Within it every instance has reported, or something is wrong."""
SEED = 5
TOKEN_IDS = (3, 500)
"""Drawn from: of any small model."""
MODEL = Path(__file__).parent / "models" / "tiny"
NAME = "tiny"
HEEDED, UNHEEDED = "heeded", "unheeded"
ARMS = {HEEDED: DispatchParams(slow_start_s=0.0), UNHEEDED: DispatchParams(slow_start_s=0.0, prefix_weight=0.0)}


@dataclass(frozen=True, slots=True)
class Planned:
    arrival_s: float
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    ttft_s: float
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(slots=True)
class Measured:
    """Of one arm, over the rounds so far."""

    answers: list[Answered] = field(default_factory=list)
    mean_ttft_s: list[float] = field(default_factory=list)
    """One a round, as the next."""
    cached_share: list[float] = field(default_factory=list)
    num_errors: int = 0

    def add(self, answers: Sequence[Answered | None]) -> None:
        whole = [answer for answer in answers if answer is not None]
        self.num_errors += len(answers) - len(whole)
        self.answers += whole
        if whole:
            self.mean_ttft_s.append(statistics.fmean(answer.ttft_s for answer in whole))
            self.cached_share.append(share_of(whole))

    def percentile_ms(self, share: float) -> float:
        return float(np.percentile([answer.ttft_s for answer in self.answers], share)) * 1e3 if self.answers else 0.0


def share_of(answers: Sequence[Answered]) -> float:
    return sum(one.num_cached_tokens for one in answers) / max(1, sum(one.num_prompt_tokens for one in answers))


def plan_of(seed: int, duration_s: float, rate_per_s: float) -> list[Planned]:
    """Follows from its seed: Poisson arrivals, groups drawn evenly."""
    rng = Random(seed)
    prefixes = [tuple(rng.randrange(*TOKEN_IDS) for _ in range(PREFIX_TOKENS)) for _ in range(NUM_GROUPS)]
    planned: list[Planned] = []
    at_s = rng.expovariate(rate_per_s)
    while at_s < duration_s:
        own = tuple(rng.randrange(*TOKEN_IDS) for _ in range(rng.randint(*OWN_TOKENS)))
        planned.append(Planned(at_s, rng.choice(prefixes) + own, rng.randint(*ANSWER_TOKENS)))
        at_s += rng.expovariate(rate_per_s)
    return planned


def engine_argv() -> tuple[str, ...]:
    return (
        str(MODEL),
        *("--served-model-name", NAME),
        *("--dtype", "float32"),
        *("--max-model-len", "2048"),
        *("--block-size", str(BLOCK_SIZE)),
        *("--num-gpu-blocks-override", str(NUM_BLOCKS + 1)),
        *("--kv-cache-memory-bytes", "1G"),
        *("--max-num-seqs", "16"),
        "--enable-prompt-tokens-details",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
        *("--uvicorn-log-level", "warning"),
    )


@asynccontextmanager
async def serving(logs: Path | None) -> AsyncIterator[tuple[GatewayService, str]]:
    """A gateway here and its instances in processes of their own. Raises FleetError when one does not start."""
    token = secrets.token_hex(16)
    specs = [InstanceSpec(f"instance-{n}", 1, engine_argv=engine_argv(), token=token) for n in range(NUM_INSTANCES)]
    started = await asyncio.gather(
        *(Instance.start(spec, log=logs and logs / f"{spec.instance}.log") for spec in specs), return_exceptions=True
    )
    instances = [one for one in started if isinstance(one, Instance)]
    service = GatewayService()
    try:
        for one in started:
            if isinstance(one, BaseException):
                raise one
        address = (await service.start(GatewayConfig(engine_argv(), port=0, token=token))).url
        service.set_members(
            Member(one.incarnation.instance, one.incarnation.epoch, one.incarnation.address) for one in instances
        )
        async with asyncio.timeout(REPORT_S):
            while len(service.loop.router.view(service.loop.now_s()).instances) < NUM_INSTANCES:  # noqa: ASYNC110
                await asyncio.sleep(0.05)  # it waits for sockets, which set no event of ours
        yield service, address
    finally:
        await service.stop()
        await asyncio.gather(*(one.stop() for one in instances))


async def ask(http: httpx.AsyncClient, planned: Planned, salt: str) -> Answered | None:
    """None: an error."""
    body = {
        "model": NAME,
        "prompt": list(planned.prompt),
        "max_tokens": planned.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
    }
    sent_s, first_s, usage = time.monotonic(), None, None
    try:
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if chunk.get("choices") and first_s is None:
                    first_s = time.monotonic()
                usage = chunk.get("usage") or usage
    except httpx.HTTPError as error:
        sys.stderr.write(f"a request failed: {error!r}\n")
    if first_s is None or usage is None:
        return None
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answered(first_s - sent_s, usage["prompt_tokens"], cached)


async def send_all(address: str, plan: Sequence[Planned], salt: str) -> list[Answered | None]:
    async with httpx.AsyncClient(base_url=address, timeout=120.0, trust_env=False) as http:
        started_s = time.monotonic()

        async def at_its_time(planned: Planned) -> Answered | None:
            await asyncio.sleep(max(0.0, started_s + planned.arrival_s - time.monotonic()))
            return await ask(http, planned, salt)

        return await asyncio.gather(*(at_its_time(planned) for planned in plan))


async def rounds(num_rounds: int, duration_s: float, rate: float, logs: Path | None) -> dict[str, Measured]:
    found = {name: Measured() for name in ARMS}
    async with serving(logs) as (service, address):
        warm_up = [Planned(0.0, planned.prompt[-200:], 8) for planned in plan_of(SEED, 4.0, 2.0)]
        await send_all(address, warm_up, "warm-up")
        for number in range(num_rounds):
            plan = plan_of(SEED + number, duration_s, rate)
            names = list(ARMS) if number % 2 == 0 else list(reversed(ARMS))
            for name in names:
                service.set_dispatch(ARMS[name])
                found[name].add(await send_all(address, plan, f"{number}-{name}"))
                sys.stderr.write(f"round {number + 1} of {num_rounds}: {name}, {len(plan)} requests\n")
    return found


def result_of(found: dict[str, Measured], num_rounds: int) -> Result:
    arms: dict[str, dict[str, Value]] = {
        name: {
            "cached_share": share_of(told.answers),
            "mean_ttft_ms": statistics.fmean(told.mean_ttft_s) * 1e3 if told.mean_ttft_s else 0.0,
            "p50_ttft_ms": told.percentile_ms(50),
            "p99_ttft_ms": told.percentile_ms(99),
            "requests": len(told.answers),
            "errors": told.num_errors,
        }
        for name, told in found.items()
    }

    def gain(figure: str) -> float:
        return float(arms[UNHEEDED][figure] or 0.0) / max(1e-9, float(arms[HEEDED][figure] or 0.0))

    return Result(
        name="prefix_affinity",
        command=" ".join(["python", "-m", "bench.prefix_affinity", *sys.argv[1:]]),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        figures={
            "cached_share_heeded": float(arms[HEEDED]["cached_share"] or 0.0),
            "cached_share_unheeded": float(arms[UNHEEDED]["cached_share"] or 0.0),
            "mean_ttft_gain": gain("mean_ttft_ms"),
            "p99_ttft_gain": gain("p99_ttft_ms"),
        },
        arms=arms,
        n={"rounds": num_rounds, "requests": sum(len(told.answers) for told in found.values())},
        spread={
            f"{figure}_{name}": spread_of(values)
            for name, told in found.items()
            for figure, values in (("mean_ttft_s", told.mean_ttft_s), ("cached_share", told.cached_share))
        },
        machine=this_machine(),
    )


def show(result: Result, console: Console) -> None:
    table = Table(title="Prompts that begin alike", title_justify="left")
    for column in ("dispatch", "cached", "mean TTFT ms", "p50", "p99", "requests", "errors"):
        table.add_column(column, justify="left" if column == "dispatch" else "right")
    for name, told in result.arms.items():
        share, *times, requests, errors = told.values()
        table.add_row(name, f"{share:.1%}", *(f"{value:.0f}" for value in times), str(requests), str(errors))
    console.print(table)
    for name, value in result.figures.items():
        console.print(f"{name} {value:.4g}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.prefix_affinity", description=(__doc__ or "").split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} round of {QUICK_DURATION_S:.0f} s an arm")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--rounds", type=int, help=f"rounds (default {ROUNDS})")
    parser.add_argument("--rate", type=float, default=RATE_PER_S, help=f"requests a second (default {RATE_PER_S})")
    parser.add_argument("--logs", type=Path, help="folder for what the instances print, instead of stderr")
    options = parser.parse_args()
    num_rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    duration_s = QUICK_DURATION_S if options.quick else DURATION_S
    if num_rounds < 1 or not 0.0 < options.rate <= 100.0:
        parser.error("--rounds is at least 1, --rate above 0 and at most 100")
    try:
        found = asyncio.run(rounds(num_rounds, duration_s, options.rate, options.logs))
    except FleetError as error:
        sys.stderr.write(f"bench.prefix_affinity: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    result = result_of(found, num_rounds)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    show(result, console)
    if options.json:
        write_result(options.json, result)
        console.print(f"result: {options.json}")
    return 0 if all(told.num_errors == 0 for told in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
