"""Which settings of the number of instances, and of the places where they run, cannot be? Each is one line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.config import ServeConfig

MOST_INSTANCES = 64


def check(config: ServeConfig) -> None:
    """Raises ConfigError."""
    least, most = config.autoscale_min, config.most_instances
    _require(1 <= least <= MOST_INSTANCES, f"--autoscale-min is {least}, it must be from 1 to {MOST_INSTANCES}")
    _require(
        0 <= config.autoscale_max <= MOST_INSTANCES,
        f"--autoscale-max is {config.autoscale_max}, it must be from 1 to {MOST_INSTANCES}, or 0 for --instances",
    )
    _require(
        least <= config.instances <= most,
        f"--instances is {config.instances}, outside --autoscale-min {least} and --autoscale-max {most}",
    )
    low, high = config.autoscale_low_steps, config.autoscale_high_steps
    _require(
        0 < low < high < math.inf,
        f"--autoscale-low-steps is {low:g} and --autoscale-high-steps {high:g}: 0 < low < high must hold",
    )
    for name, seconds in (
        ("--autoscale-period-s", config.autoscale_period_s),
        ("--autoscale-cooldown-s", config.autoscale_cooldown_s),
        ("--retire-timeout-s", config.retire_timeout_s),
    ):
        _require(seconds > 0, f"{name} is {seconds:g}, not above 0")
    resources(config)
    labels(config)


def resources(config: ServeConfig) -> tuple[tuple[str, float], ...]:
    """(name, amount) of what each instance holds of Ray's custom resources. Raises ConfigError."""
    flag = "--instance-resources"
    return tuple((name, _amount(name, text, flag)) for name, text in _pairs(config.instance_resources, flag))


def labels(config: ServeConfig) -> tuple[tuple[str, str], ...]:
    """(name, value) of what an instance's node must have. Raises ConfigError."""
    return _pairs(config.instance_labels, "--instance-labels")


def _pairs(text: str, flag: str) -> tuple[tuple[str, str], ...]:
    """What NAME=VALUE,NAME=VALUE says."""
    pairs: list[tuple[str, str]] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        _require(bool(name and equals and value), f"{flag}: {item!r} is not of the form NAME=VALUE")
        pairs.append((name, value))
    names = [name for name, _ in pairs]
    _require(len(names) == len(set(names)), f"{flag} names something twice: {text}")
    return tuple(pairs)


def _amount(name: str, text: str, flag: str) -> float:
    """As Ray takes it: a share of one, or whole ones."""
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    is_one_of_ray = 0 < amount <= 1 or (1 < amount < math.inf and amount.is_integer())
    _require(is_one_of_ray, f"{flag}: {name}={text} is not of the form NAME=AMOUNT, a share of one or a whole number")
    return amount


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise ConfigError(reason)
