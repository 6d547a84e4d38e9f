"""Do the files lie where the conventions say, and do they stay small, plain and free of traces of one machine?"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

PRODUCT = ("orchestrator", "migration", "instance", "bench")
MAX_LINES = 400
GENERATED = Path("orchestrator/admin/pb")
TEXT_SUFFIXES = {
    ".py",
    ".pyi",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".proto",
    ".lock",
    ".in",
    ".txt",
    ".cfg",
    ".sh",
    ".json",
    "",
}

# Written in pieces so that this file does not find itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.})/-])/(" + "|".join(["wo" + "rk", "ro" + "ot", "fa" + "rm", "tm" + "p"]) + r")/[\w.]"
)
REGISTRY = re.compile(
    "|".join([r"/opt/" + "pypi", "/opt/" + "wheels", "files.pythonhosted" + r"\.org", "pypi" + r"\.org/simple"])
)


def product_files(root: Path) -> list[Path]:
    """Python files of the product packages, generated ones left out, relative to the root."""
    paths = (path.relative_to(root) for package in PRODUCT for path in sorted((root / package).rglob("*.py")))
    return [path for path in paths if not path.is_relative_to(GENERATED)]


def tracked_files(root: Path) -> list[Path]:
    """What git tracks or would track; skips where there is no git."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [Path(name) for name in listing.split("\0") if name and (root / name).is_file()]


def imported_names(source: str) -> set[str]:
    """Top-level names of everything that a module imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def traces_of_a_machine(text: str) -> list[str]:
    return [match.group() for pattern in (MACHINE_PATH, REGISTRY) for match in pattern.finditer(text)]


def test_proto_holds_proto_text_and_nothing_else(repo_root: Path) -> None:
    files = [path.relative_to(repo_root) for path in (repo_root / "proto").rglob("*") if path.is_file()]
    assert [str(path) for path in files if path.suffix != ".proto"] == []


def test_product_files_have_at_most_400_lines(repo_root: Path) -> None:
    sizes = {str(path): len((repo_root / path).read_text().splitlines()) for path in product_files(repo_root)}
    assert {path: size for path, size in sizes.items() if size > MAX_LINES} == {}


def test_every_package_has_a_readme(repo_root: Path) -> None:
    folders = [*PRODUCT, "tests", "deploy", "requirements"]
    assert [folder for folder in folders if not (repo_root / folder / "README.md").is_file()] == []


def test_every_product_module_says_what_it_answers(repo_root: Path) -> None:
    trees = {str(path): ast.parse((repo_root / path).read_text()) for path in product_files(repo_root)}
    assert [path for path, tree in trees.items() if tree.body and not ast.get_docstring(tree)] == []


def test_product_code_imports_no_pickle(repo_root: Path) -> None:
    banned = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    found = {str(path): imported_names((repo_root / path).read_text()) & banned for path in product_files(repo_root)}
    assert {path: names for path, names in found.items() if names} == {}


def test_no_text_file_names_a_path_or_a_registry_of_one_machine(repo_root: Path) -> None:
    found: dict[str, list[str]] = {}
    for path in tracked_files(repo_root):
        if path.suffix not in TEXT_SUFFIXES:
            continue
        try:
            text = (repo_root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if traces := traces_of_a_machine(text):
            found[str(path)] = traces
    assert found == {}


@pytest.mark.parametrize(
    "text", ["/wo" + "rk/main/x", "cd /ro" + "ot/.cache", '"/tm' + 'p/socket"', "file:///opt/" + "pypi/simple"]
)
def test_a_machine_path_in_a_text_is_found(text: str) -> None:
    assert traces_of_a_machine(text)


@pytest.mark.parametrize(
    "text", ["docs/wo" + "rk/items", "https://example.org/tm" + "p/x", "root/folder", "{root}/tm" + "p/x"]
)
def test_an_innocent_path_is_not_taken_for_a_machine_path(text: str) -> None:
    assert not traces_of_a_machine(text)


def test_a_pickle_import_inside_a_function_is_found() -> None:
    assert "pickle" in imported_names("def f():\n    from pickle import loads\n")
