"""Do the figures say what happened, and does each broken bar give its reason?"""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from orchestrator.demo.answers import Answer, Move
from orchestrator.demo.options import Bars
from orchestrator.demo.summary import Passed, Summary, failures, summarise
from orchestrator.demo.tables import summary_table
from orchestrator.demo.watch import Drain

BARS = Bars(min_committed_migrations=2)


def answer(run: str, index: int, error: str | None = None) -> Answer:
    tokens = () if error else tuple(range(20))
    return Answer(
        index=index,
        request_id=f"{run}.{index:05d}",
        num_prompt_tokens=10,
        token_ids=tokens,
        received_s=tuple(0.01 * place for place in range(len(tokens))),
        finish_reason=None if error else "length",
        error=error,
        sent_s=0.0,
    )


def move(run: str, index: int, moved_tokens: int = 15, outcome: str = "committed") -> Move:
    return Move(
        migration_id=f"{index}-{moved_tokens}-{outcome}",
        request_id=f"cmpl-{run}.{index:05d}-0",
        source="instance-0",
        destination="instance-1",
        outcome=outcome,
        reason="",
        moved_tokens=moved_tokens,
        num_blocks=2,
        num_bytes=1000,
        stopped_s=0.002,
        ended_s=1.0,
    )


DRAIN = Drain("instance-0", 10.0, 11.5, 13.0, 9)


def good() -> tuple[Passed, Passed]:
    moved = Passed(
        answers=tuple(answer("a", index) for index in range(4)),
        moves=(move("a", 0), move("a", 1), move("a", 1, 18), move("a", 2, 5), move("a", 3, outcome="refused")),
        drains=(DRAIN,),
        took_s=20.0,
    )
    return moved, Passed(tuple(answer("b", index) for index in range(4)), (), (), 19.0)


def summary() -> Summary:
    return summarise(*good())


def test_a_good_run_breaks_no_bar() -> None:
    assert failures(summary(), BARS) == ()


def test_figures_count_only_committed_moves_of_running_requests() -> None:
    found = summary()
    figures = found.figures()
    assert figures["committed_migrations"] == 3
    assert figures["mismatched_tokens"] == 0
    assert figures["client_errors"] == 0
    assert figures["drain_s"] == pytest.approx(1.5)
    assert figures["downtime_p50_ms"] == pytest.approx(10.0)
    assert dict(found.outcomes) == {"committed": 4, "refused": 1}
    assert (found.num_blocks, found.num_bytes) == (8, 4000)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda m, u: (replace(m, moves=m.moves[:1]), u), "only 1 running requests"),
        (
            lambda m, u: (m, replace(u, answers=(replace(u.answers[0], token_ids=(9,)), *u.answers[1:]))),
            "tokens differ",
        ),
        (
            lambda m, u: (replace(m, answers=(answer("a", 0, "boom"), *m.answers[1:])), u),
            "1 requests failed; the first",
        ),
        (lambda m, u: (replace(m, drains=()), u), "no instance was drained"),
        (lambda m, u: (replace(m, drains=(replace(DRAIN, empty_s=None),)), u), "was not empty"),
        (lambda m, u: (replace(m, drains=(replace(DRAIN, empty_s=30.0),)), u), "took 20.0 s"),
        (lambda m, u: (m, replace(u, moves=(move("b", 0),))), "was to be undisturbed"),
        (lambda m, u: (m, replace(u, answers=u.answers[1:])), "could not be compared"),
    ],
)
def test_every_broken_bar_gives_its_reason(broken, reason: str) -> None:  # type: ignore[no-untyped-def]
    found = failures(summarise(*broken(*good())), BARS)
    assert len(found) >= 1
    assert any(reason in line for line in found)


def test_the_table_shows_what_the_issue_asks_for() -> None:
    console = Console(record=True, width=120)
    console.print(summary_table(summary()))
    text = console.export_text()
    for word in (
        "requests",
        "committed 4",
        "downtime",
        "decode steps",
        "KV blocks",
        "client errors",
        "mismatched",
        "empty in 1.50 s",
    ):
        assert word in text
