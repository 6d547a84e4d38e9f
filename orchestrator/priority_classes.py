"""How urgent is a level, and which level has an API key? Both as they are now, changed by command while it runs. Pure.

A key is known by its SHA-256 only. Whose class is a level's rank has that level's class: when the rank changes, the
class follows. Requests that are there keep the number they have.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

from orchestrator.effects import (
    Answer,
    Effect,
    KeyClassSet,
    LevelSet,
    PolicyRefused,
    Refused,
    Result,
    UpdatePriorities,
    Violation,
)
from orchestrator.errors import RefusalKind
from orchestrator.events import KeyClassRequested, LevelRequested
from orchestrator.policy.levels import MAX_HEADROOM_BLOCKS, MAX_PRIORITY, BadLevel, Level, Levels
from orchestrator.state import CoreParams

MAX_KEYS = 4096
"""API keys with a class: every gateway is told of all of them."""
NO_CLASS = "none"
_SHOWN_CHARS = 12
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Priorities:
    """What is in force; `etag` is a digest of it."""

    levels: Levels
    key_classes: tuple[tuple[str, int], ...]
    """(SHA-256 of an API key in hexadecimal, priority of its class), by digest."""
    etag: str


def priorities(params: CoreParams) -> Priorities:
    content = repr((params.levels.levels, params.key_classes)).encode()
    return Priorities(params.levels, params.key_classes, hashlib.blake2b(content, digest_size=8).hexdigest())


def told(params: CoreParams, reason: str) -> UpdatePriorities:
    """What every gateway is to know."""
    return UpdatePriorities(params.levels, params.key_classes, reason)


def shown_digest(digest: str) -> str:
    """Enough of it to know it again."""
    return f"sha256:{digest[:_SHOWN_CHARS]}..."


def change_priorities(event: KeyClassRequested | LevelRequested, params: CoreParams) -> tuple[list[Effect], CoreParams]:
    """What follows, the answer last, and the parameters from now on: the same ones where nothing changes."""
    etag = priorities(params).etag
    if event.etag and event.etag != etag:
        reason = f"the priorities have changed since: their etag is {etag}, not {event.etag!r}"
        return [Answer(event.token, Refused(RefusalKind.OVERTAKEN, reason))], params
    if isinstance(event, KeyClassRequested):
        result, changed = _with_key_class(event, params)
    else:
        result, changed = _with_level(event, params)
    answer = Answer(event.token, result)
    if not isinstance(result, KeyClassSet | LevelSet) or event.validate_only or changed == params:
        return [answer], params
    return [told(changed, f"asked for by {event.asked_by}: {result.change}"), answer], changed


# ---------------------------------------------------------------------- the class of an API key
def _with_key_class(event: KeyClassRequested, params: CoreParams) -> tuple[Result, CoreParams]:
    classes, digest = dict(params.key_classes), event.key_sha256
    if not _DIGEST.fullmatch(digest):
        return _wrong("key_sha256", "it must be 64 hexadecimal digits in lower case"), params
    before, after = classes.get(digest), None
    if event.level is not None:
        try:
            after = params.levels.priority(event.level)
        except BadLevel:  # not in its words: they repeat what was sent, and it may be the key
            names = ", ".join(level.name for level in params.levels.levels)
            return _wrong("level", f"it must be one of {names}, or a whole number"), params
    if after is None and before is None:
        return Refused(RefusalKind.NOT_FOUND, f"the key {shown_digest(digest)} has no class"), params
    if before is None and len(classes) >= MAX_KEYS:
        return Refused(RefusalKind.EXHAUSTED, f"{MAX_KEYS} API keys have a class already"), params
    if after is None:
        del classes[digest]
    else:
        classes[digest] = after
    changed = replace(params, key_classes=tuple(sorted(classes.items())))
    change = f"key {shown_digest(digest)} {_shown(params.levels, before)} -> {_shown(params.levels, after)}"
    return KeyClassSet(digest, before, after, change, priorities(changed).etag, event.validate_only), changed


def _shown(levels: Levels, priority: int | None) -> str:
    return NO_CLASS if priority is None else levels.shown(priority)


# ---------------------------------------------------------------------- a level's rank and headroom
def _with_level(event: LevelRequested, params: CoreParams) -> tuple[Result, CoreParams]:
    known = params.levels.levels
    level = next((one for one in known if one.name == event.name), None)
    if level is None:
        names = ", ".join(one.name for one in known)
        return Refused(RefusalKind.NOT_FOUND, f"there is no level {event.name!r}; there are: {names}"), params
    violations = _violations(event, [one for one in known if one is not level])
    if violations:
        return PolicyRefused(violations), params
    new = Level(
        level.name,
        level.rank if event.rank is None else event.rank,
        level.headroom_blocks if event.headroom_blocks is None else event.headroom_blocks,
    )
    others = [one for one in known if one is not level]
    levels = Levels(tuple(sorted([*others, new], key=lambda one: one.rank)))
    changed = with_levels(params, levels) if new != level else params
    moved = tuple((digest, new.rank if rank == level.rank else rank) for digest, rank in params.key_classes)
    changed = changed if moved == params.key_classes else replace(changed, key_classes=moved)
    change = f"level {level.name} {_in_words(level)} -> {_in_words(new)}"
    return LevelSet(level, new, change, priorities(changed).etag, event.validate_only), changed


def _violations(event: LevelRequested, others: list[Level]) -> tuple[Violation, ...]:
    found: list[Violation] = []
    rank, blocks = event.rank, event.headroom_blocks
    if rank is None and blocks is None:
        found.append(Violation("rank", "nothing is given: name a rank or a headroom"))
    if rank is not None and abs(rank) > MAX_PRIORITY:
        found.append(Violation("rank", f"it is {rank}, it must be from {-MAX_PRIORITY} to {MAX_PRIORITY}"))
    taken = next((one.name for one in others if one.rank == rank), None)
    if taken is not None:
        found.append(Violation("rank", f"level {taken} has the rank {rank}: each needs one of its own"))
    if blocks is not None and not 0 <= blocks <= MAX_HEADROOM_BLOCKS:
        found.append(Violation("headroom_blocks", f"it is {blocks}, it must be from 0 to {MAX_HEADROOM_BLOCKS}"))
    return tuple(found)


def _in_words(level: Level) -> str:
    return f"rank {level.rank}, {level.headroom_blocks} blocks"


def with_levels(params: CoreParams, levels: Levels) -> CoreParams:
    """Everything that reckons with headroom reckons with these."""
    load = levels.load_params
    autoscale = replace(params.scaling.autoscale, load=load)
    return replace(
        params,
        levels=levels,
        rebalance=replace(params.rebalance, load=load),
        drain=replace(params.drain, load=load),
        dispatch=replace(params.dispatch, load=load),
        scaling=replace(params.scaling, autoscale=autoscale),
    )


def _wrong(field: str, reason: str) -> PolicyRefused:
    return PolicyRefused((Violation(field, reason),))


def check_integrity(params: CoreParams) -> None:
    """Raise AssertionError when a bound is passed, or two parts reckon with other levels."""
    digests = [digest for digest, _ in params.key_classes]
    assert len(digests) <= MAX_KEYS and digests == sorted(set(digests)), "a key has two classes"
    ranks = [level.rank for level in params.levels.levels]
    assert ranks == sorted(set(ranks)), "two levels have one rank"
