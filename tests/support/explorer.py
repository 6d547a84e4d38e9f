"""Can a system reach a state that must not be? Breadth first, with the shortest list of steps to it."""

from __future__ import annotations

from collections import deque
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
    parents: dict[State, tuple[State, str] | None] = {start: None}
    before: dict[State, list[State]] = {start: []}
    todo = deque([start])
    num_steps = 0
    while todo:
        state = todo.popleft()
        why = find_fault(state)
        if why is not None:
            return Exploration(len(parents), num_steps, Broken(why, _steps_to(state, parents)))
        try:
            for step, following in successors(state):
                num_steps += 1
                if following not in parents:
                    parents[following] = (state, step)
                    before[following] = []
                    todo.append(following)
                before[following].append(state)
        except AssertionError as error:
            return Exploration(len(parents), num_steps, Broken(str(error), _steps_to(state, parents)))
        if len(parents) > max_states:
            raise TooManyStates(f"more than {max_states} states")
    dead_end = _first_dead_end(parents, before, is_rest)
    if dead_end is not None:
        steps = _steps_to(dead_end, parents)
        return Exploration(len(parents), num_steps, Broken("from here no state of rest can be reached", steps))
    return Exploration(len(parents), num_steps, None)


def _steps_to(state: State, parents: dict[State, tuple[State, str] | None]) -> tuple[str, ...]:
    steps: list[str] = []
    parent = parents[state]
    while parent is not None:
        state, step = parent
        steps.append(step)
        parent = parents[state]
    return tuple(reversed(steps))


def _first_dead_end(
    parents: dict[State, tuple[State, str] | None], before: dict[State, list[State]], is_rest: Callable[[State], bool]
) -> State | None:
    alive = {state for state in parents if is_rest(state)}
    todo = list(alive)
    while todo:
        for previous in before[todo.pop()]:
            if previous not in alive:
                alive.add(previous)
                todo.append(previous)
    return next((state for state in parents if state not in alive), None)
