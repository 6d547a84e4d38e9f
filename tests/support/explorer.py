"""Can a system reach a state that must not be? Breadth first, with the shortest list of steps to it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)


class TooManyStates(RuntimeError):
    """The bound was reached: what was not seen is not proven."""


@dataclass(frozen=True, slots=True)
class Broken:
    """What is wrong, and the fewest steps that lead there."""

    why: str
    steps: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([self.why, *(f"{number:3}. {step}" for number, step in enumerate(self.steps, 1))])


@dataclass(frozen=True, slots=True)
class Exploration(Generic[State]):
    num_states: int
    num_steps: int
    broken: Broken | None


class _Found(Generic[State]):
    """The states met so far, numbered in the order in which they were met, each with the step that first led there."""

    def __init__(self, start: State) -> None:
        self.states: list[State] = [start]
        self.numbers: dict[State, int] = {start: 0}
        self.parents: list[int] = [0]
        self.steps: list[str] = [""]
        self.before: list[list[int]] = [[]]

    def add(self, state: State, parent: int, step: str) -> None:
        number = self.numbers.setdefault(state, len(self.states))
        if number == len(self.states):
            self.states.append(state)
            self.parents.append(parent)
            self.steps.append(step)
            self.before.append([parent])
        else:
            self.before[number].append(parent)

    def steps_to(self, number: int) -> tuple[str, ...]:
        steps: list[str] = []
        while number:
            steps.append(self.steps[number])
            number = self.parents[number]
        return tuple(reversed(steps))

    def first_dead_end(self, is_rest: Callable[[State], bool]) -> int | None:
        todo = [number for number, state in enumerate(self.states) if is_rest(state)]
        is_alive = bytearray(len(self.states))
        for number in todo:
            is_alive[number] = 1
        while todo:
            for previous in self.before[todo.pop()]:
                if not is_alive[previous]:
                    is_alive[previous] = 1
                    todo.append(previous)
        dead = is_alive.find(0)
        return None if dead < 0 else dead


def explore(
    start: State,
    successors: Callable[[State], Iterable[tuple[str, State]]],
    find_fault: Callable[[State], str | None],
    *,
    is_rest: Callable[[State], bool],
    max_states: int,
) -> Exploration[State]:
    """All states from `start`. `successors` names each step; it raises AssertionError for one that breaks something.

    Besides `find_fault`, every state must have a way to one that `is_rest` (no dead ends). Raises `TooManyStates`.
    """
    found = _Found(start)
    num_steps = number = 0

    def broken(why: str) -> Exploration[State]:
        return Exploration(len(found.states), num_steps, Broken(why, found.steps_to(number)))

    while number < len(found.states):
        state = found.states[number]
        why = find_fault(state)
        if why is not None:
            return broken(why)
        try:
            for step, following in successors(state):
                num_steps += 1
                found.add(following, number, step)
        except AssertionError as error:
            return broken(str(error))
        if len(found.states) > max_states:
            raise TooManyStates(f"more than {max_states} states")
        number += 1
    dead_end = found.first_dead_end(is_rest)
    if dead_end is not None:
        number = dead_end
        return broken("from here no state of rest can be reached")
    return Exploration(len(found.states), num_steps, None)
