"""What was kvferry told? Flags over KVFERRY_* variables over a YAML file over defaults; read once, checked here.

The only module that reads the environment and configuration files.
"""

from __future__ import annotations

import dataclasses
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from instance.spec import Carrier
from orchestrator import config_scaling
from orchestrator.access import ClientAccess, ServerAccess, is_loopback
from orchestrator.errors import ConfigError
from orchestrator.gateway.priorities import digest_in, key_digest
from orchestrator.policy.dispatch import Rule
from orchestrator.policy.levels import DEFAULT_LEVELS, BadLevel, Levels, parse_levels
from orchestrator.policy.targets import parse_classes
from orchestrator.priority_classes import MAX_KEYS

PREFIX = "KVFERRY_"
MIN_TOKEN_CHARS = 16
CLIENT_FLAGS = ("admin_token_file", "admin_ca", "admin_cert", "admin_key")
"""Of the commands that speak to the admin API."""
DEFAULT_ADMIN = "127.0.0.1:50051"
DIGEST_PREFIX = "sha256:"
"""Of an API key that is given by its digest."""
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class Engine(Enum):
    """Which engine the instances hold."""

    VLLM = "vllm"
    FAKE = "fake"
    """The deterministic model of an engine; for tests of everything around it."""


class Placement(Enum):
    """On which nodes of a Ray cluster the instances are put."""

    PACK = "pack"
    """One node is filled first."""
    SPREAD = "spread"
    """On as many nodes as there are."""


AS_MANY = 0
"""Of --autoscale-max: as many as --instances."""
AS_SUITS = -1.0
"""Of --copy-mb-per-s: not given."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What `kvferry serve` needs; `admin_port` has the flag --admin-port and the variable KVFERRY_ADMIN_PORT."""

    model: str
    engine_argv: tuple[str, ...] = ()
    """`vllm serve` flags, as the user wrote them."""
    instances: int = 2
    gateways: int = 1
    host: str = "127.0.0.1"
    """Where the OpenAI endpoint listens. All but the admin API listens on 127.0.0.1."""
    port: int = 8000
    admin_port: int = 50051
    admin_host: str = "127.0.0.1"
    """Where the admin API listens; elsewhere than on loopback only with a token."""
    admin_token: str = dataclasses.field(default="", repr=False)
    """Bearer token of the admin API (KVFERRY_ADMIN_TOKEN; no flag: others can read a command line)."""
    admin_token_file: str = ""
    admin_tls_cert: str = ""
    admin_tls_key: str = ""
    admin_client_ca: str = ""
    ray_address: str = ""
    """Empty: a Ray of our own, which ends with us."""
    engine: Engine = Engine.VLLM
    carrier: Carrier = Carrier.SHM
    carrier_checksum: bool = False
    copy_mb_per_s: float = AS_SUITS
    dispatch: Rule = Rule.FREENESS
    rebalance: bool = True
    tick_s: float = 0.5
    threshold_steps: float = 512.0
    margin_steps: float = 64.0
    rest_s: float = 1.0
    max_migrations: int = 2
    autoscale: bool = False
    autoscale_min: int = 1
    """Also for `kvferry scale`."""
    autoscale_max: int = AS_MANY
    """Also for `kvferry scale`, and what the memory of a machine without GPUs is shared out for."""
    autoscale_low_steps: float = 160.0
    autoscale_high_steps: float = 960.0
    autoscale_period_s: float = 10.0
    autoscale_cooldown_s: float = 60.0
    retire_timeout_s: float = 600.0
    placement: Placement = Placement.PACK
    instance_resources: str = ""
    """Of Ray, as NAME=AMOUNT,...: held by each instance besides its GPUs."""
    instance_labels: str = ""
    """Of Ray's nodes, as NAME=VALUE,...: where instances may be."""
    start_timeout_s: float = 300.0
    priority_levels: str = DEFAULT_LEVELS
    priority_keys: str = ""
    """File of API keys and the level of each."""
    key_priorities: tuple[tuple[str, int], ...] = dataclasses.field(default=(), repr=False)
    """What that file says: (digest of a key, priority); has no flag."""
    slo_classes: str = ""
    """`NAME=TTFT_MS/TPOT_MS,...`: targets of requests that name a class."""
    journal: str = ""
    journal_part_mib: int = 32
    journal_parts: int = 4
    log_level: str = "INFO"
    token: str = dataclasses.field(default="", repr=False)
    """The fleet's shared secret (KVFERRY_TOKEN; no flag: others can read a command line). Empty: made for the run."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "name a model: its folder, or its name on the hub")
        _require(1 <= self.instances <= 64, f"--instances is {self.instances}, it must be from 1 to 64")
        _require(0 <= self.gateways <= 16, f"--gateways is {self.gateways}, it must be from 0 to 16")
        _require(0 <= self.port <= 65535, f"--port is {self.port}, it must be from 0 to 65535")
        _require(0 <= self.admin_port <= 65535, f"--admin-port is {self.admin_port}, it must be from 0 to 65535")
        _require(self.port != self.admin_port or self.port == 0, f"--port and --admin-port are both {self.port}")
        _require(
            self.port != 0 or self.gateways <= 1, "--port 0 (any free port) needs --gateways 1: gateways share one"
        )
        _require(0.05 <= self.tick_s <= 60, f"--tick-s is {self.tick_s:g}, it must be from 0.05 to 60")
        _require(self.margin_steps >= 0, f"--margin-steps is {self.margin_steps:g}, it cannot be negative")
        _require(self.threshold_steps >= 0, f"--threshold-steps is {self.threshold_steps:g}, it cannot be negative")
        _require(self.rest_s >= 0, f"--rest-s is {self.rest_s:g}, it cannot be negative")
        _require(1 <= self.max_migrations <= 16, f"--max-migrations is {self.max_migrations}, it must be from 1 to 16")
        _require(self.start_timeout_s > 0, f"--start-timeout-s is {self.start_timeout_s:g}, it must be positive")
        _require(
            not (self.carrier is Carrier.NCCL and self.carrier_checksum),
            "--carrier nccl knows no checksums: leave --carrier-checksum out, or use --carrier shm or --carrier tcp",
        )
        _require(
            self.copy_mb_per_s >= 0 or self.copy_mb_per_s == AS_SUITS,
            f"--copy-mb-per-s is {self.copy_mb_per_s:g}, it must be a rate, or 0 for no limit",
        )
        config_scaling.check(self)
        parts, part_mib = self.journal_parts, self.journal_part_mib
        _require(1 <= part_mib <= 4096, f"--journal-part-mib is {part_mib}, it must be from 1 to 4096")
        _require(1 <= parts <= 1000, f"--journal-parts is {parts}, it must be from 1 to 1000")
        _require(
            bool(self.admin_token or self.admin_token_file) or is_loopback(self.admin_host),
            f"--admin-host {self.admin_host} can be reached from other machines: give the admin API a token,"
            " with KVFERRY_ADMIN_TOKEN or --admin-token-file",
        )
        _require(
            bool(self.admin_tls_cert) == bool(self.admin_tls_key),
            "--admin-tls-cert and --admin-tls-key belong together",
        )
        _require(
            not self.admin_client_ca or bool(self.admin_tls_cert),
            "--admin-client-ca needs --admin-tls-cert and --admin-tls-key",
        )
        try:
            parse_levels(self.priority_levels)
        except BadLevel as error:
            raise ConfigError(f"--priority-levels: {error}") from error
        try:
            parse_classes(self.slo_classes)
        except ValueError as error:
            raise ConfigError(f"--slo-classes: {error}") from error
        levels = ("DEBUG", "INFO", "WARNING", "ERROR")
        _require(self.log_level in levels, f"--log-level is {self.log_level!r}, it must be one of {', '.join(levels)}")

    @property
    def most_instances(self) -> int:
        """There will never be more of them."""
        return self.instances if self.autoscale_max == AS_MANY else self.autoscale_max


def serve_config(
    flags: Mapping[str, object], environment: Mapping[str, str], file: Path | None, engine_argv: tuple[str, ...]
) -> ServeConfig:
    """Merge the three sources. `flags` that are None were not given. Raises ConfigError (one line)."""
    hints = get_type_hints(ServeConfig)
    in_file = _read_file(file) if file is not None else {}
    merged: dict[str, Any] = {}
    file_argv = in_file.pop("engine_argv", [])
    if not isinstance(file_argv, list):
        raise ConfigError(f"{file}: engine_argv must be a list, such as ['--max-model-len', '2048']")
    for field in dataclasses.fields(ServeConfig):
        if field.name in ("engine_argv", "key_priorities"):
            continue
        variable = PREFIX + field.name.upper()
        flag = flags.get(field.name)
        if flag is not None:
            merged[field.name] = _parsed(flag, hints[field.name], "--" + field.name.replace("_", "-"))
        elif variable in environment:
            merged[field.name] = _parsed(environment[variable], hints[field.name], variable)
        elif field.name in in_file:
            merged[field.name] = _parsed(in_file[field.name], hints[field.name], f"{file}: {field.name}")
        in_file.pop(field.name, None)
    if in_file:
        raise ConfigError(f"{file}: unknown setting {sorted(in_file)[0]!r}")
    merged.setdefault("model", "")
    if flags.get("admin_token_file"):
        merged.pop("admin_token", None)  # a flag beats a variable, as for the commands
    config = ServeConfig(**merged, engine_argv=(*(str(argument) for argument in file_argv), *engine_argv))
    if not config.priority_keys:
        return config
    keys = _read_keys(Path(config.priority_keys), parse_levels(config.priority_levels))
    return dataclasses.replace(config, key_priorities=keys)


def serve_config_here(flags: Mapping[str, object], file: Path | None, engine_argv: tuple[str, ...]) -> ServeConfig:
    """`serve_config` with the environment of this process; KVFERRY_CONFIG names the file when no flag does."""
    named = os.environ.get(PREFIX + "CONFIG")
    return serve_config(flags, os.environ, file or (Path(named) if named else None), engine_argv)


def data_folder(flag: Path | None) -> Path | None:
    """Where published workloads lie: the flag, else KVFERRY_DATA; None: nobody said."""
    named = os.environ.get(PREFIX + "DATA")
    return flag or (Path(named) if named else None)


def admin_address(flag: str | None) -> str:
    """`host:port` of the admin API: the flag, else KVFERRY_ADMIN, else port KVFERRY_ADMIN_PORT, else the default."""
    port = os.environ.get(PREFIX + "ADMIN_PORT")
    address = flag or os.environ.get(PREFIX + "ADMIN") or (f"127.0.0.1:{port}" if port else DEFAULT_ADMIN)
    host, colon, number = address.rpartition(":")
    if not colon or not host or not number.isdecimal():
        raise ConfigError(f"the admin address {address!r} is not of the form HOST:PORT")
    return address


def server_access(config: ServeConfig) -> ServerAccess:
    """Read the files that the settings name. Raises ConfigError."""
    certificate, key = _pair(config.admin_tls_cert, config.admin_tls_key, "--admin-tls-cert")
    return ServerAccess(
        token=_token(config.admin_token, config.admin_token_file),
        certificate=certificate,
        key=key,
        client_ca=_authorities(config.admin_client_ca, "--admin-client-ca"),
    )


def client_access(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> ClientAccess:
    """What a command shows to the admin API. `flags` by the names of `CLIENT_FLAGS`; None was not given. Raises
    ConfigError."""
    given = {name: flags.get(name) or environment.get(PREFIX + name.upper(), "") for name in CLIENT_FLAGS}
    token_file = given["admin_token_file"]
    token = "" if flags.get("admin_token_file") else environment.get(f"{PREFIX}ADMIN_TOKEN", "")
    certificate, key = _pair(given["admin_cert"], given["admin_key"], "--admin-cert")
    authorities = _authorities(given["admin_ca"], "--admin-ca")
    _require(not certificate or bool(authorities), "--admin-cert needs --admin-ca: which certificates to trust")
    return ClientAccess(_token(token, token_file), authorities, certificate, key)


def client_access_here(flags: Mapping[str, str | None]) -> ClientAccess:
    """`client_access` with the environment of this process."""
    return client_access(flags, os.environ)


def _token(token: str, path: str) -> str:
    """The token, else what its file holds; empty without either."""
    text = token.strip() or (_bytes(path, "--admin-token-file").decode(errors="replace").strip() if path else "")
    where = "KVFERRY_ADMIN_TOKEN" if token.strip() else path
    is_fit = len(text) >= MIN_TOKEN_CHARS and text.isascii() and text.isprintable() and " " not in text
    _require(
        (not text and not path) or is_fit,
        f"the token in {where} must have at least {MIN_TOKEN_CHARS} ASCII characters and no blank",
    )
    return text


def _pair(certificate: str, key: str, flag: str) -> tuple[bytes, bytes]:
    """A certificate and its key, both or none."""
    _require(bool(certificate) == bool(key), f"{flag} and its key belong together")
    if not certificate:
        return b"", b""
    texts = _bytes(certificate, flag), _bytes(key, flag)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{flag}: {certificate} and {key} are no certificate and its key, in PEM") from error
    return texts


def _authorities(path: str, flag: str) -> bytes:
    if not path:
        return b""
    text = _bytes(path, flag)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{flag}: {path} holds no certificate in PEM") from error
    return text


def _bytes(path: str, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot read {path}: {error.strerror}") from error


def _read_keys(path: Path, levels: Levels) -> tuple[tuple[str, int], ...]:
    """YAML: `KEY: LEVEL`, or `sha256:DIGEST: LEVEL` in quotes. Only digests leave this function, in errors neither
    appears: keys are told by their line. Raises ConfigError."""
    entries = _read_yaml(path, is_secret=True)
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"--priority-keys: {path} must hold keys and their levels, such as `some-key: high`")
    found: dict[str, int] = {}
    for number, (key, level) in enumerate(entries.items(), start=1):
        where = f"--priority-keys: {path}, entry {number}"
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{where}: the key must be text, in quotes where it looks like a number")
        digest = (
            digest_in(key.removeprefix(DIGEST_PREFIX)) if key.startswith(DIGEST_PREFIX) else key_digest(key.encode())
        )
        if digest is None:
            raise ConfigError(f"{where}: {DIGEST_PREFIX} must be followed by 64 hexadecimal digits")
        if digest in found:
            raise ConfigError(f"{where}: the same key is there twice")
        try:
            found[digest] = levels.priority(str(level))
        except BadLevel:  # not in its words: they repeat the value, and the two sides of a line are easily swapped
            names = ", ".join(one.name for one in levels.levels)
            raise ConfigError(f"{where}: its level must be one of {names}, or a whole number") from None
    if len(found) > MAX_KEYS:
        raise ConfigError(f"--priority-keys: {path} has {len(found)} keys, {MAX_KEYS} are the most there can be")
    return tuple(sorted(found.items()))


def _read_file(path: Path) -> dict[str, Any]:
    content = _read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold settings, such as `instances: 2`")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _read_yaml(path: Path, *, is_secret: bool = False) -> Any:
    """`is_secret`: no word of the file may stand in an error. Raises ConfigError."""
    import yaml  # noqa: PLC0415 - only needed here

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise ConfigError(f"{path} is not YAML{where if is_secret else ': ' + ' '.join(str(error).split())}") from None


def _parsed(value: object, kind: type, where: str) -> object:
    """The value as the field's type. Raises ConfigError naming where it was written."""
    text = str(value).strip()
    try:
        if kind is bool:
            if text.lower() in _TRUE | _FALSE:
                return text.lower() in _TRUE
            raise ValueError
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
        if issubclass(kind, Enum):
            return kind(text)
    except ValueError as error:
        raise ConfigError(f"{where} is {text!r}, it must be {_meaning(kind)}") from error
    return text.upper() if where.lower().replace("-", "_").endswith("log_level") else text


def _meaning(kind: type) -> str:
    if kind is bool:
        return "true or false"
    if issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    return "a whole number" if kind is int else "a number"


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ConfigError(reason)
