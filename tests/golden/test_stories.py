"""Does each migration still go as it is written down? One trace a story; `make golden` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from migration import effects as ef
from migration.params import MigrationParams, Mode
from migration.table import DestinationState, SourceState
from tests.support.protocol_story import Happening, Plot, What, mode, tell

S = SourceState
D = DestinationState
FOLDER = Path(__file__).parent
SHORT = MigrationParams(lease_s=1.0, commit_retry_s=0.4)

STORIES = {
    "live": Plot(),
    "blocking": mode(Mode.BLOCKING),
    "recompute": mode(Mode.RECOMPUTE),
    "growing": Plot(held_slack_blocks=0),
    "full_when_reserving": Plot(num_free_blocks=5),
    "full_when_growing": Plot(num_free_blocks=7, held_slack_blocks=0),
    "destination_drains": Plot(refuses=((ef.HoldBlocks, "the instance drains"),)),
    "preempted_while_copying": Plot(happenings=(Happening(What.PREEMPTED, S.COPYING),)),
    "finished_before_the_stop": Plot(happenings=(Happening(What.FINISHES, S.STOPPING),)),
    "client_leaves_while_copying": Plot(happenings=(Happening(What.CLIENT_LEAVES, S.COPYING),)),
    "client_leaves_while_committing": Plot(happenings=(Happening(What.CLIENT_LEAVES, D.COMMITTING),)),
    "commit_answer_lost": Plot(loses=(("Committed", 2),)),
    "destination_dies_before_the_commit": Plot(happenings=(Happening(What.DESTINATION_DIES, S.COPYING),)),
    "destination_dies_after_the_commit": Plot(
        SHORT, loses=(("Committed", 1),), happenings=(Happening(What.DESTINATION_DIES, D.COMMITTED),)
    ),
    "source_dies_while_copying": Plot(happenings=(Happening(What.SOURCE_DIES, S.COPYING),)),
    "source_dies_after_the_commit": Plot(happenings=(Happening(What.SOURCE_DIES, D.COMMITTED),)),
    "lease_expires_before_the_commit": Plot(SHORT, loses=(("Commit", 3),)),
    "called_off": Plot(happenings=(Happening(What.CALLED_OFF, S.COPYING_TAIL),)),
    "grammar_not_ready_in_time": Plot(MigrationParams(deadline_s=1.2), ready_after_s=5.0),
    "reserve_never_arrives": Plot(loses=(("Reserve", 99),)),
}


@pytest.mark.parametrize(("name", "plot"), STORIES.items(), ids=STORIES.keys())
def test_it_goes_as_written(name: str, plot: Plot, is_rewriting_golden: bool) -> None:
    told = tell(plot)
    path = FOLDER / f"{name}.txt"
    if is_rewriting_golden:
        path.write_text(told)
    assert path.exists(), "not written yet: make golden"
    assert told == path.read_text()


def test_there_is_a_story_for_every_trace() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == STORIES.keys()


def test_a_story_told_twice_is_the_same_and_another_is_not() -> None:
    assert tell(STORIES["live"]) == tell(STORIES["live"]) != tell(STORIES["blocking"])


def test_every_happening_of_a_story_takes_place() -> None:
    for name, plot in STORIES.items():
        told = tell(plot)
        for happening in plot.happenings:
            assert f"world        {happening.what.value}" in told, name


@pytest.mark.parametrize(("name", "plot"), STORIES.items(), ids=STORIES.keys())
def test_no_story_ends_with_blocks_held_or_a_request_stopped(name: str, plot: Plot) -> None:
    told = tell(plot)
    assert told.endswith("blocks held: 0\n") and "of the request: stopped" not in told, name
