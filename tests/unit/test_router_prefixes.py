"""What a router makes of what instances have cached: where requests go, and what it asks for."""

from __future__ import annotations

from typing import Any

from instance.messages import ALL_CACHED, Submit, SubmitAnswer, Subscribe
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.gateway.router import Router
from orchestrator.gateway.types import Effect, Outgoing, RouterParams, Send
from orchestrator.policy.dispatch import DispatchParams
from tests.support.idle_report import report
from tests.support.slow_prefixes import cached_blocks

PROMPT = tuple(range(10))
DEMAND_TOKENS = 16 * 10


class Desk:
    """A router whose members a and b are idle and alike; a wins ties."""

    def __init__(self, **params: Any) -> None:
        self.router = Router("tcp://gateway", RouterParams(dispatch=DispatchParams(slow_start_s=0.0, **params)))
        self.members("ab")

    def members(self, names: str, epoch: int = 1) -> list[Effect]:
        known = [Incarnation(InstanceId(name), Epoch(epoch), f"tcp://{name}") for name in names]
        effects = self.checked(self.router.set_members(known, 0.0))
        for name in names:
            self.says(report(name, epoch=epoch))
        return effects

    def says(self, message: Any) -> list[Effect]:
        return self.checked(self.router.on_message(message, 0.0))

    def submit(self, request_id: str, prefix: tuple[int, ...] = PROMPT) -> str:
        """To whom it goes."""
        outgoing = Outgoing(RequestId(request_id), "", 0, DEMAND_TOKENS, 8, b"", lambda _: b"", prefix=prefix)
        return sent_to(self.checked(self.router.submit(outgoing, 0.0)))

    def asked(self, now_s: float) -> dict[str, int | None]:
        """`cached_from` of the subscriptions that a tick sends."""
        return {
            one.address[-1]: one.message.cached_from
            for one in self.checked(self.router.tick(now_s))
            if isinstance(one, Send) and isinstance(one.message, Subscribe)
        }

    def checked(self, effects: list[Effect]) -> list[Effect]:
        self.router.check_integrity()
        return effects


def sent_to(effects: list[Effect]) -> str:
    return "".join(one.address[-1] for one in effects if isinstance(one, Send) and isinstance(one.message, Submit))


def test_a_prompt_goes_to_where_its_beginning_is_until_that_is_too_loaded() -> None:
    desk = Desk()
    desk.says(cached_blocks("b", ALL_CACHED, 6, PROMPT[:6]))
    assert [desk.submit(f"other-{number}", (99,)) for number in range(2)] == ["a", "b"]
    assert [desk.submit(f"like-{number}") for number in range(4)] == ["b", "a", "b", "a"]


def test_control_without_their_news_the_same_prompts_alternate() -> None:
    desk = Desk()
    assert [desk.submit(f"like-{number}") for number in range(3)] == ["a", "b", "a"]


def test_one_that_is_refused_goes_on_to_where_the_next_best_prefix_is() -> None:
    desk = Desk()
    desk.members("abc")
    desk.says(cached_blocks("b", ALL_CACHED, 6, PROMPT[:6]))
    desk.says(cached_blocks("c", ALL_CACHED, 6, PROMPT[:3]))
    assert desk.submit("r") == "b"
    assert sent_to(desk.says(SubmitAnswer("r", "b", 1, "its queue is full"))) == "c"


def test_each_subscription_says_what_is_known_of_the_instance() -> None:
    desk = Desk()
    assert desk.asked(1.0) == {"a": ALL_CACHED, "b": ALL_CACHED}
    desk.says(cached_blocks("b", ALL_CACHED, 6, PROMPT[:6]))
    desk.says(cached_blocks("b", 6, 9, [77]))
    assert desk.asked(2.0) == {"a": ALL_CACHED, "b": 9}
    desk.says(cached_blocks("b", 12, 14, [78]))
    assert desk.asked(3.0) == {"a": ALL_CACHED, "b": 9}, "10 and 11 were lost"


def test_a_weight_of_zero_subscribes_to_nothing() -> None:
    desk = Desk(prefix_weight=0.0)
    desk.says(cached_blocks("b", ALL_CACHED, 6, PROMPT))
    assert desk.asked(1.0) == {"a": None, "b": None}
    assert desk.router.hashed_block_size is None
    assert desk.submit("r") == "a"


def test_a_new_incarnation_has_nothing_and_what_the_old_one_said_late_does_not_count() -> None:
    desk = Desk()
    desk.says(cached_blocks("b", ALL_CACHED, 6, PROMPT[:6]))
    sizes = [desk.router.hashed_block_size]
    desk.members("ab", epoch=2)
    desk.says(cached_blocks("b", ALL_CACHED, 9, PROMPT))
    assert [*sizes, desk.router.hashed_block_size] == [16, None], "prompts need not be hashed"
    assert desk.submit("r") == "a"
