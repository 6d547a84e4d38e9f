"""Which of flag, variable, file and default wins, and which settings contradict each other?"""

from __future__ import annotations

from pathlib import Path

import pytest

from instance.spec import Carrier
from orchestrator.config import Engine, ServeConfig, admin_address, serve_config
from orchestrator.errors import ConfigError
from orchestrator.runtime.compose import instance_resources
from orchestrator.runtime.ray_cluster import Resources


def test_a_flag_beats_a_variable_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "kvferry.yaml"
    file.write_text(
        "model: from-file\ninstances: 5\ngateways: 5\nadmin-port: 6000\nengine_argv: ['--max-model-len', 2048]\n"
    )
    environment = {"KVFERRY_GATEWAYS": "4", "KVFERRY_INSTANCES": "4", "KVFERRY_REBALANCE": "off", "HOME": "/"}
    settings = serve_config({"instances": 3, "gateways": None}, environment, file, ("--seed", "1"))
    assert (settings.instances, settings.gateways, settings.admin_port, settings.port) == (3, 4, 6000, 8000)
    assert settings.model == "from-file" and settings.rebalance is False
    assert settings.engine_argv == ("--max-model-len", "2048", "--seed", "1"), "flags follow, so they win"


def test_values_are_read_as_the_fields_type() -> None:
    environment = {"KVFERRY_TICK_S": "0.25", "KVFERRY_ENGINE": "fake", "KVFERRY_LOG_LEVEL": "debug"}
    environment |= {"KVFERRY_CARRIER": "tcp", "KVFERRY_CARRIER_CHECKSUM": "yes"}
    settings = serve_config({"model": "m"}, environment, None, ())
    assert (settings.carrier, settings.carrier_checksum) == (Carrier.TCP, True)
    assert (settings.tick_s, settings.engine, settings.log_level) == (0.25, Engine.FAKE, "DEBUG")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"instances": 0}, "--instances"),
        ({"gateways": 17}, "--gateways"),
        ({"port": 70000}, "--port"),
        ({"port": 5, "admin_port": 5}, "both 5"),
        ({"port": 0, "gateways": 2}, "--port 0"),
        ({"tick_s": 0.0}, "--tick-s"),
        ({"margin_steps": -1.0}, "--margin-steps"),
        ({"max_migrations": 0}, "--max-migrations"),
        ({"log_level": "LOUD"}, "--log-level"),
        ({"engine": "magic"}, "vllm, fake"),
        ({"model": ""}, "name a model"),
        ({"carrier": "pigeon"}, "--carrier is 'pigeon', it must be one of shm, tcp, nccl"),
        ({"carrier": "nccl", "carrier_checksum": True}, "knows no checksums"),
        ({"copy_mb_per_s": -2.0}, "--copy-mb-per-s"),
        ({"autoscale_min": 0}, "--autoscale-min is 0"),
        ({"autoscale_max": 65}, "--autoscale-max is 65"),
        ({"instances": 3, "autoscale_max": 2}, "--instances is 3, outside --autoscale-min 1 and --autoscale-max 2"),
        ({"instances": 1, "autoscale_min": 2, "autoscale_max": 4}, "--instances is 1, outside"),
        ({"autoscale_low_steps": 900.0, "autoscale_high_steps": 100.0}, "0 < low < high"),
        ({"autoscale_period_s": 0.0}, "--autoscale-period-s is 0, not above 0"),
        ({"retire_timeout_s": -1.0}, "--retire-timeout-s"),
        ({"placement": "anywhere"}, "--placement is 'anywhere', it must be one of pack, spread"),
        ({"instance_resources": "tpu"}, "--instance-resources: 'tpu' is not of the form NAME=VALUE"),
        ({"instance_resources": "tpu=many"}, "tpu=many is not of the form NAME=AMOUNT"),
        ({"instance_resources": "tpu=1.5"}, "tpu=1.5 is not of the form NAME=AMOUNT"),
        ({"instance_labels": "zone=a,zone=b"}, "--instance-labels names something twice"),
    ],
)
def test_settings_that_cannot_be_are_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        serve_config({"model": "m", **settings}, {}, None, ())


def test_what_instances_hold_and_where_they_may_be_is_read_as_pairs() -> None:
    environment = {"KVFERRY_INSTANCE_RESOURCES": "tpu=2, disk=0.5", "KVFERRY_INSTANCE_LABELS": "zone=a,kind=big"}
    environment |= {"KVFERRY_PLACEMENT": "spread", "KVFERRY_AUTOSCALE": "yes", "KVFERRY_AUTOSCALE_MAX": "5"}
    settings = serve_config({"model": "m"}, environment, None, ())
    assert settings.autoscale and (settings.instances, settings.most_instances) == (2, 5)
    held = instance_resources(settings, num_gpus=0)
    assert held == Resources(0, (("tpu", 2.0), ("disk", 0.5)), (("zone", "a"), ("kind", "big")), is_spread=True)
    assert held.options() == {
        "resources": {"kvferry_instance": 1.0, "tpu": 2.0, "disk": 0.5},
        "label_selector": {"zone": "a", "kind": "big"},
        "scheduling_strategy": "SPREAD",
    }
    assert str(held) == "1 kvferry_instance, 2 tpu, 0.5 disk, a node with zone=a, a node with kind=big"
    assert Resources(2.0).options() == {"num_gpus": 2.0}
    assert ServeConfig(model="m").most_instances == 2, "as many as --instances, unless it is said"


def test_two_free_ports_do_not_contradict_each_other() -> None:
    assert ServeConfig(model="m", port=0, admin_port=0).port == 0


@pytest.mark.parametrize("text", ["instances: [", "- a", "engine_argv: 7", "no_such: 1"])
def test_a_file_that_is_no_settings_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "kvferry.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"kvferry\.yaml"):
        serve_config({"model": "m"}, {}, file, ())


def test_the_admin_address_comes_from_the_flag_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert admin_address(None) == "127.0.0.1:50051"
    monkeypatch.setenv("KVFERRY_ADMIN_PORT", "7000")
    assert admin_address(None) == "127.0.0.1:7000"
    monkeypatch.setenv("KVFERRY_ADMIN", "host:8000")
    assert admin_address(None) == "host:8000"
    assert admin_address("other:1") == "other:1"
    with pytest.raises(ConfigError, match="HOST:PORT"):
        admin_address("other")
