"""Whoever is chosen from the shortlist is whom all columns would choose, in whatever fleet and to the last bit."""

from __future__ import annotations

import random

import pytest

from instance.messages import LoadReport
from migration.types import Epoch, InstanceId
from orchestrator.policy.columns import Columns
from orchestrator.policy.dispatch import Choice, DispatchBook, DispatchParams
from orchestrator.policy.shortlist import MAX_LISTED
from tests.support.idle_report import report
from tests.support.slow_dispatch import choose_instance

NUM_MEMBERS = MAX_LISTED + 60
NAMES = [InstanceId(f"i{number:03}") for number in range(NUM_MEMBERS)]
NUM_STEPS = 400
COLD = DispatchParams()
WARM = DispatchParams(slow_start_s=0.0)


def uneven(rng: random.Random, name: str, step: int) -> LoadReport:
    return loaded(name, step, rng.randint(0, 1_000), rng.randint(0, 60))


def even(rng: random.Random, name: str, step: int) -> LoadReport:
    return loaded(name, step, rng.randint(495, 505), 20)


def idle(_: random.Random, name: str, step: int) -> LoadReport:
    return loaded(name, step, 1_000, 0)


def full(rng: random.Random, name: str, step: int) -> LoadReport:
    return loaded(name, step, rng.randint(0, 20), 50, rng.randint(1, 40))


def loaded(name: str, step: int, free: int, running: int, waiting: int = 0) -> LoadReport:
    return report(
        name,
        step=step,
        total_blocks=1_000,
        free_blocks=free,
        num_running=running,
        step_time_s=0.03,
        head_of_line_blocks=min(waiting, 10),
        waiting_blocks=waiting,
    )


FLEETS = {"uneven": uneven, "even": even, "idle": idle, "full": full}


@pytest.mark.parametrize("params", [COLD, WARM], ids=["cold", "warm"])
@pytest.mark.parametrize("fleet", FLEETS)
def test_the_shortlist_names_whoever_has_the_highest_of_all_scores(fleet: str, params: DispatchParams) -> None:
    """Members come in one by one, get requests, report again, or fall silent, while time passes."""
    rng = random.Random(f"{fleet} 20261122")
    book = DispatchBook(params)
    book.set_members([(name, Epoch(1)) for name in NAMES])
    now_s, num_found = 0.0, 0
    for step in range(NUM_STEPS):
        reporting = NAMES[step % NUM_MEMBERS :][:1] if step < NUM_MEMBERS else rng.sample(NAMES, rng.randint(0, 40))
        for name in reporting:
            book.on_report(FLEETS[fleet](rng, name, step), now_s)
        demand = rng.choice([0, 1, 50, 400, 990, 1_001])
        num_found += is_found(book._columns, demand, now_s)
        choice = book.choose(demand, now_s)
        if isinstance(choice, Choice):
            if step % 10 == 0:
                assert choice == choose_instance(book.view(now_s), demand, params)
            book.on_dispatched(choice.instance, demand, now_s)
        now_s += rng.choice([0.0, 0.0, 0.001, 0.01, 0.05])
        if step % 20 == 0:
            book.check_integrity()
    assert num_found > 0, "somebody is found"
    assert num_found < NUM_STEPS, "and not always"


def is_found(columns: Columns, demand: int, now_s: float) -> bool:
    columns.expire(now_s)
    columns._num_unasked = 0
    highest = columns.highest(demand, now_s)
    if highest is None:
        return False
    scores = columns.scores(demand, now_s)
    assert highest.score == scores.max()
    assert highest.rows == (scores == scores.max()).nonzero()[0].tolist()
    return True


def test_without_a_share_in_the_first_instant_it_is_not_divided_by() -> None:
    book = DispatchBook(DispatchParams(slow_start_share=0.0))
    book.set_members([(name, Epoch(1)) for name in NAMES[:2]])
    for name in NAMES[:2]:
        book.on_report(loaded(name, 0, 500, 10), 1.0)
    book.on_dispatched(NAMES[0], 10, 1.0)
    assert isinstance(chosen := book.choose(10, 1.0), Choice) and chosen.instance == NAMES[1], "by what was dispatched"


def test_control_a_row_that_the_shortlist_leaves_out_is_noticed() -> None:
    book = DispatchBook(WARM)
    book.set_members([(name, Epoch(1)) for name in NAMES])
    for number, name in enumerate(NAMES):
        book.on_report(loaded(name, 0, number, 10), 0.0)
    assert isinstance(book.choose(1, 0.0), Choice)
    book.check_integrity()
    shortlist = book._columns._shortlist
    _, row, _ = shortlist._listed.pop()
    del shortlist._bounds[row]
    with pytest.raises(AssertionError, match="somebody is left out"):
        book.check_integrity()
    assert isinstance(chosen := book.choose(1, 0.0), Choice) and chosen.instance == NAMES[-2]
