"""Are the answers of two runs the same, token for token? Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from orchestrator.demo.answers import Answer


@dataclass(frozen=True, slots=True)
class Difference:
    """One answer that differs: at which output token first, and in how many."""

    index: int
    first_offset: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Comparison:
    num_answers: int
    """Answers that both runs gave without an error."""
    num_tokens: int
    """Tokens of those answers in the first run."""
    differences: tuple[Difference, ...]
    not_compared: tuple[int, ...]
    """Requests that only one run answered, or that ended in an error."""

    @property
    def mismatched_tokens(self) -> int:
        return sum(difference.num_tokens for difference in self.differences)


def compare(moved: Sequence[Answer], undisturbed: Sequence[Answer]) -> Comparison:
    """Token ids of both runs, position by position; a missing or surplus token counts as one mismatch.

    A different finish reason alone counts as one mismatched token, at the end.
    """
    first = {answer.index: answer for answer in moved if answer.error is None}
    second = {answer.index: answer for answer in undisturbed if answer.error is None}
    both = sorted(first.keys() & second.keys())
    differences = [found for index in both if (found := _difference(first[index], second[index])) is not None]
    everything = {answer.index for answer in moved} | {answer.index for answer in undisturbed}
    return Comparison(
        num_answers=len(both),
        num_tokens=sum(len(first[index].token_ids) for index in both),
        differences=tuple(differences),
        not_compared=tuple(sorted(everything - set(both))),
    )


def _difference(one: Answer, other: Answer) -> Difference | None:
    offsets = [
        offset
        for offset, (left, right) in enumerate(zip_longest(one.token_ids, other.token_ids, fillvalue=-1))
        if left != right
    ]
    if offsets:
        return Difference(one.index, offsets[0], len(offsets))
    if one.finish_reason != other.finish_reason:
        return Difference(one.index, len(one.token_ids), 1)
    return None
