"""How does an instance on a CPU schedule asynchronously, as instances on GPUs do unasked? `instance.standalone`, so.

    python -m bench.exactness_asynchronous SPEC_JSON

vLLM's CPU platform switches it off while the configuration is made, and everything behind that switch works there too:
a step is scheduled before the tokens of the step before it are known, and its output comes a step later.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from instance import standalone
from instance.environment import apply_environment
from instance.spec import InstanceSpec


@contextmanager
def asynchronous_scheduling() -> Iterator[None]:
    """Engines that are started inside of it schedule asynchronously."""
    from vllm.platforms.cpu import CpuPlatform  # noqa: PLC0415 - it reads the environment when it is imported

    platform: Any = CpuPlatform
    switch_off = platform.check_and_update_config

    def keep_on(config: Any) -> None:
        switch_off(config)
        config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = staticmethod(keep_on)
    try:
        yield
    finally:
        platform.check_and_update_config = switch_off


def main() -> None:
    apply_environment(msgspec.json.decode(sys.argv[1], type=InstanceSpec))  # as the service does, but before vLLM
    with asynchronous_scheduling():
        standalone.main()


if __name__ == "__main__":
    main()
