"""Can other users of the machine read the fleet's token from a stand-alone instance's command line?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil

from instance.spec import EngineKind, InstanceSpec
from instance.standalone import TOKEN_VARIABLE, told
from tests.support.standalone import ROOT, start_instances

SECRET = "a secret that is nowhere else"
SPEC = InstanceSpec("i0", 1, EngineKind.FAKE, ("fake",), token=SECRET)


def refusal(argument: str) -> str:
    """Why it does not start."""
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    command = [sys.executable, "-m", "instance.standalone", argument]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done
    return str(json.loads(done.stdout)["error"])


def test_the_token_is_in_the_environment_and_not_on_the_command_line(tmp_path: Path) -> None:
    (process,) = start_instances([SPEC], tmp_path)
    try:
        child = next(one for one in psutil.Process().children() if "instance.standalone" in one.cmdline())
        assert not any(SECRET in argument for argument in child.cmdline())
        assert child.environ()[TOKEN_VARIABLE] == SECRET, "the control: this is where it came from"
    finally:
        process.stop()


def test_a_token_in_the_argument_is_refused_and_not_said_again() -> None:
    reason = refusal(msgspec.json.encode(SPEC).decode())
    assert TOKEN_VARIABLE in reason and SECRET not in reason


def test_without_any_token_it_does_not_start() -> None:
    argument, _ = told(SPEC)
    assert "token is empty" in refusal(argument)
