"""Is a LoRA adapter here the one that the source meant? Loaded when first named, and told apart by its files' digest.

A name, a path and a number say nothing about what another machine, or a later day, has there.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from vllm.lora.request import LoRARequest
from vllm.v1.engine.core import EngineCore

from instance.vllm.codec import Adapter

MAX_REMEMBERED = 4096
"""Adapters whose digest is kept, the latest loaded; vLLM itself holds far fewer."""

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""In the order in which vLLM prefers them."""

Stamp = tuple[tuple[str, int, int], ...]
"""(name, bytes, modified at in ns) of each file that counts."""


@dataclass(frozen=True, slots=True)
class _Known:
    """An adapter as it was when this engine loaded it."""

    name: str
    path: str
    stamp: Stamp | None
    """None: its path is no folder of this machine (a name on the hub)."""
    digest: str


class Adapters:
    """What one engine knows of the adapters it has been asked for. Called between two steps."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        config = core.vllm_config.lora_config
        self._dtype = None if config is None else str(config.lora_dtype)
        self._known: OrderedDict[int, _Known] = OrderedDict()

    def load(self, adapter: LoRARequest | None) -> str | None:
        """Have it loaded, if it is not; one line that says why this engine cannot use it, or None.

        vLLM itself would load it inside a step, and end with the step if it cannot, or, without --enable-lora, leave it
        out and tell nobody.
        """
        if adapter is None:
            return None
        if self._dtype is None:
            return f"this instance serves no LoRA adapters (--enable-lora); the request asks for {adapter.lora_name}"
        known = None if adapter.load_inplace else self._known.get(adapter.lora_int_id)
        if known is not None and (known.name, known.path) != (adapter.lora_name, adapter.lora_path):
            return f"LoRA adapter {adapter.lora_int_id} is {known.name} here, not {adapter.lora_name}"
        before = _stamp(adapter.lora_path)
        try:
            self._core.add_lora(adapter)  # also a known one: vLLM may have dropped it for another since
        except Exception as error:  # noqa: BLE001 - files can be broken in any way; it costs one request, not the engine
            reason = " ".join(str(error).split())[:300]
            return f"the LoRA adapter {adapter.lora_name} does not load: {reason or type(error).__name__}"
        if known is not None:
            return None
        digest = "" if before is None else _digest(adapter.lora_path, self._dtype)
        self._known[adapter.lora_int_id] = _Known(adapter.lora_name, adapter.lora_path, before, digest)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return None

    def identity(self, adapter: LoRARequest | None) -> Adapter | str | None:
        """What a destination compares; a text says why it cannot be told. None: there is no adapter."""
        if adapter is None:
            return None
        known = self._known.get(adapter.lora_int_id)
        if known is None:
            return "its LoRA adapter is not known"
        if known.stamp is None:
            return "its LoRA adapter is not in a folder of this machine"
        if _stamp(known.path) != known.stamp:
            return "the files of its LoRA adapter have changed since they were loaded"
        return Adapter(known.name, known.path, known.digest)

    def why_another(self, adapter: LoRARequest | None, described: Adapter | None) -> str | None:
        """Load it if need be; one line that says why a request cannot go on here with the adapter it had, or None."""
        if (adapter is None) != (described is None):
            return "its LoRA adapter is not the described one"
        reason = self.load(adapter)
        if reason is not None:
            return reason
        here = self.identity(adapter)
        if here == described:
            return None
        if isinstance(here, str):
            return here
        return f"the LoRA adapter {'' if described is None else described.name} has other files here"


def _files(folder: Path) -> list[Path]:
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    return [file for file in (folder / _CONFIG, weights) if file is not None and file.is_file()]


def _stamp(path: str) -> Stamp | None:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _files(folder))


def _digest(path: str, dtype: str) -> str:
    """Of the adapter's files and the type they are computed in."""
    parts = [dtype]
    for file in _files(Path(path).expanduser()):
        with file.open("rb") as stream:
            parts += [file.name, hashlib.file_digest(stream, "sha256").hexdigest()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
