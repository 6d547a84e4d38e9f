"""Do classes of API keys and levels change all or not at all, and does everything reckon with them from then on?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from instance.lifecycle import State
from migration.types import InstanceId
from orchestrator.core import Orchestrator
from orchestrator.effects import (
    Answer,
    Effect,
    KeyClassSet,
    LevelSet,
    PolicyRefused,
    Refused,
    Result,
    SetPriority,
    UpdateMembers,
    UpdatePriorities,
)
from orchestrator.errors import RefusalKind
from orchestrator.events import (
    GatewayStarted,
    KeyClassRequested,
    LevelRequested,
    PriorityRequested,
    ReportReceived,
    Token,
)
from orchestrator.gateway.priorities import PriorityRules, key_digest
from orchestrator.policy.levels import MAX_PRIORITY, Level, parse_levels
from orchestrator.policy.load import LoadParams
from orchestrator.priority_classes import MAX_KEYS
from orchestrator.state import CoreParams
from tests.support.reports import load_report, request_load
from tests.unit.orchestrator.test_core import Play, started

A, B = InstanceId("instance-0"), InstanceId("instance-1")
CALLER, ASKED_BY = Token(1), "admin API SetKeyPriority"
VIP, BULK, NEW = (key_digest(name) for name in (b"vip", b"bulk", b"new"))
STARTED_WITH = CoreParams(key_classes=tuple(sorted([(VIP, -10), (BULK, 7)])))


@pytest.fixture
def play() -> Play:
    return Play(STARTED_WITH)


def set_key(play: Play, digest: str, level: str | None, etag: str = "", is_dry: bool = False) -> list[Effect]:
    return play.on(KeyClassRequested(CALLER, digest, level, ASKED_BY, etag, is_dry))


def set_level(play: Play, name: str, rank: int | None = None, blocks: int | None = None) -> list[Effect]:
    return play.on(LevelRequested(CALLER, name, rank, blocks, ASKED_BY))


def result_of(effects: list[Effect]) -> Result:
    (answer,) = [effect for effect in effects if isinstance(effect, Answer)]
    assert answer is effects[-1], "gateways are told before the caller"
    return answer.result


def told(effects: list[Effect]) -> UpdatePriorities:
    (update,) = [effect for effect in effects if isinstance(effect, UpdatePriorities)]
    return update


def test_a_key_gets_another_class_and_the_gateways_are_told_all_classes(play: Play) -> None:
    effects = set_key(play, BULK, "high")
    done = result_of(effects)
    assert isinstance(done, KeyClassSet) and (done.previous, done.priority) == (7, -10)
    assert done.change == f"key sha256:{BULK[:12]}... 7 -> high (-10)"
    update = told(effects)
    assert dict(update.key_classes) == {VIP: -10, BULK: -10}
    assert update.reason == f"asked for by {ASKED_BY}: {done.change}"
    assert not [effect for effect in effects if isinstance(effect, UpdateMembers)], "nobody's headroom has changed"
    rules = PriorityRules(update.levels, dict(update.key_classes))
    assert rules.asked({"authorization": "Bearer bulk"}).priority(0) == -10, "as a gateway reads them"


def test_a_new_key_gets_a_class_and_one_may_lose_it(play: Play) -> None:
    assert dict(told(set_key(play, NEW, "-3")).key_classes) == {VIP: -10, BULK: 7, NEW: -3}
    effects = set_key(play, VIP, None)
    done = result_of(effects)
    assert isinstance(done, KeyClassSet) and (done.previous, done.priority) == (-10, None)
    assert done.change.endswith("high (-10) -> none")
    assert dict(told(effects).key_classes) == {BULK: 7, NEW: -3}
    again = result_of(set_key(play, VIP, None))
    assert isinstance(again, Refused) and again.kind is RefusalKind.NOT_FOUND


def test_what_changes_nothing_is_done_and_tells_nobody(play: Play) -> None:
    effects = set_key(play, VIP, "high")
    done = result_of(effects)
    assert isinstance(done, KeyClassSet) and done.previous == done.priority == -10 and len(effects) == 1
    effects = set_level(play, "high", -10)
    assert isinstance(result_of(effects), LevelSet) and len(effects) == 1


def test_a_dry_run_says_what_would_be_and_changes_nothing(play: Play) -> None:
    before = play.core.priorities()
    effects = set_key(play, VIP, "low", is_dry=True)
    done = result_of(effects)
    assert isinstance(done, KeyClassSet) and done.priority == 10 and len(effects) == 1
    assert play.core.priorities() == before and done.etag != before.etag
    level = result_of(play.on(LevelRequested(CALLER, "high", -20, 5, ASKED_BY, "", True)))
    assert isinstance(level, LevelSet) and level.level == Level("high", -20, 5)
    assert play.core.priorities() == before


@pytest.mark.parametrize(
    ("digest", "level", "field"),
    [("vip", "high", "key_sha256"), (VIP.upper(), "high", "key_sha256"), (VIP, "urgent", "level"), (VIP, "", "level")],
)
def test_what_is_no_digest_or_no_level_is_refused_and_repeated_nowhere(
    play: Play, digest: str, level: str, field: str
) -> None:
    before = play.core.priorities()
    refused = result_of(set_key(play, digest, level))
    assert isinstance(refused, PolicyRefused)
    (violation,) = refused.violations
    assert violation.field == field and "urgent" not in violation.reason and "vip" not in violation.reason
    assert play.core.priorities() == before


def test_there_is_room_for_so_many_keys() -> None:
    keys = tuple((f"{number:064x}", 0) for number in range(MAX_KEYS))
    play = Play(CoreParams(key_classes=keys))
    refused = result_of(set_key(play, VIP, "high"))
    assert isinstance(refused, Refused) and refused.kind is RefusalKind.EXHAUSTED
    assert isinstance(result_of(set_key(play, keys[0][0], "high")), KeyClassSet), "one of them may change"


def test_a_change_on_old_knowledge_is_refused(play: Play) -> None:
    etag = play.core.priorities().etag
    done = result_of(set_key(play, NEW, "high", etag))
    assert isinstance(done, KeyClassSet) and done.etag == play.core.priorities().etag != etag
    refused = result_of(set_key(play, NEW, "low", etag))
    assert isinstance(refused, Refused) and refused.kind is RefusalKind.OVERTAKEN
    assert dict(play.core.priorities().key_classes)[NEW] == -10


def test_a_level_gets_another_rank_and_its_keys_follow_while_other_numbers_stay(play: Play) -> None:
    effects = set_level(play, "high", -50)
    done = result_of(effects)
    assert isinstance(done, LevelSet) and done.change == "level high rank -10, 0 blocks -> rank -50, 0 blocks"
    assert dict(told(effects).key_classes) == {VIP: -50, BULK: 7}
    play.reports(A, request_load("r1", priority=-10))
    (ask,) = play.on(PriorityRequested(Token(2), "r1", "high", "x"))
    assert isinstance(ask, SetPriority) and ask.priority == -50, "a change of a request knows the new rank"
    assert ask.reason.endswith("-10 -> high (-50)"), "what was there keeps its number"


def test_levels_are_in_the_order_of_their_ranks_after_a_change(play: Play) -> None:
    set_level(play, "low", -99)
    assert [level.name for level in play.core.priorities().levels.levels] == ["low", "high", "normal"]


def test_headroom_counts_from_now_on_in_every_decision_and_at_the_gateways(play: Play) -> None:
    running = load_report(A, step=5, free_blocks=600, num_running=1, running_by_priority=((-10, 1),))
    play.on(ReportReceived(running))
    before = play.core.snapshot(play.now_s).instances[0].freeness_steps
    effects = set_level(play, "high", blocks=300)
    (members,) = [effect for effect in effects if isinstance(effect, UpdateMembers)]
    assert members.dispatch.load == LoadParams(((-10, 300), (0, 0), (10, 0)))
    assert [one.state for one in members.members] == [State.SERVING] * 2
    after = play.core.snapshot(play.now_s).instances[0].freeness_steps
    assert before is not None and after is not None and before - after == 300 * 16
    set_level(play, "high", blocks=0)
    assert play.core.snapshot(play.now_s).instances[0].freeness_steps == before


def test_every_part_of_the_core_reckons_with_the_same_levels(play: Play) -> None:
    set_level(play, "normal", 3, 40)
    core: Orchestrator = play.core
    params: CoreParams = vars(core)["_params"]
    load = parse_levels("high:-10,normal:3:40,low:10").load_params
    assert params.levels.load_params == load
    assert [params.rebalance.load, params.drain.load, params.dispatch.load, params.scaling.autoscale.load] == [load] * 4
    assert vars(core)["_scaling"]._params.autoscale.load == load
    expected = replace(STARTED_WITH, levels=params.levels)
    untouched = (params.max_waiters, params.rebalance.margin_steps, params.scaling.most)
    assert untouched == (expected.max_waiters, expected.rebalance.margin_steps, expected.scaling.most)


@pytest.mark.parametrize(
    ("rank", "blocks", "fields"),
    [
        (None, None, ["rank"]),
        (0, None, ["rank"]),
        (MAX_PRIORITY + 1, None, ["rank"]),
        (None, -1, ["headroom_blocks"]),
        (10, 2**31, ["rank", "headroom_blocks"]),
    ],
)
def test_a_level_that_cannot_be_is_refused_with_each_reason(
    play: Play, rank: int | None, blocks: int | None, fields: list[str]
) -> None:
    before = play.core.priorities()
    refused = result_of(set_level(play, "high", rank, blocks))
    assert isinstance(refused, PolicyRefused) and [one.field for one in refused.violations] == fields
    assert play.core.priorities() == before


def test_a_level_that_is_not_there_is_not_found(play: Play) -> None:
    refused = result_of(set_level(play, "urgent", 4))
    assert isinstance(refused, Refused) and refused.kind is RefusalKind.NOT_FOUND and "high, normal" in refused.reason


def test_a_later_gateway_is_told_what_was_changed_before_it_came(play: Play) -> None:
    set_key(play, NEW, "high")
    set_level(play, "low", 20)
    for _ in range(2):  # the second takes the place of the first
        update = told(play.on(GatewayStarted("gateway-0", "kvferry-gateway-0", "http://127.0.0.1:8000")))
        assert dict(update.key_classes)[NEW] == -10 and [one.rank for one in update.levels.levels] == [-10, 0, 20]


def test_an_instance_that_starts_later_is_no_reason_to_tell_classes_again(play: Play) -> None:
    assert not [one for one in play.on(started(InstanceId("instance-7"))) if isinstance(one, UpdatePriorities)]
