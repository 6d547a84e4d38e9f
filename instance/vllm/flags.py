"""What did the user ask of vLLM? A `vllm serve` argument list, read by vLLM's own parser, with our defaults under it.

Gateways and instances of one fleet read the same list with these two functions, so they agree on every setting.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from instance.vllm import compat

MAX_CPU_BATCHED_TOKENS = 32_768
"""Our CPU default of `max_num_batched_tokens` is the model's length, but not more than this (activations grow with
it)."""
CPU_MEMORY_SHARE = 0.6
"""Of the machine's memory, for all instances on it, their weights included; on the CPU the rest has other uses."""

_WEIGHTS = ("config.json", "params.json")


class FlagError(ValueError):
    """The arguments cannot be used; the text is one line that says which and why."""


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, except that a mistake is an exception and does not end the process."""

    def error(self, message: str) -> NoReturn:
        raise FlagError(_one_line(message))


def parse_serve_argv(argv: Sequence[str]) -> argparse.Namespace:
    """Read `vllm serve` arguments, the model first. Raises `FlagError` (one line)."""
    parser = make_arg_parser(_Parser(prog="kvferry serve", add_help=False))
    parser.set_defaults(scheduling_policy="priority")  # without priorities it is first come first served, too
    if current_platform.is_cpu():
        parser.set_defaults(enforce_eager=True)
    try:
        namespace: argparse.Namespace = parser.parse_args(list(argv))
        validate_parsed_serve_args(namespace)
    except (ValueError, TypeError, OSError) as error:
        raise error if isinstance(error, FlagError) else FlagError(_one_line(str(error))) from error
    if namespace.model_tag is not None:
        namespace.model = namespace.model_tag
    elif not any(str(argument).startswith(("--model", "--config")) for argument in argv):
        raise FlagError("name a model first: its folder, or its name on the hub")
    _check_model_path(namespace.model)
    _check_adapters(namespace)
    if namespace.data_parallel_size > 1:
        raise FlagError("--data-parallel-size: kvferry runs several instances itself; use its --instances")
    # With this cache a front end sends an image's hash in place of its pixels when it has sent them before; but perhaps
    # to another engine, and a request that moves needs them again.
    namespace.mm_processor_cache_gb = 0
    if current_platform.is_cpu() and namespace.distributed_executor_backend is None:
        namespace.distributed_executor_backend = "uni" if namespace.tensor_parallel_size == 1 else "mp"
    return namespace


def with_memory_share(argv: Sequence[str], num_sharing: int) -> tuple[str, ...]:
    """On a machine without a GPU: a share of its memory for one of `num_sharing` instances, unless the user says how
    much. vLLM by itself would reserve 92 % of it for each. Raises `FlagError` (one line)."""
    if not current_platform.is_cpu() or "VLLM_CPU_KVCACHE_SPACE" in os.environ or any(map(_says_memory, argv)):
        return tuple(argv)
    num_processes = num_sharing * parse_serve_argv(argv).tensor_parallel_size
    return (*argv, "--gpu-memory-utilization", f"{CPU_MEMORY_SHARE / num_processes:.4f}")


def _says_memory(argument: str) -> bool:
    name = argument.partition("=")[0].replace("_", "-")
    return name in {"--gpu-memory-utilization", "--kv-cache-memory-bytes", "--config"}


def engine_config(namespace: argparse.Namespace) -> Any:
    """The `VllmConfig` of these arguments, with our scheduler and worker extension in it. Raises `FlagError` (one
    line)."""
    arguments = AsyncEngineArgs.from_cli_args(namespace)
    try:
        if current_platform.is_cpu() and arguments.max_num_batched_tokens is None:
            # A seeded prompt must not be chunked on CPU (scheduler.py says why): give every prompt room in one step.
            max_model_len = arguments.create_model_config().max_model_len
            wanted = max(max_model_len, arguments.max_num_seqs or 256)
            arguments.max_num_batched_tokens = min(wanted, MAX_CPU_BATCHED_TOKENS)
        config = arguments.create_engine_config()
    except (ValueError, TypeError, OSError, NotImplementedError, RuntimeError, ImportError) as error:
        raise FlagError(f"{namespace.model}: {_first_reason(error)}") from error
    _place_hooks(config)
    return config


def has_our_hooks(config: Any) -> bool:
    """False: the user has set a scheduler or worker extension of their own, so no request can be moved."""
    scheduler_cls = config.scheduler_config.scheduler_cls
    name = scheduler_cls if isinstance(scheduler_cls, str) else getattr(scheduler_cls, "__module__", "")
    return str(name).startswith("instance.vllm.") and str(config.parallel_config.worker_extension_cls).startswith(
        "instance.vllm."
    )


def _place_hooks(config: Any) -> None:
    """Chosen after the configuration is made: only then it is known whether scheduling is asynchronous."""
    if config.scheduler_config.scheduler_cls is not None or config.parallel_config.worker_extension_cls:
        return
    if compat.why_unsupported() is not None:
        return  # it serves as it is; `EngineFacts.migration_refused_because` tells
    kind = "FerryAsyncScheduler" if config.scheduler_config.async_scheduling else "FerryScheduler"
    config.scheduler_config.scheduler_cls = f"instance.vllm.scheduler.{kind}"
    config.parallel_config.worker_extension_cls = "instance.vllm.worker.FerryWorkerExtension"


def _check_model_path(model: str) -> None:
    """A path that is not there is reported as such, before the hub is asked for a model of that name."""
    path = Path(model).expanduser()
    if not path.exists():
        if _is_local(model):
            raise FlagError(f"no model at {model}: there is no such folder")
        return
    if path.is_dir() and not any((path / name).is_file() for name in _WEIGHTS):
        raise FlagError(f"no model at {model}: the folder has no config.json")


def _check_adapters(namespace: argparse.Namespace) -> None:
    """Of --lora-modules. vLLM itself would notice at the first request that names one."""
    modules = namespace.lora_modules or ()
    if modules and not namespace.enable_lora:
        raise FlagError("--lora-modules needs --enable-lora")
    for module in modules:
        check_adapter_path(module.name, module.path)


def check_adapter_path(name: str, location: str) -> None:
    """Raises `FlagError` (one line) for a folder that is not there, or holds no adapter; a name on the hub may come."""
    path = Path(location).expanduser()
    if not path.exists():
        if _is_local(location) or len(path.parts) == 1:
            raise FlagError(f"no LoRA adapter {name} at {location}: there is no such folder")
        return
    if not (path / "adapter_config.json").is_file():
        raise FlagError(f"no LoRA adapter {name} at {location}: the folder has no adapter_config.json")


def _is_local(location: str) -> bool:
    """It can only be meant as a path: names on the hub have two parts."""
    parts = Path(location).expanduser().parts
    return location.startswith(("/", ".", "~")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def _first_reason(error: BaseException) -> str:
    """The reason inside a pydantic validation error (whose text is a page), or the error's own text."""
    listing = getattr(error, "errors", None)
    if callable(listing):
        details: Any = listing()
        if details:
            return _one_line(str(details[0].get("msg", error)))
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]
