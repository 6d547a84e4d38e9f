"""Does a fit to a journal give the step times back that made it, say what it cannot know, and make a twin?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import msgspec
import pytest

from instance.messages import LoadReport, StepTotals
from orchestrator import cli_simulate, cli_simulate_fit
from orchestrator.errors import ConfigError, JournalError
from orchestrator.events import ReportReceived
from orchestrator.journal.lines import Entry, Line, LineReader
from orchestrator.policy.columns import Rule
from orchestrator.sim.arms import ARMS, Arm
from orchestrator.sim.arrivals import Arrival, Lived
from orchestrator.sim.fitting import Fit, fitted
from orchestrator.sim.jumping_loop import run_jumping
from orchestrator.sim.lengths import LengthConfig
from orchestrator.sim.observed import Observed, observed
from orchestrator.sim.steptime import Attention, StepTimes
from orchestrator.sim.twin import twin_of, written
from orchestrator.sim.workload import Zipf, gamma_times, generated
from orchestrator.sim.world import World, WorldParams

KVFERRY = str(Path(sys.executable).with_name("kvferry"))
ENGINE = LengthConfig(
    num_blocks=900, block_size=16, max_model_len=14_400, max_num_seqs=48, max_num_batched_tokens=1024,
    bytes_per_token=4_096,
)  # fmt: skip
FAST = StepTimes(
    base_s=4e-3,
    token_s=60e-6,
    bend_tokens=256,
    bent_token_s=40e-6,
    attention=Attention(sequence_s=90e-6, context_s=0.2e-6, square_s=15e-9, cross_s=30e-9),
)
DEAR_PROMPTS = StepTimes(
    base_s=11e-3,
    token_s=50e-6,
    bend_tokens=256,
    bent_token_s=0.0,
    attention=Attention(context_s=0.9e-6, token_s=150e-6, square_s=50e-9, cross_s=100e-9),
)
LONG, SHORT = Zipf(mean=400, alpha=1.2, cap=3_000), Zipf(mean=90, alpha=1.5, cap=900)
STEP_LIKE = [
    ((), 1, 40),
    ((), 20, 9_000),
    (((200, 0),), 0, 0),
    (((1024, 2000),), 3, 700),
    (((600, 0), (300, 0)), 10, 5_000),
]


def asked(seed: int, prompts: Zipf, answers: Zipf, requests_per_s: float, count: int) -> list[Arrival]:
    rng = Random(seed)
    arrivals = generated(rng, prompts, answers, gamma_times(rng, requests_per_s, 1.5), count)
    return [replace(one, max_tokens=one.num_answer) for one in arrivals]


def play(params: WorldParams, arrivals: Sequence[Arrival]) -> tuple[list[Lived], bytes]:
    async def day() -> tuple[list[Lived], bytes]:
        world = World(params)
        lived = await world.play(arrivals)
        return lived, world.journal.text() if world.journal is not None else b""

    return run_jumping(day())


@cache
def journal_of(times: StepTimes, prompts: Zipf = LONG, arm: str = "dispatch", seed: int = 1) -> bytes:
    params = WorldParams(engine=ENGINE, times=times, arm=ARMS[arm], keeps_journal=True)
    return play(params, asked(seed, prompts, SHORT, 6.0, 250))[1]


def lines(text: bytes) -> list[Line]:
    reader = LineReader()
    return [reader.read(line) for line in text.splitlines()]


def fit_of(text: bytes) -> tuple[Fit, Observed]:
    seen = observed(lines(text))
    return fitted(seen), seen


@pytest.mark.parametrize("times", [FAST, DEAR_PROMPTS], ids=["fast", "dear prompts"])
def test_the_step_times_that_made_a_journal_come_back(times: StepTimes) -> None:
    fit, seen = fit_of(journal_of(times))
    for step in STEP_LIKE:
        assert fit.times.step_s(*step) == pytest.approx(times.step_s(*step), rel=0.03), step
    found = {term.name: term.seconds for term in fit.terms}
    assert found["base"] == pytest.approx(times.base_s, rel=0.02)
    assert found["prompt"] == pytest.approx(times.token_s + times.attention.token_s, rel=0.1)
    assert found["sequence"] == pytest.approx(times.token_s + times.attention.sequence_s, rel=0.1)
    assert found["context"] == pytest.approx(times.attention.context_s, rel=0.05)
    assert found["pair"] == pytest.approx(times.attention.cross_s, rel=0.1)
    assert found["wide"] == pytest.approx(times.bent_token_s, rel=0.1, abs=3e-6)
    assert fit.p95_error < 1e-3 and fit.stalled_share == 0.0 and not fit.warnings
    assert fit.between_s < 0.02 * times.base_s
    assert seen.engine == replace(ENGINE, bytes_per_token=LengthConfig().bytes_per_token)
    assert (seen.num_instances, seen.num_gateways) == (2, 1)


def test_other_step_times_give_another_fit() -> None:
    one, other = (fit_of(journal_of(times))[0] for times in (FAST, DEAR_PROMPTS))
    assert one.times.base_s < 0.5 * other.times.base_s
    with pytest.raises(AssertionError):
        for step in STEP_LIKE:
            assert one.times.step_s(*step) == pytest.approx(DEAR_PROMPTS.step_s(*step), rel=0.03)


def test_the_twin_foretells_a_day_it_was_not_fitted_to(tmp_path: Path) -> None:
    """Other lengths, another rate, and through the file."""
    fit, seen = fit_of(journal_of(FAST))
    (tmp_path / "fit.json").write_text(json.dumps(written(fit, seen, "somewhere"), allow_nan=False))
    twin = twin_of(json.loads((tmp_path / "fit.json").read_text()))
    assert twin.times.base_s == pytest.approx(fit.times.base_s, rel=1e-12)
    day = asked(2, SHORT, Zipf(200, 1.2, 1_500), 11.0, 300)
    means = []
    for times, engine in ((FAST, ENGINE), (twin.times, twin.engine)):
        lived, _ = play(WorldParams(engine=engine, times=times, arm=ARMS["dispatch"]), day)
        means.append(sum(one.latency_s for one in lived))
    assert means[1] == pytest.approx(means[0], rel=0.03)


def test_bytes_of_a_token_are_known_once_something_moved() -> None:
    skewed = Arm("skewed", "each in turn, evened by moves", rule=Rule.ROUND_ROBIN)
    tight = replace(ENGINE, num_blocks=200, max_model_len=3_200)
    params = WorldParams(engine=tight, times=FAST, arm=skewed, keeps_journal=True)
    _, seen = fit_of(play(params, asked(3, SHORT, Zipf(200, 1.2, 1_500), 11.0, 300))[1])
    assert seen.engine.bytes_per_token == ENGINE.bytes_per_token


# ---------------------------------------------------------------------- what a run cannot tell
def test_prompts_of_one_length_leave_tokens_and_pairs_apart_unknown() -> None:
    """Every prompt has 160 tokens: so many pairs come with each token, always."""
    arrivals = [replace(one, num_prompt=160) for one in asked(4, SHORT, SHORT, 6.0, 250)]
    params = WorldParams(engine=ENGINE, times=FAST, arm=ARMS["dispatch"], keeps_journal=True)
    fit, _ = fit_of(play(params, arrivals)[1])
    assert any(warning.startswith("pair: known to +-") for warning in fit.warnings), fit.warnings
    assert any(warning.startswith("prompt: known to +-") for warning in fit.warnings), fit.warnings
    assert not any(warning.startswith(("base", "sequence", "context")) for warning in fit.warnings), fit.warnings
    assert fit.times.step_s([(160, 0)], 5, 900) == pytest.approx(FAST.step_s([(160, 0)], 5, 900), rel=0.03)


def test_a_term_that_never_came_is_said_to_be_unknown() -> None:
    """One request at a time, and no step has more than 256 tokens."""
    arrivals = [Arrival(index, 2.0 * index, 30 + index, 60, 60) for index in range(80)]
    params = WorldParams(engine=ENGINE, times=FAST, arm=ARMS["dispatch"], keeps_journal=True)
    fit, _ = fit_of(play(params, arrivals)[1])
    assert "wide: the run has nothing of it, so it is taken for 0; longer prompts would tell" in fit.warnings
    assert fit.times.bent_token_s == 0.0


def test_a_stall_moves_nothing_much_and_is_told() -> None:
    seen = observed(lines(journal_of(FAST)))
    number = len(seen.windows) // 2
    stalled = replace(seen.windows[number], work=replace(seen.windows[number].work, seconds=30.0))
    fit = fitted(replace(seen, windows=(*seen.windows[:number], stalled, *seen.windows[number + 1 :])))
    assert fit.times.step_s((), 8, 3_000) == pytest.approx(FAST.step_s((), 8, 3_000), rel=0.03)
    assert fit.stalled_share == pytest.approx(30.0 / fit.busy_s)


# ---------------------------------------------------------------------- windows
IDLE = LoadReport("i", 1, 0, "serving", 16, 900, 900, 0, 0, 0, (), 0, 0, 0.0, 0, 0, 0)


def entry(now_s: float, num_running: int, num_steps: int, busy_s: float, epoch: int = 1) -> Entry:
    """Of steps that decode ten requests."""
    tokens = 10 * num_steps
    steps = StepTotals(num_steps, 0, tokens, 0, tokens, 100 * tokens, 0, busy_s)
    report = msgspec.structs.replace(IDLE, epoch=epoch, num_running=num_running, steps=steps)
    return Entry(now_s, "", ReportReceived(report))


def windows(*entries: Entry) -> list[tuple[float, float, float, bool]]:
    """(steps, busy ms, ms by the clock, whether it was busy all the time)"""
    return [
        (one.work.terms[0], round(1e3 * one.work.seconds), round(1e3 * one.wall_s), one.was_busy)
        for one in observed(entries).windows
    ]


def test_a_step_longer_than_the_time_between_reports_is_one_window() -> None:
    told = (entry(0.0, 10, 5, 1.0), entry(0.1, 10, 5, 1.0), entry(0.2, 10, 5, 1.0), entry(0.3, 10, 6, 1.25))
    assert windows(*told) == [(1, 250, 300, True)]


def test_a_pause_is_told_from_work() -> None:
    told = (entry(0.0, 10, 5, 1.0), entry(0.1, 0, 5, 1.0), entry(0.2, 10, 5, 1.0), entry(0.3, 10, 6, 1.25))
    assert [is_busy for *_, is_busy in windows(*told, entry(0.4, 10, 7, 1.35))] == [False, True]


def test_each_incarnation_counts_from_its_own_beginning() -> None:
    told = (entry(0.0, 10, 50, 1.0), entry(0.1, 10, 60, 1.1), entry(9.0, 10, 4, 0.4, epoch=2))
    assert windows(*told, entry(9.2, 10, 6, 0.5, epoch=2)) == [
        (10, 100, 100, True),
        (2, 100, 200, True),
    ]
    assert windows(*told, entry(9.2, 10, 99, 99.0, epoch=3))[1:] == [], "nothing lies between two incarnations"


# ---------------------------------------------------------------------- on the command line
def kvferry(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([KVFERRY, "simulate", *words], capture_output=True, text=True, check=False)


def test_a_journal_is_fitted_and_its_twin_is_asked(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(journal_of(FAST))
    told = kvferry("fit", str(tmp_path / "journal"), "--json", str(tmp_path / "fit.json"))
    assert told.returncode == 0, told.stderr
    assert "2 instances of 900 blocks of 16 tokens, 48 requests and 1,024 tokens a step at most" in told.stdout
    assert "base           4000 us" in told.stdout and "not told" not in told.stdout
    asked_for = ("--requests", "60", "--rate", "4", "--arm", "dispatch", "--json", str(tmp_path / "days.json"))
    told = kvferry("compare", "--twin", str(tmp_path / "fit.json"), *asked_for)
    assert told.returncode == 0, told.stderr
    question = json.loads((tmp_path / "days.json").read_text())["question"]
    assert (question["num_instances"], question["engine"]["num_blocks"]) == (2, 900)
    assert question["times"]["base_s"] == pytest.approx(FAST.base_s, rel=0.02)
    one = kvferry("fit", str(tmp_path / "journal"), "--instance", "instance-1")
    assert one.returncode == 0 and one.stdout.startswith("1 instance of 900 blocks")


def test_what_is_no_journal_or_too_short_is_named(tmp_path: Path) -> None:
    text = journal_of(FAST).splitlines(keepends=True)
    (tmp_path / "other").write_text("{}\n")
    (tmp_path / "short").write_bytes(b"".join(text[:60]))
    (tmp_path / "head").write_bytes(text[0])
    small = replace(ENGINE, num_blocks=100, max_model_len=1_600)
    fit, seen = fit_of(journal_of(FAST))
    (tmp_path / "small.json").write_text(json.dumps(written(fit, replace(seen, engine=small), "somewhere")))
    for name, instance, why in (
        ("missing", None, r"there is no file .*missing"),
        ("other", None, "is not a journal of kvferry"),
        ("head", None, "head: no report in it tells of steps"),
        ("short", None, "short: its reports tell of steps .* let the run be longer"),
        ("short", "x", "no report of 'x' in it; there: instance-0, instance-1"),
    ):
        with pytest.raises((ConfigError, JournalError), match=why):
            cli_simulate_fit.fit(tmp_path / name, instance)
    with pytest.raises(ConfigError, match=r"--json: there is no folder .*nowhere"):
        cli_simulate_fit.fit(tmp_path / "short", out=tmp_path / "nowhere" / "fit.json")
    for name, why in (
        ("other", "other: it is no fit of this version: make one with"),
        ("head", "head: it is no fit of this version: make one with"),
        ("missing", "No such file"),
        ("small.json", "its instances hold 1,600 tokens"),
    ):
        with pytest.raises(ConfigError, match=why):
            cli_simulate.compare(twin=tmp_path / name)
    with pytest.raises(ConfigError, match="leave --profiles out"):
        cli_simulate.compare(twin=tmp_path / "small.json", profiles=tmp_path / "other")
    told = kvferry("fit", str(tmp_path / "head"))
    assert (told.returncode, "Traceback" in told.stderr) == (2, False), told.stderr


def test_instances_of_several_sizes_are_fitted_one_by_one() -> None:
    seen = lines(journal_of(FAST))
    assert observed(seen, "instance-0").num_instances == 1
    for line in seen:
        if (
            isinstance(line, Entry)
            and isinstance(line.event, ReportReceived)
            and line.event.report.instance == "instance-1"
        ):
            object.__setattr__(line.event, "report", msgspec.structs.replace(line.event.report, total_blocks=7))
    with pytest.raises(ConfigError, match=r"instance-1 \(7 blocks\); choose one with --instance"):
        observed(seen)
    assert observed(seen, "instance-1").engine.num_blocks == 7
