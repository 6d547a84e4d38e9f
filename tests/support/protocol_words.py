"""How do events and effects read in a golden trace? One or a few words each."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from migration import effects as ef
from migration import events as ev
from migration import messages as msg


def message_in_words(message: Any) -> str:
    match message:
        case msg.Reserve(settled_tokens=settled):
            return f"Reserve (settled {settled})"
        case msg.Reserved(num_blocks=blocks) | msg.Grown(num_blocks=blocks):
            return f"{type(message).__name__} ({blocks} blocks)"
        case msg.Grow(num_tokens=tokens):
            return f"Grow ({tokens} tokens)"
        case msg.Refused(reason=reason):
            return f"Refused ({reason})"
        case msg.Cancel(outcome=outcome):
            return f"Cancel ({outcome})"
        case _:
            return type(message).__name__


def event_in_words(event: Any) -> str:
    match event:
        case ev.TimerFired(timer):
            return f"timer {timer.value}"
        case ev.ProgressRead(progress):
            return f"ProgressRead (settled {progress.settled_tokens})"
        case ev.BlocksCopied(receipt):
            return f"BlocksCopied ({receipt.num_blocks})"
        case ev.StopGranted(stopped):
            return f"StopGranted (settled {stopped.settled_tokens})"
        case ev.StopDeclined(why):
            return f"StopDeclined ({why.value})"
        case ev.BlocksHeld(reservation) | ev.BlocksGrown(reservation):
            return f"{type(event).__name__} ({reservation.num_blocks})"
        case ev.EngineRefused(reason) | ev.CopyBroken(reason) | ev.Withdrawn(reason):
            return f"{type(event).__name__} ({reason})"
        case _ if hasattr(event, "migration_id"):
            return message_in_words(event)
        case _:
            return type(event).__name__


def effect_in_words(effect: Any) -> str:
    match effect:
        case ef.Send(message):
            return f"say {message_in_words(message)}"
        case ef.SetTimer(timer, after_s):
            return f"timer {timer.value} in {after_s * 1000:g} ms"
        case ef.CopyBlocks(blocks=blocks, urgent=urgent):
            return f"copy blocks {blocks.first} to {blocks.end - 1}{' urgently' if urgent else ''}"
        case ef.GrowBlocks(num_tokens):
            return f"GrowBlocks ({num_tokens} tokens)"
        case ef.StopRequest(without_kv):
            return "StopRequest (without KV)" if without_kv else "StopRequest"
        case _:
            return type(effect).__name__


def effects_in_words(effects: list[Any]) -> str:
    """In order; neighbouring timers that are cleared, which are many, together."""
    words: list[str] = []
    for is_clear, group in groupby(effects, lambda effect: isinstance(effect, ef.ClearTimer)):
        some = list(group)
        if is_clear:
            words.append(f"no timer {' '.join(effect.timer.value for effect in some)}")
        else:
            words += [effect_in_words(effect) for effect in some]
    return ", ".join(words) or "nothing"
