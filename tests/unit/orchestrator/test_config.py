"""Which of flag, variable, file and default wins, and which settings contradict each other?"""

from __future__ import annotations

from pathlib import Path

import pytest

from instance.spec import Carrier
from orchestrator.access import ClientAccess
from orchestrator.config import Engine, ServeConfig, admin_address, client_access, serve_config, server_access
from orchestrator.errors import ConfigError
from orchestrator.gateway.priorities import key_digest
from orchestrator.runtime.compose import instance_resources
from orchestrator.runtime.ray_cluster import Resources
from tests.support.certificates import Authority


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
    environment |= {"KVFERRY_JOURNAL": "here/j", "KVFERRY_JOURNAL_PART_MIB": "8", "KVFERRY_JOURNAL_PARTS": "2"}
    environment |= {"KVFERRY_CARRIER": "tcp", "KVFERRY_CARRIER_CHECKSUM": "yes"}
    settings = serve_config({"model": "m"}, environment, None, ())
    assert (settings.journal, settings.journal_part_mib, settings.journal_parts) == ("here/j", 8, 2)
    assert (settings.carrier, settings.carrier_checksum) == (Carrier.TCP, True)
    assert (settings.tick_s, settings.engine, settings.log_level) == (0.25, Engine.FAKE, "DEBUG")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"instances": 0}, "--instances"),
        ({"journal_part_mib": 0}, "--journal-part-mib"),
        ({"journal_parts": 1001}, "--journal-parts"),
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
        (
            {"slo_classes": "interactive=500"},
            "'interactive=500' is not of the form NAME=TTFT_MS/TPOT_MS",
        ),
        ({"slo_classes": "a=5/-,a=6/-"}, "--slo-classes: the class 'a' is given twice"),
        ({"slo_classes": "a=0/5"}, "'0' is not a number of milliseconds above 0"),
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


TOKEN = "a-token-of-24-characters"


def test_the_admin_api_is_open_to_other_machines_only_with_a_token(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert serve_config({"model": "m", "admin_host": host}, {}, None, ()).admin_host == host
    with pytest.raises(ConfigError, match=r"--admin-host 0\.0\.0\.0 can be reached"):
        serve_config({"model": "m", "admin_host": "0.0.0.0"}, {}, None, ())
    open_to_all = serve_config({"model": "m", "admin_host": "0.0.0.0"}, {"KVFERRY_ADMIN_TOKEN": TOKEN}, None, ())
    assert server_access(open_to_all).token == TOKEN
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    by_file = serve_config({"model": "m", "admin_host": "0.0.0.0", "admin_token_file": str(file)}, {}, None, ())
    assert server_access(by_file).token == TOKEN
    both = serve_config(
        {"model": "m", "admin_token_file": str(file)}, {"KVFERRY_ADMIN_TOKEN": "of-the-environment"}, None, ()
    )
    assert server_access(both).token == TOKEN, "a flag beats a variable"
    assert TOKEN not in repr(open_to_all) + repr(server_access(by_file)), "secrets are not shown"


@pytest.mark.parametrize("text", ["", "short", "a token of 24 characters", "\N{SNOWMAN}" * 20])
def test_a_token_that_could_be_guessed_or_not_sent_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    settings = serve_config({"model": "m", "admin_token_file": str(file)}, {}, None, ())
    with pytest.raises(ConfigError, match="at least 16 ASCII characters"):
        server_access(settings)
    with pytest.raises(ConfigError, match="at least 16 ASCII characters"):
        client_access({"admin_token_file": str(file)}, {})


def test_a_flag_of_the_client_beats_its_variable(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    environment = {"KVFERRY_ADMIN_TOKEN": "another-token-of-24-chars", "KVFERRY_ADMIN_TOKEN_FILE": "nowhere"}
    assert client_access({"admin_token_file": str(file)}, environment).token == TOKEN
    assert client_access({}, environment).token == "another-token-of-24-chars"
    assert client_access({}, {}) == ClientAccess()


def test_certificates_are_read_and_checked(tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.sign("server").write(tmp_path, "server")
    other, other_key = authority.sign("other").write(tmp_path, "other")
    ca = tmp_path / "ca.crt"
    ca.write_bytes(authority.certificate)
    flags = {"model": "m", "admin_tls_cert": certificate, "admin_tls_key": key, "admin_client_ca": str(ca)}
    access = server_access(serve_config(flags, {}, None, ()))
    assert (access.client_ca, access.certificate) == (authority.certificate, Path(certificate).read_bytes())
    assert client_access({"admin_ca": str(ca), "admin_cert": other, "admin_key": other_key}, {}).key
    for wrong, words in (
        ({"admin_tls_key": other_key}, "are no certificate and its key"),
        ({"admin_tls_cert": str(tmp_path / "none")}, "cannot read"),
        ({"admin_client_ca": key}, "holds no certificate"),
    ):
        with pytest.raises(ConfigError, match=words):
            server_access(serve_config(flags | wrong, {}, None, ()))
    for alone in ({"admin_tls_cert": certificate}, {"admin_tls_key": key}, {"admin_client_ca": str(ca)}):
        with pytest.raises(ConfigError, match="--admin-tls-cert"):
            serve_config({"model": "m"} | alone, {}, None, ())
    with pytest.raises(ConfigError, match="--admin-cert needs --admin-ca"):
        client_access({"admin_cert": other, "admin_key": other_key}, {})


def test_levels_that_cannot_be_read_are_told_by_their_flag() -> None:
    with pytest.raises(ConfigError, match="--priority-levels: two levels have the rank 0"):
        ServeConfig(model="m", priority_levels="a:0,b:0")


def keys_in(tmp_path: Path, text: str) -> ServeConfig:
    file = tmp_path / "keys.yaml"
    file.write_text(text)
    return serve_config({"model": "m"}, {"KVFERRY_PRIORITY_KEYS": str(file)}, None, ())


def test_keys_are_kept_as_digests_and_never_shown(tmp_path: Path) -> None:
    digest = key_digest(b"other-key")
    settings = keys_in(tmp_path, f"vip-key: high\n'sha256:{digest.upper()}': 3\n")
    assert dict(settings.key_priorities) == {key_digest(b"vip-key"): -10, digest: 3}
    assert "vip-key" not in repr(settings) and digest not in repr(settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold keys and their levels"),
        ("- secret-key", "must hold keys and their levels"),
        ("secret-key: urgent", "entry 1: its level must be one of high, normal, low"),
        ("high: secret-key", "entry 1: its level must be one of"),
        ("ok: high\nsecret-key:", "entry 2: its level must be one of"),
        ("1234: high", "entry 1: the key must be text"),
        ("'sha256:secret-key': high", "entry 1: sha256: must be followed by 64"),
        (f"secret-key: high\n'sha256:{key_digest(b'secret-key')}': low", "entry 2: the same key is there twice"),
        ("secret-key: [high", "is not YAML"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_is_told_without_a_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        keys_in(tmp_path, text)
    assert "secret-key" not in str(caught.value)


def test_a_file_of_keys_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        serve_config({"model": "m", "priority_keys": str(tmp_path / "none.yaml")}, {}, None, ())
