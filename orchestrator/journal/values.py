"""How does any value of the core stand in JSON, and come back as what it was? Events, effects, and the core's state.

Scalars are themselves and an array is a tuple; everything else is an object that names its class under "$". Classes
that the Event and Effect unions reach have short names, others are named with their module, which must be one of ours
and loaded already: reading a journal imports nothing and calls nothing but the constructors of messages.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import sys
from collections import OrderedDict, deque
from collections.abc import Iterable
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np

from orchestrator.core import Orchestrator
from orchestrator.effects import Effect
from orchestrator.errors import JournalError
from orchestrator.events import Event

KIND, CONTENT, NUMBER, REFERENCE = "$", "=", "#", "@"
MAX_DEPTH = 64
"""Of values in values; a journal is no reason to run out of stack."""
_OURS = ("orchestrator.", "instance.", "migration.")
_SCALARS = frozenset({bool, int, float, str, type(None)})
_SEQUENCES: dict[str, Any] = {"list": list, "set": set, "frozenset": frozenset}
_DICTS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict}


class Unwritable(Exception):
    """A value of a class that a journal cannot hold."""


def plain(value: object) -> Any:
    """The value in terms of JSON. Raises Unwritable."""
    return _Writer().write(value, 0)


def value_of(written: object) -> Any:
    """The value again. Raises JournalError when it is not one that `plain` wrote, or of another version's class."""
    return _Reader().read(written, 0)


def core_state(core: Orchestrator) -> Any:
    """All the core knows, in terms of JSON; what two of its parts share is written once. Raises Unwritable."""
    return finished(core_snapshot(core))


def core_snapshot(core: Orchestrator) -> Any:
    """As `core_state`, but what can never change (the reports, most of it) is left for `finished`: a loop has to wait
    for this one only, and another thread may do the rest."""
    return _Writer(is_in_a_hurry=True).write(core, 0)


def finished(snapshot: Any) -> Any:
    """The state of a snapshot. Raises Unwritable."""
    if isinstance(snapshot, _Later):
        return plain(snapshot.value)
    if isinstance(snapshot, list):
        return [finished(item) for item in snapshot]
    return {key: finished(item) for key, item in snapshot.items()} if isinstance(snapshot, dict) else snapshot


def core_of(written: object) -> Orchestrator:
    """A core that knows what the written one knew. Raises JournalError."""
    core = value_of(written)
    if not isinstance(core, Orchestrator):
        raise JournalError("it holds no state of the core")
    return core


# ---------------------------------------------------------------------- writing
@dataclasses.dataclass(frozen=True, slots=True)
class _Later:
    """A value that is written when there is time."""

    value: object


def _never_changes(value: object) -> bool:
    """A message, or some: their fields are values, too."""
    first = value[0] if isinstance(value, tuple) and value else value
    return isinstance(first, msgspec.Struct) and first.__struct_config__.frozen


class _Writer:
    """One value. What can change, and so may be shared, gets a number when it is met first."""

    def __init__(self, is_in_a_hurry: bool = False) -> None:
        self._numbers: dict[int, int] = {}
        self._is_in_a_hurry = is_in_a_hurry

    def write(self, value: object, depth: int) -> Any:
        kind: type = type(value)
        if kind is float:
            return value if math.isfinite(value) else {KIND: "float", CONTENT: repr(value)}  # type: ignore[arg-type]
        if kind in _SCALARS:
            return value
        if depth > MAX_DEPTH:
            raise Unwritable(f"values in values, more than {MAX_DEPTH} deep")
        if self._is_in_a_hurry and _never_changes(value):
            return _Later(value)
        if kind is tuple:
            return self._tuple(value, depth)  # type: ignore[arg-type]
        if isinstance(value, Enum):
            return {KIND: _name_of(kind), CONTENT: self.write(value.value, depth + 1)}
        if isinstance(value, msgspec.Struct):
            return {KIND: _name_of(kind), **self._attributes(value, depth)}
        if isinstance(value, bytes):
            return {KIND: "bytes", CONTENT: base64.b64encode(value).decode()}
        if isinstance(value, np.generic):
            return self.write(value.item(), depth)
        if dataclasses.is_dataclass(value) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return {KIND: _name_of(kind), **self._attributes(value, depth)}
        return self._changeable(value, depth)

    def _tuple(self, value: tuple[object, ...], depth: int) -> Any:
        kind = type(value[0]) if len(value) > 1 else None
        if kind is not None and issubclass(kind, msgspec.Struct) and all(type(item) is kind for item in value):
            names = kind.__struct_fields__
            rows = [[self.write(getattr(item, name), depth + 1) for name in names] for item in value]
            return {KIND: "rows", "of": _name_of(kind), CONTENT: rows}
        return [self.write(item, depth + 1) for item in value]

    def _changeable(self, value: object, depth: int) -> Any:
        known = self._numbers.get(id(value))
        if known is not None:
            return {REFERENCE: known}
        number = self._numbers[id(value)] = len(self._numbers)
        written: dict[str, object] = {KIND: type(value).__name__, NUMBER: number}
        match value:
            case dict() if type(value).__name__ in _DICTS:
                written[CONTENT] = [[self.write(k, depth + 1), self.write(v, depth + 1)] for k, v in value.items()]
            case deque():
                written["max"] = value.maxlen
                written[CONTENT] = self._items(value, depth)
            case list():
                written[CONTENT] = self._items(value, depth)
            case set() | frozenset():
                written[CONTENT] = sorted(self._items(value, depth), key=msgspec.json.encode)
            case np.ndarray():
                written |= {KIND: "array", "of": value.dtype.str, "shape": list(value.shape)}
                written[CONTENT] = base64.b64encode(value.tobytes()).decode()
            case _:
                kind: Any = type(value)
                if kind.__new__ is not object.__new__:
                    raise Unwritable(f"{kind.__name__} may hold more than its attributes")
                written[KIND] = _name_of(kind)
                written |= self._attributes(value, depth)
        return written

    def _items(self, values: Iterable[object], depth: int) -> list[object]:
        return [self.write(item, depth + 1) for item in values]

    def _attributes(self, value: object, depth: int) -> dict[str, object]:
        kind: type = type(value)
        names = _fields(kind)
        if names is None:
            if not hasattr(value, "__dict__"):
                raise Unwritable(f"{type(value).__name__} is neither a dataclass nor a plain object")
            names = tuple(name for name in vars(value) if not name.startswith("__"))
        return {name: self.write(getattr(value, name), depth + 1) for name in names}


# ---------------------------------------------------------------------- reading
class _Reader:
    def __init__(self) -> None:
        self._numbered: dict[int, object] = {}

    def read(self, written: object, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise JournalError(f"values in values, more than {MAX_DEPTH} deep")
        if isinstance(written, list):
            return tuple(self.read(item, depth + 1) for item in written)
        if not isinstance(written, dict):
            return written
        try:
            return self._object(written, depth)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise JournalError(
                f"a value is not one of ours: {_short(written)} ({type(error).__name__}: {error})"
            ) from error

    def _object(self, written: dict[str, Any], depth: int) -> Any:
        if REFERENCE in written:
            return self._numbered[written[REFERENCE]]
        kind, content = written[KIND], written.get(CONTENT)
        match kind:
            case "float":
                return float(content or "")
            case "bytes":
                return base64.b64decode(content or "")
            case "rows":
                made: Any = _class_named(written["of"])
                names = made.__struct_fields__
                return tuple(
                    made(**{name: self.read(item, depth + 1) for name, item in zip(names, row, strict=True)})
                    for row in content or ()
                )
            case "array":
                flat = np.frombuffer(base64.b64decode(content or ""), dtype=np.dtype(written["of"]))
                return self._keep(written, flat.reshape(written["shape"]).copy())
            case "deque":
                kept_deque: deque[object] = self._keep(written, deque(maxlen=written["max"]))
                kept_deque.extend(self.read(item, depth + 1) for item in content or ())
                return kept_deque
            case "list":
                kept_list: list[object] = self._keep(written, [])
                kept_list.extend(self.read(item, depth + 1) for item in content or ())
                return kept_list
            case "set" | "frozenset":
                return self._keep(written, _SEQUENCES[kind](self.read(item, depth + 1) for item in content or ()))
            case "dict" | "OrderedDict":
                kept_dict = self._keep(written, _DICTS[kind]())
                kept_dict.update((self.read(k, depth + 1), self.read(v, depth + 1)) for k, v in content or ())
                return kept_dict
            case _:
                return self._made(_class_named(kind), written, depth)

    def _made(self, made: Any, written: dict[str, Any], depth: int) -> Any:
        if issubclass(made, Enum):
            return made(self.read(written[CONTENT], depth + 1))
        names = [name for name in written if name not in (KIND, NUMBER)]
        expected = _fields(made)
        if expected is not None and set(names) != set(expected):
            unlike = sorted(set(names) ^ set(expected))
            raise JournalError(f"{made.__name__} has other fields here ({', '.join(unlike)}): another version wrote it")
        if issubclass(made, msgspec.Struct):
            return made(**{name: self.read(written[name], depth + 1) for name in names})
        value = self._keep(written, object.__new__(made))
        for name in names:
            object.__setattr__(value, name, self.read(written[name], depth + 1))
        return value

    def _keep(self, written: dict[str, Any], value: Any) -> Any:
        if NUMBER in written:
            self._numbered[written[NUMBER]] = value
        return value


# ---------------------------------------------------------------------- classes and their names
@cache
def _fields(kind: type) -> tuple[str, ...] | None:
    """Of a message or a dataclass; None of a plain class, which has what its state has."""
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else None


@cache
def _name_of(kind: type) -> str:
    if known_classes().get(kind.__name__) is kind:
        return kind.__name__
    name = f"{kind.__module__}:{kind.__name__}"
    if _found(name) is not kind:
        raise Unwritable(f"{name} is no class that a journal can hold")
    return name


@cache
def _class_named(name: str) -> type:
    found = known_classes().get(name) or _found(name)
    if found is None:
        raise JournalError(f"{name!r} is no class of this version")
    return found


def _found(name: str) -> type | None:
    module, _, kind = name.partition(":")
    found = getattr(sys.modules.get(module), kind, None) if module.startswith(_OURS) else None
    return found if isinstance(found, type) and found.__module__ == module else None


@cache
def known_classes() -> dict[str, type]:
    """Every dataclass, message and enum that an event or an effect may hold, by name."""
    known: dict[str, type] = {}
    _reach(Event, known)
    _reach(Effect, known)
    return known


def _reach(hint: Any, known: dict[str, type]) -> None:
    hint = getattr(hint, "__supertype__", hint)  # NewType
    for part in get_args(hint):
        _reach(part, known)
    if not isinstance(hint, type) or hint in known.values():
        return
    if issubclass(hint, Enum):
        known[hint.__name__] = hint
    elif dataclasses.is_dataclass(hint) or issubclass(hint, msgspec.Struct):
        if hint.__name__ in known:
            raise Unwritable(f"two classes are named {hint.__name__}")
        known[hint.__name__] = hint
        for field in get_type_hints(hint).values():
            _reach(field, known)


def _short(written: object) -> str:
    text = msgspec.json.encode(written).decode()
    return text if len(text) <= 120 else text[:117] + "..."
