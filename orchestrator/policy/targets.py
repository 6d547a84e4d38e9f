"""What may a request, or a class of requests, want of its answer's speed?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from instance.messages import RequestLoad

MAX_TARGET_MS = 86_400_000.0
"""A day."""
MAX_CLASSES = 64
DEFAULT_CLASS = "default"
"""Its targets are those of requests that name no class."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a request wants; None: it does not care."""

    ttft_s: float | None = None
    """From its arrival at the gateway to its first token."""
    tpot_s: float | None = None
    """Mean time of each further token."""

    def after(self, waited_s: float) -> Targets:
        """What is left of them; a TTFT of less than nothing has been missed."""
        return self if self.ttft_s is None else Targets(self.ttft_s - waited_s, self.tpot_s)

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None


NO_TARGETS = Targets()


# ---------------------------------------------------------------------- of a request as an instance reports it
@dataclass(frozen=True, slots=True)
class Tightest:
    """Of all requests of an instance, at its report: two numbers tell whether any may miss. Infinite: none has one."""

    tpot_s: float = math.inf
    left_s: float = math.inf
    """Until the first token of a request that waits for it is due, which is not past."""


NOTHING_WANTED = Tightest()


def is_any_wanted(of: Iterable[Tightest]) -> bool:
    """Whether any request of these instances has a target."""
    # Most of those that have none are the very same object, which is seen at once.
    return any(one is not NOTHING_WANTED and one != NOTHING_WANTED for one in of)


def tightest_of(requests: Iterable[RequestLoad]) -> Tightest:
    tpot_s = left_s = math.inf
    for request in requests:
        # Asked of each request four times a second: most have given tokens, and so wait for no first one.
        if request.tpot_s is not None and 0.0 < request.tpot_s < tpot_s:
            tpot_s = request.tpot_s
        if request.ttft_s is not None and request.num_output_tokens == 0:
            its_s = ttft_left_s(request)
            left_s = its_s if 0.0 < its_s < left_s else left_s
    return Tightest(tpot_s, left_s) if min(tpot_s, left_s) < math.inf else NOTHING_WANTED


def tpot_wanted_s(request: RequestLoad) -> float:
    """Infinite: it wants none, or something that is no time."""
    wanted_s = request.tpot_s
    return wanted_s if wanted_s is not None and wanted_s > 0.0 else math.inf


def awaits_first_token(request: RequestLoad) -> bool:
    return request.status == "waiting" and request.num_output_tokens == 0


def ttft_left_s(request: RequestLoad) -> float:
    """At its report; less than nothing: its first token is late. Infinite: it waits for none, or does not care."""
    if request.ttft_s is None or not awaits_first_token(request):
        return math.inf
    left_s = request.ttft_s - request.waited_s - request.arrived_s
    return left_s if left_s < math.inf else math.inf


def parse_classes(text: str) -> dict[str, Targets]:
    """`NAME=TTFT_MS/TPOT_MS,...`, `-` for none: `interactive=500/50,bulk=60000/-`. Raises ValueError (one line)."""
    classes: dict[str, Targets] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, values = item.partition("=")
        ttft, slash, tpot = values.partition("/")
        name = name.strip()
        if not equals or not slash or not name or not name.isascii() or not name.isprintable() or " " in name:
            raise ValueError(
                f"{item!r} is not of the form NAME=TTFT_MS/TPOT_MS, such as interactive=500/50 or bulk=60000/-"
            )
        if name in classes:
            raise ValueError(f"the class {name!r} is given twice")
        classes[name] = Targets(_class_target(ttft, item), _class_target(tpot, item))
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"{len(classes)} classes are given, at most {MAX_CLASSES} are kept")
    return classes


def _class_target(text: str, item: str) -> float | None:
    if text.strip() == "-":
        return None
    target_s = target_of_ms(text)
    if target_s is None:
        raise ValueError(f"{item!r}: {text.strip()!r} is not a number of milliseconds above 0, or - for none")
    return target_s


def target_of_ms(text: str) -> float | None:
    """Seconds. None: it is not a number of milliseconds above 0 and up to a day."""
    try:
        value_ms = float(text)
    except ValueError:
        return None
    return value_ms / 1e3 if 0.0 < value_ms <= MAX_TARGET_MS else None
