"""Does `compat.py` name everything of vLLM that we touch, is it all there, and would its absence be noticed?

`make compat VLLM=...` runs this against another vLLM.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from instance.vllm import compat

OURS = ("instance/vllm", "orchestrator/gateway")


def files(root: Path) -> Iterator[Path]:
    for folder in OURS:
        yield from sorted(path for path in (root / folder).glob("*.py") if path.name != "compat.py")


def imported(tree: ast.AST) -> set[tuple[str, str]]:
    """(module, name) of what comes from vLLM, wherever the import stands."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str() as module, names=names) if module.split(".")[0] == "vllm":
                found |= {(module, alias.name) for alias in names}
            case ast.Import(names=names):
                found |= {(alias.name, "") for alias in names if alias.name.split(".")[0] == "vllm"}
    return found


def own_names(tree: ast.AST) -> set[str]:
    """What this module itself defines: functions, classes, variables, and what it assigns on `self`."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                names.add(name)
    return names


def private_touches(tree: ast.AST) -> set[str]:
    """Attributes that begin with an underscore and are not this module's own: somebody else's, so vLLM's."""
    touched = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in touched if name.startswith("_") and not name.startswith("__")} - own_names(tree)


def unnamed(text: str) -> set[str]:
    """What a module uses of vLLM and `compat.py` does not name."""
    tree = ast.parse(text)
    objects, attributes = compat.named()
    imports = {f"{module}.{name}".rstrip(".") for module, name in imported(tree) - objects}
    return imports | (private_touches(tree) - attributes)


@pytest.mark.parametrize(
    "needed", (*compat._NEEDED, *compat._NEEDED_ELSEWHERE), ids=lambda needed: f"{needed.module}.{needed.name}"
)
def test_this_vllm_has_what_we_use_of(needed: compat._Needed) -> None:
    assert list(compat._missing(needed)) == []


def test_every_import_and_every_private_name_of_vllm_is_named_in_compat(repo_root: Path) -> None:
    found = {str(path.relative_to(repo_root)): unnamed(path.read_text()) for path in files(repo_root)}
    assert len(found) > 20
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("from vllm.v1.core.sched.scheduler import Scheduler, Other\n", {"vllm.v1.core.sched.scheduler.Other"}),
        ("def f():\n    import vllm.config\n", {"vllm.config"}),
        ("def f(scheduler):\n    scheduler._secret()\n", {"_secret"}),
        (
            "class A:\n    def f(self):\n        self._inherited += self._holds_kv_blocks()\n        self._own = 1\n",
            set(),
        ),
        ("class A:\n    def f(self):\n        return self._inherited + self.__dict__\n", {"_inherited"}),
        ("from instance.vllm import compat\n", set()),
    ],
)
def test_a_use_that_is_not_named_is_found(text: str, missing: set[str]) -> None:
    assert unnamed(text) == missing


def test_each_thing_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = (
        compat._Needed("vllm.no_such_module", "Thing"),
        compat._Needed("vllm.v1.request", "NoSuchClass"),
        compat._Needed("vllm.v1.request", "Request", ("no_such_attribute",), (("no_such_method", ()),)),
        compat._Needed("vllm.v1.request", "Request", (), (("append_output_token_ids", ("no_such_parameter",)),)),
    )
    monkeypatch.setattr(compat, "_NEEDED", gone)
    monkeypatch.setattr(compat, "_NEEDED_ELSEWHERE", ())
    assert compat.problems() == [
        "vllm.no_such_module.Thing",
        "vllm.v1.request.NoSuchClass",
        "Request.no_such_attribute",
        "Request.no_such_method",
        "the parameter no_such_parameter of Request.append_output_token_ids",
    ]
    assert "lacks vllm.no_such_module.Thing" in str(compat.why_unsupported())
