"""What do hostile messages do to migrations that are under way? They end them at worst: no crash, no block lost.

Whatever passes `wire.decode` reaches the two real shells and machines, in the middle of real migrations, from the real
peer and from a stranger, on a clock that jumps.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import get_args

import pytest

from migration import messages as msg
from migration import wire
from migration.errors import MalformedMessage
from migration.messages import Message, ToDestination
from migration.params import IncomingParams, MigrationParams, Mode
from migration.types import Epoch, Incarnation, InstanceId, Outcome, Refusal
from orchestrator.sim.jumping_loop import run_jumping
from tests.support.migration_kit import BLOCK_SIZE, A, B, Pair
from tests.support.mutate import Mutator

NUM_BLOCKS = 1_000
STRANGER = Incarnation(InstanceId("x"), Epoch(1), "tcp://x")
TO_DESTINATION = get_args(ToDestination)

VALID: tuple[Message, ...] = (
    msg.Reserve("m", "r", "a", 1, "tcp://a", 1, b"payload", 40, "print", BLOCK_SIZE, 0, 10.0),
    msg.Reserve("other", "s", "a", 1, "tcp://a", 1, b"payload", 40, "print", BLOCK_SIZE, 0, 0.5),
    msg.Reserved("m", 0, 12, ("memory://b",)),
    msg.Refused("m", "no blocks"),
    *(msg.Grow("m", 60), msg.Grow("other", 48), msg.Grown("m", 17)),
    *(msg.Prepare("m"), msg.Prepare("other"), msg.Prepared("m")),
    *(msg.Commit("other", b"40"), msg.Committed("other")),
    *(msg.Cancel("m", "preempted"), msg.Cancelled("m")),
)
FRAMES = tuple(wire.encode(message) for message in VALID)


def checked_blocks(pair: Pair) -> None:
    """Blocks are free, held, or of a request that was committed: none is lost, none is held twice."""
    destination = pair.destination
    assert min(destination.held.values(), default=1) >= 0
    committed = NUM_BLOCKS - destination.num_free - sum(destination.held.values())
    assert committed >= 0 and (committed == 0 or destination.num_commits > 0)


def attack(pair: Pair, mutator: Mutator) -> str:
    frame = mutator.frame()
    try:
        message = wire.decode(frame)
    except MalformedMessage:
        return "malformed"
    if isinstance(message, TO_DESTINATION):
        pair.table.deliver(message, A if mutator.rng.random() < 0.9 else STRANGER)
    elif message.migration_id in pair.drivers:
        sender = B if mutator.rng.random() < 0.9 else STRANGER
        pair.drivers[message.migration_id].deliver(message, sender)  # type: ignore[arg-type]
        pair.drivers[message.migration_id].check_integrity()
    return type(message).__name__


async def every_lease_has_ended(pair: Pair) -> None:
    was_stopped, pair.source.is_stopped = pair.source.is_stopped, True  # it need not decode for a minute
    await asyncio.sleep(IncomingParams().max_lease_s + 1.0)
    pair.source.is_stopped = was_stopped


async def storm(num_frames: int, seed: int) -> tuple[Counter[str], Counter[Outcome]]:
    """Migration after migration, in every mode, with hostile messages at every moment of each."""
    mutator = Mutator(seed, FRAMES, len(wire.PREFIX))
    kinds: Counter[str] = Counter()
    outcomes: Counter[Outcome] = Counter()
    modes = list(Mode)
    while kinds.total() < num_frames:
        async with Pair(MigrationParams(deadline_s=5.0, commit_retry_s=0.01)) as pair:
            driver = pair.driver(mode=modes[outcomes.total() % len(modes)])
            moving = asyncio.create_task(driver.run())
            for number in range(300):
                kinds[attack(pair, mutator)] += 1
                checked_blocks(pair)
                await asyncio.sleep(mutator.rng.choice((0.0, 0.0, 0.0005, 0.002, 0.02)))
                if number % 30 == 0:
                    pair.table.check_integrity()
            driver.peer_lost()  # a commit that a hostile message made impossible is never answered
            outcomes[(await moving).outcome] += 1
            assert not pair.source.is_stopped or pair.source.is_released, "a stopped request was resumed or released"
            await every_lease_has_ended(pair)
            pair.table.check_integrity()
            checked_blocks(pair)
            assert pair.is_clean, "nothing stays held for what nobody will commit"
    return kinds, outcomes


async def still_moves() -> Outcome:
    async with Pair() as pair:
        return (await pair.move()).outcome


def check(num_frames: int, seed: int) -> None:
    kinds, outcomes = run_jumping(storm(num_frames, seed), limit_s=4_000_000.0)
    assert kinds.total() >= num_frames
    # The control: the storm is no storm of rubbish only, and not every migration goes down in it.
    assert {one.__name__ for one in get_args(Message)} <= kinds.keys() and kinds["malformed"] < 0.75 * kinds.total()
    assert len(outcomes) >= 3, outcomes


# A copy that is called off before its first step leaves its inner coroutine unstarted; nothing has happened then.
@pytest.mark.filterwarnings("ignore:coroutine 'SourceDriver._copy' was never awaited")
def test_sixteen_thousand_hostile_messages_lose_no_block_and_crash_no_migration() -> None:
    check(16_000, seed=1)


def test_a_destination_that_was_attacked_still_takes_a_request() -> None:
    """In one and the same table: the storm, then a good migration."""

    async def story() -> Outcome:
        mutator = Mutator(7, FRAMES, len(wire.PREFIX))
        async with Pair() as pair:
            for _ in range(2_000):
                attack(pair, mutator)
                await asyncio.sleep(0)
            await every_lease_has_ended(pair)
            outcome = (await pair.driver("good").run()).outcome
            checked_blocks(pair)
            return outcome

    assert run_jumping(story()) is Outcome.COMMITTED


def test_blocks_that_are_not_given_back_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a destination that forgets to give back."""

    async def forget(self: object, migration_id: str) -> Refusal | None:
        return None

    monkeypatch.setattr("tests.support.migration_kit.ToyDestination.cancel", forget)
    with pytest.raises(BaseException, match="nothing stays held") as caught:
        check(3_000, seed=1)
    assert caught.errisinstance(AssertionError)
