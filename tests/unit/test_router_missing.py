"""What becomes of a request that no instance has any more, and of which no word came? Its last frames were lost.

Found by seeds 11 and 25 of the chaos in virtual time (`tests/simulation/test_chaos.py`): clients waited for ever.
"""

from __future__ import annotations

from instance.messages import OwnerChanged, RequestLoad, RequestReport, Subscribe
from instance.report import MAX_REPORTED_REQUESTS
from orchestrator.gateway.types import Effect, Send
from tests.unit.test_router import Desk, aborted_at, failures, submitted_to, token, wire_ids


def listed(name: str, *request_ids: str) -> RequestReport:
    loads = (RequestLoad(one, "ext", "running", 0, 31, 1, 8, 2, 0.0, True) for one in request_ids)
    return RequestReport(name, 1, 0, tuple(loads))


def wants_lists(effects: list[Effect]) -> bool:
    return any(
        isinstance(one, Send) and isinstance(one.message, Subscribe) and one.message.with_requests for one in effects
    )


def silent(desk: Desk, seconds: float = 25.0) -> list[Effect]:
    """Time passes in which instances report their load, and nobody says a word of any request."""
    effects = []
    for _ in range(int(seconds)):
        effects += desk.after(1.0)
    return effects


def begun(names: str = "ab", num_tokens: int = 1) -> Desk:
    desk = Desk(names)
    desk.submit()
    desk.answers("a")
    for offset in range(num_tokens):
        desk.frame("a", token(offset))
    return desk


def test_a_request_whose_end_was_lost_is_looked_for_and_its_end_is_made_anew() -> None:
    """1. a runs it to its end. 2. The frame with the end is lost. 3. No later token shows the gap."""
    desk = begun()
    assert silent(desk) == []
    for _ in range(2):
        desk.says(listed("a", "another"))
        desk.says(listed("b"))
    effects = desk.after(0.05)
    assert failures(effects) == [] and wire_ids(effects) == ["r~2"]
    assert sorted(aborted_at(effects)) == ["a", "b"], "should it be somewhere all the same"


def test_the_end_of_a_request_that_moved_unheard_and_ended_there_is_made_anew() -> None:
    """1. a runs it. 2. b commits; nothing passes from b to the gateway. 3. It ends at b. 4. b is heard again."""
    desk = begun()
    for _ in range(9):
        desk.after(1.0, heard="a")
    assert silent(desk) == []
    for _ in range(2):
        desk.says(listed("b"))
        desk.says(listed("a"))
    effects = desk.after(0.05)
    assert failures(effects) == [] and wire_ids(effects) == ["r~2"]


def test_a_request_without_tokens_that_nobody_has_starts_anew() -> None:
    desk = begun(num_tokens=0)
    silent(desk)
    for _ in range(2):
        desk.says(listed("a"))
        desk.says(listed("b"))
    effects = desk.after(0.05)
    assert failures(effects) == [] and wire_ids(effects) == ["r~2"] and len(submitted_to(effects)) == 1


def test_lists_are_asked_for_only_while_a_request_is_silent() -> None:
    desk = begun()
    asked = []
    for second in range(40):
        desk.now_s += 1.0
        for name in "ab":
            desk.says(desk.report(name))
        if second < 5:
            desk.frame("a", token(second + 1))
        asked.append(wants_lists(desk.checked(desk.router.tick(desk.now_s))))
        if asked[-1]:
            desk.says(listed("a", "r"))
    assert not any(asked[:14]), "it has been silent for less than two looks"
    assert sum(asked) == 2, "found at once, and looked for again at a later look"


def test_one_that_an_instance_lists_goes_on_however_long_it_is_silent() -> None:
    desk = begun()
    for _ in range(10):
        silent(desk)
        for _ in range(3):
            desk.says(listed("b"))
            desk.says(listed("a", "r"))
    assert desk.router.num_requests == 1
    assert desk.frame("a", token(1))


def test_while_one_instance_has_not_said_what_it_has_nothing_is_concluded() -> None:
    desk = begun()
    silent(desk)
    for _ in range(5):
        desk.says(listed("a"))
    assert desk.after(0.05) == []


def test_one_look_of_each_is_not_enough() -> None:
    """1. b says what it has. 2. The request moves to b. 3. a says what it has."""
    desk = begun()
    silent(desk)
    desk.says(listed("b"))
    desk.says(listed("a"))
    assert desk.after(0.05) == []
    desk.says(listed("b", "r"))
    desk.says(listed("a"))
    desk.says(listed("a"))
    assert desk.after(0.05) == [] and desk.router.num_requests == 1


def test_a_word_of_it_while_it_is_looked_for_is_enough() -> None:
    desk = begun()
    silent(desk)
    desk.says(listed("b"))
    desk.says(listed("a"))
    desk.says(OwnerChanged("r", "b", 1, 1))
    desk.says(listed("b"))
    desk.says(listed("a"))
    assert desk.after(0.05) == [] and desk.router.num_requests == 1


def test_a_list_that_is_cut_off_says_nothing_of_what_it_leaves_out() -> None:
    desk = begun()
    silent(desk)
    many = [f"other-{number}" for number in range(MAX_REPORTED_REQUESTS)]
    for _ in range(3):
        desk.says(listed("b"))
        desk.says(listed("a", *many))
    assert desk.after(0.05) == [] and desk.router.num_requests == 1


def test_a_submission_that_was_lost_is_made_anew_though_later_ones_were_seen() -> None:
    """1. `r` is lost on its way to a. 2. Later ones arrive: a has seen a higher sequence than that of `r`. 3. a has it
    not, nor has b."""
    desk = Desk(unanswered_though_seen_for_s=120.0)
    assert submitted_to(desk.submit()) == ["a"]
    for _ in range(25):
        desk.now_s += 1.0
        desk.says(desk.report("a", submits_seen=9))
        desk.says(desk.report("b"))
        assert desk.checked(desk.router.tick(desk.now_s)) != [], "subscriptions"
    for _ in range(2):
        desk.says(listed("a"))
        desk.says(listed("b"))
    effects = desk.after(0.05)
    assert wire_ids(effects) == ["r~2"] and sorted(aborted_at(effects)) == ["a", "b"]
    assert failures(effects) == []


def test_one_that_is_refused_again_and_again_is_not_looked_for() -> None:
    desk = Desk(dispatch_timeout_s=1_000.0)
    desk.submit()
    for name in "ab":
        desk.answers(name, refusal="it is full")
    for _ in range(25):
        desk.now_s += 1.0
        for name in "ab":
            desk.says(desk.report(name))
            desk.answers(name, refusal="it is full")
        assert not wants_lists(desk.checked(desk.router.tick(desk.now_s)))
        for name in "ab":
            desk.answers(name, refusal="it is full")
