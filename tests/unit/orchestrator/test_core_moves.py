"""Which requests does the core move, on command and on its ticks, and which does it leave alone?"""

from __future__ import annotations

import pytest

from migration.types import Outcome
from orchestrator.effects import (
    Effect,
    MigrationFinished,
)
from orchestrator.errors import RefusalKind
from orchestrator.events import (
    DrainRequested,
    MigrateRequested,
    MigrationFigures,
    ReportReceived,
    RequestsReceived,
    Ticked,
    Token,
)
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load, request_report
from tests.unit.orchestrator.test_core import CALLER, A, B, C, Play, answer, refusal, starts


# ---------------------------------------------------------------------- migrate on command
@pytest.mark.parametrize("reference", ["cmpl-abc-1", "mine", "cmpl-a", "mi"])
def test_a_request_is_found_by_its_id_the_clients_id_or_a_prefix(reference: str) -> None:
    play = Play()
    play.reports(A, request_load("cmpl-abc-1", external_id="mine"), request_load("cmpl-xyz-1", external_id="yours"))
    (move,) = starts(play.on(MigrateRequested(CALLER, reference, B, "blocking")))
    assert (move.request_id, move.mode, move.reason) == ("cmpl-abc-1", "blocking", "asked for")
    result = answer(play.ends(move.number))
    assert isinstance(result, MigrationFinished) and result.record.outcome is Outcome.COMMITTED


def test_a_name_that_fits_several_requests_is_ambiguous_unless_it_fits_one_exactly() -> None:
    play = Play()
    play.reports(A, request_load("r1"), request_load("r12"))
    assert refusal(play.on(MigrateRequested(CALLER, "r", B))).kind is RefusalKind.AMBIGUOUS
    (move,) = starts(play.on(MigrateRequested(CALLER, "r1", B)))
    assert move.request_id == "r1"


def test_a_request_that_both_sides_list_after_a_hand_over_is_where_the_later_report_says() -> None:
    play = Play()
    play.reports(A, request_load("r1"))
    play.reports(B, request_load("r1"))
    (move,) = starts(play.on(MigrateRequested(CALLER, "r1", A)))
    assert move.source.instance == B


def test_commands_that_the_state_forbids_are_refused_with_their_reason() -> None:
    play = Play(instances=(A, B, C))
    play.reports(A, request_load("r1"), request_load("fixed", movable=False))
    play.on(DrainRequested(Token(9), C, wait=False))
    cases = {"r1": (A, "already"), "fixed": (B, "cannot be moved"), "r": (C, "draining")}
    for reference, (destination, words) in cases.items():
        found = refusal(play.on(MigrateRequested(CALLER, reference, destination)))
        assert found.kind is RefusalKind.PRECONDITION and words in found.reason
    assert refusal(play.on(MigrateRequested(CALLER, "nobody", B))).kind is RefusalKind.NOT_FOUND
    assert refusal(play.on(MigrateRequested(CALLER, "", B))).kind is RefusalKind.NOT_FOUND
    assert starts(play.on(MigrateRequested(CALLER, "r1", B)))
    assert "on the move" in refusal(play.on(MigrateRequested(CALLER, "r1", B))).reason


def test_migrations_are_bounded_per_instance() -> None:
    play = Play()
    play.reports(A, *(request_load(f"r{number}") for number in range(3)))
    play.on(MigrateRequested(Token(2), "r0", B))
    play.on(MigrateRequested(Token(3), "r1", B))
    assert refusal(play.on(MigrateRequested(CALLER, "r2", B))).kind is RefusalKind.EXHAUSTED


def test_an_end_without_a_known_start_changes_nothing() -> None:
    assert Play().ends(17) == []


def test_the_history_is_bounded_and_shows_the_latest_first() -> None:
    play = Play(CoreParams(max_history=2))
    play.reports(A, request_load("r1"))
    for number in (1, 2, 3):
        play.on(MigrateRequested(Token(number), "r1", B))
        play.ends(number, Outcome.REFUSED)
    assert [record.number for record in play.core.snapshot(play.now_s).migrations] == [3, 2]


# ---------------------------------------------------------------------- rebalance on ticks
def crowded(play: Play) -> list[Effect]:
    """A is nearly full with small requests, B is empty."""
    return play.reports(A, *(request_load(f"r{number:02}", num_blocks=32) for number in range(30)))


def test_a_tick_moves_requests_from_a_full_instance_to_a_free_one_within_the_limits() -> None:
    play = Play()
    crowded(play)
    moves = starts(play.on(Ticked()))
    assert [(move.source.instance, move.destination.instance) for move in moves] == [(A, B), (A, B)]
    assert all(move.reason.startswith("rebalance") and move.signal_age_s < 1 for move in moves)
    assert play.on(Ticked()) == [], "two migrations out of one instance are enough"


def test_without_rebalancing_only_commands_move_requests() -> None:
    play = Play(CoreParams(is_rebalancing=False))
    crowded(play)
    assert play.on(Ticked()) == []


def test_an_old_report_moves_nothing() -> None:
    play = Play()
    crowded(play)
    play.now_s += 1.6
    assert play.on(Ticked()) == []


def test_a_pair_rests_after_a_refusal_and_is_tried_again_later() -> None:
    play = Play()
    crowded(play)
    for move in starts(play.on(Ticked())):
        play.ends(move.number, Outcome.REFUSED)
    assert play.on(Ticked()) == []
    play.now_s += 6
    crowded(play)
    play.reports(B)
    assert starts(play.on(Ticked()))


def test_no_pair_rests_because_a_request_ended_on_its_way() -> None:
    play = Play()
    crowded(play)
    first = starts(play.on(Ticked()))
    for move in first:
        play.ends(move.number, Outcome.FINISHED_AT_SOURCE)
    later = starts(play.on(Ticked()))
    assert {(move.source, move.destination) for move in later} & {(move.source, move.destination) for move in first}


def test_a_moved_request_rests() -> None:
    play = Play()
    crowded(play)
    first = starts(play.on(Ticked()))
    for move in first:
        play.ends(move.number)
    crowded(play)  # as if the reports were late and still listed them
    later = starts(play.on(Ticked()))
    assert later and not {move.request_id for move in first} & {move.request_id for move in later}


def test_a_request_that_is_nearly_done_is_not_moved_once_copies_are_known_to_take_longer() -> None:
    """Steps of 10 ms; a block has taken 5 ms, so 32 blocks take 16 steps, and 31 more tokens are too few for them."""
    play = Play()
    crowded(play)
    first = starts(play.on(Ticked()))
    for move in first:
        play.ends(move.number, figures=MigrationFigures(copied_blocks=30, tail_blocks=2, duration_s=0.16))
    play.now_s += 11
    owned = [request_load(f"s{n:02}", 32, num_output_tokens=1000 - left) for n, left in enumerate([31] * 29 + [32])]
    play.reports(A, *owned)
    play.reports(B)
    assert [move.request_id for move in starts(play.on(Ticked()))] == ["s29"]


def test_a_blocked_head_of_the_queue_makes_room_for_itself() -> None:
    play = Play()
    play.on(
        ReportReceived(load_report(A, step=9, free_blocks=300, num_running=7, num_waiting=1, head_of_line_blocks=350))
    )
    requests = [request_load(f"r{number}", num_blocks=100) for number in range(7)]
    play.on(RequestsReceived(request_report(A, *requests)))
    (move, *_) = starts(play.on(Ticked()))
    assert move.reason.startswith("defragment") and move.source.instance == A
