"""What does an instance do that forgets to send the sampler's state? Sabotage for a negative control.

With this folder on PYTHONPATH every Python process runs this file first. It lets `instance.vllm.codec` load as ever
and then replaces its `encode_state` by one that leaves the generator out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

SABOTAGED = "instance.vllm.codec"


class _Saboteur(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != SABOTAGED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        assert spec is not None and spec.loader is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_sabotage(module: Any) -> None:
            execute(module)
            encode = module.encode_state
            module.encode_state = lambda state: encode(module.msgspec.structs.replace(state, generator=None))

        loader.exec_module = execute_and_sabotage
        return spec


sys.meta_path.insert(0, _Saboteur())
