"""Can this be started at all? What can be known before anything runs: ports, vLLM's flags, the model's folder."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import urllib.request
from http import HTTPStatus

import msgspec

from orchestrator.errors import StartUpError

PARSE_TIMEOUT_S = 120.0
HEALTH_POLL_S = 0.1
HEALTH_TIMEOUT_S = 5.0
_BAD_FLAGS = 3

# vLLM's parser costs seconds and half a gigabyte to import, so it runs in a process of its own.
_PARSE = f"""
import json, sys
from instance.vllm.flags import FlagError, parse_serve_argv
try:
    namespace = parse_serve_argv(json.loads(sys.stdin.read()))
except FlagError as error:
    sys.stderr.write("\\nKVFERRY " + str(error))
    sys.exit({_BAD_FLAGS})
sys.stdout.write("\\nKVFERRY " + json.dumps({{"tensor_parallel_size": namespace.tensor_parallel_size}}))
"""


class ParsedFlags(msgspec.Struct, frozen=True):
    """What the start must know of vLLM's flags."""

    tensor_parallel_size: int


def check_port(host: str, port: int, flag: str) -> None:
    """Raises StartUpError when something listens there. Port 0 is always free."""
    if port == 0:
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartUpError(
                f"port {port} on {host} cannot be used ({error.strerror}): choose another with {flag}"
            ) from error


async def await_health(url: str, timeout_s: float) -> None:
    """Return once the OpenAI server there says that it is healthy. Raises StartUpError when it does not in time."""
    try:
        async with asyncio.timeout(timeout_s):
            while not await asyncio.to_thread(_is_healthy, url):  # noqa: ASYNC110 - another process: there is no event
                await asyncio.sleep(HEALTH_POLL_S)
    except TimeoutError as error:
        raise StartUpError(f"{url}/health does not answer 200 within {timeout_s:g} s") from error


def _is_healthy(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says: it is ours
    try:
        with direct.open(f"{url}/health", timeout=HEALTH_TIMEOUT_S) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except OSError:
        return False


def parse_engine_argv(argv: tuple[str, ...]) -> ParsedFlags:
    """Have vLLM's own parser read the flags, the model first. Raises StartUpError with its complaint."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PARSE],
            input=msgspec.json.encode(argv),
            capture_output=True,
            timeout=PARSE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise StartUpError(f"vLLM's parser did not answer within {PARSE_TIMEOUT_S:g} s") from error
    if done.returncode == _BAD_FLAGS:
        raise StartUpError(_marked(done.stderr))
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise StartUpError(f"vLLM cannot be imported or read its flags: {last[0] if last else 'no reason given'}")
    return msgspec.json.decode(_marked(done.stdout), type=ParsedFlags)


def _marked(output: bytes) -> str:
    """What follows our mark: vLLM writes lines of its own before it."""
    return output.decode(errors="replace").rpartition("KVFERRY ")[2].strip()
