"""Is every mistake one clear line and exit status 2, with nothing left running?"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.model import tiny_model_path
from tests.support.serving import Done, free_port, kvferry

pytestmark = pytest.mark.timeout(240)


def is_one_line(done: Done, *words: str) -> bool:
    lines = [line for line in done.err.splitlines() if line.strip()]
    return done.status == 2 and len(lines) == 1 and all(word in lines[0] for word in ("kvferry: ", *words))


def serve(*arguments: str) -> Done:
    ports = () if "--port" in arguments else ("--port", str(free_port()))
    admin = () if "--admin-port" in arguments else ("--admin-port", str(free_port()))
    done = kvferry("serve", *arguments, *ports, *admin, timeout_s=200)
    left = [process.name() for process in psutil.Process().children(recursive=True) if "ray" in process.name()]
    assert left == [], "nothing is left running"
    return done


def test_help_is_quick_and_lists_the_commands() -> None:
    done = kvferry("--help", timeout_s=30)
    assert done.status == 0
    names = ("serve", "status", "migrate", "priority", "drain", "undrain", "scale", "replay", "demo")
    assert all(name in done.out for name in names)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.cli import run_cli; run_cli(['--help']);"
        "print(sorted({'vllm', 'ray', 'torch', 'grpc', 'fastapi', 'yaml'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_levels_and_keys_that_cannot_be_read_are_told_before_anything_starts(tmp_path: Path) -> None:
    done = serve(str(tiny_model_path()), "--priority-levels", "high:-10:2048,normal")
    assert is_one_line(done, "--priority-levels: 'normal' is no level"), done
    keys = tmp_path / "keys.yaml"
    keys.write_text("a-secret: urgent\n")
    done = serve(str(tiny_model_path()), "--priority-keys", str(keys))
    assert is_one_line(done, "--priority-keys", "entry 1") and "a-secret" not in done.err, done


def test_a_priority_that_is_a_negative_number_is_no_flag() -> None:
    done = kvferry("priority", "some-request", "-10", "--admin", "127.0.0.1:1")
    assert is_one_line(done, "nothing answers at the admin address"), done


def test_an_unknown_vllm_flag_is_named() -> None:
    done = serve(str(tiny_model_path()), "--no-such-flag", "7")
    assert is_one_line(done, "--no-such-flag"), done


def test_a_missing_model_folder_is_named() -> None:
    done = serve("./no/such/model")
    assert is_one_line(done, "no/such/model"), done


def test_no_model_at_all_says_what_to_name() -> None:
    assert is_one_line(serve(), "name a model"), "the model is missing"
    assert is_one_line(serve("--max-model-len", "2048"), "name the model first")


@pytest.mark.parametrize("flag", ["--port", "--admin-port"])
def test_a_port_in_use_is_named_with_the_flag_that_changes_it(flag: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        done = serve(str(tiny_model_path()), flag, port)
    assert is_one_line(done, port, flag), done


def test_too_little_memory_for_the_kv_cache_is_told_by_the_instance() -> None:
    arguments = ("--instances", "1", "--gateways", "0", "--max-model-len", "4096", "--kv-cache-memory-bytes", "64K")
    done = serve(str(tiny_model_path()), *arguments)
    assert is_one_line(done, "instance-0: ", "memory", "cache"), done.err


def test_nccl_where_there_is_no_gpu_is_told_with_what_to_use_instead() -> None:
    done = serve("fake", "--engine", "fake", "--gateways", "0", "--carrier", "nccl")
    assert is_one_line(done, "--carrier nccl", "--carrier tcp"), done


def test_a_flag_only_the_instance_can_judge_stops_everything() -> None:
    done = serve("fake", "--engine", "fake", "--gateways", "0", "--num-gpu-blocks-override", "0")
    assert is_one_line(done, "at least 1"), done


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("status",), "nothing answers"),
        (("status", "--json"), "nothing answers"),
        (("migrate", "x", "--to", "instance-0"), "nothing answers"),
        (("drain", "instance-0"), "nothing answers"),
        (("undrain", "instance-0"), "nothing answers"),
    ],
)
def test_nothing_at_the_admin_address_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = kvferry(*arguments, "--admin", f"127.0.0.1:{free_port()}")
    assert is_one_line(done, words, "kvferry serve"), done


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("status", "--admin", "nowhere"), "HOST:PORT"),
        (("status", "--no-such-flag"), "--no-such-flag"),
        (("migrate", "x"), "--to"),
        (("no-such-command",), "no-such-command"),
        (("serve", "m", "--instances", "0"), "--instances"),
        (("serve", "m", "--instances", "two"), "--instances"),
        (("serve", "m", "--port", "9", "--admin-port", "9"), "both 9"),
        (("serve", "m", "--carrier", "pigeon"), "--carrier"),
        (("serve", "m", "--carrier", "nccl", "--carrier-checksum"), "--carrier-checksum"),
        (("serve", "m", "--config", "no-such-file.yaml"), "no-such-file.yaml"),
        (("serve", "m", "--journal", "no/such/folder/j"), "no/such/folder"),
        (("serve", "m", "--journal", __file__), "is not a journal"),
        (("serve", "m", "--journal", "j", "--journal-parts", "0"), "--journal-parts"),
        (("replay", "no/such/journal"), "there is no file"),
        (("replay", __file__), "is not a journal"),
    ],
)
def test_a_mistake_of_our_own_flags_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    done = kvferry(*arguments)
    assert is_one_line(done, words), done


def test_a_carrier_the_demo_cannot_use_is_one_line() -> None:
    done = kvferry("demo", "--carrier", "nccl")
    assert done.status == 2 and done.err.startswith("kvferry demo: --carrier is 'nccl'"), done
    assert len(done.err.splitlines()) == 1


def test_a_setting_of_the_environment_or_the_file_is_named_where_it_stands(tmp_path: Path) -> None:
    done = kvferry("serve", "m", environment={"KVFERRY_INSTANCES": "many"})
    assert is_one_line(done, "KVFERRY_INSTANCES", "whole number"), done
    file = tmp_path / "kvferry.yaml"
    file.write_text("instance: 2\n", encoding="utf-8")
    assert is_one_line(kvferry("serve", "m", "--config", str(file)), "unknown setting 'instance'")
