"""Does vLLM's AsyncLLM still need what FleetLLM and FleetCoreClient give it, and no more? Read from the source.

FleetLLM leaves out `AsyncLLM.__init__`. A new vLLM that sets a further attribute there, or asks a further thing of its
engine core, must fail here and not in front of a client.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GATEWAY = ROOT / "orchestrator" / "gateway"

LEFT_OUT = {
    "collective_rpc_async": "RL weight transfer",
    "commit_elastic_ep": "elastic expert parallelism",
    "prepare_elastic_ep": "elastic expert parallelism",
    "compute_weight_checksums_async": "RL weight transfer",
    "get_weight_version_async": "RL weight transfer",
    "set_weight_version_async": "RL weight transfer",
    "get_kv_event_sources": "the base class answers: none",
    "get_status": "fault tolerance of one engine",
    "handle_fault": "fault tolerance of one engine",
    "pause_scheduler_async": "pausing is an instance's drain",
    "resume_scheduler_async": "pausing is an instance's drain",
    "profile_async": "profiling is an engine's business",
    "sleep_async": "sleeping is an engine's business",
    "wake_up_async": "sleeping is an engine's business",
    "release_kv_cache_memory_async": "sleeping is an engine's business",
    "remove_lora_async": "instances drop adapters by themselves, the longest unused first",
    "pin_lora_async": "which adapters an instance holds is its own affair",
}
"""What AsyncLLM may ask of its engine core and a fleet answers with NotImplementedError, and why."""


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def class_in(module: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in ast.walk(module) if isinstance(node, ast.ClassDef) and node.name == name)


def attributes_set(definition: ast.ClassDef) -> set[str]:
    """Names of `self.<name>` that `__init__` stores to."""
    init = next(node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return {
        node.attr
        for node in ast.walk(init)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def names_asked(definition: ast.ClassDef) -> set[str]:
    """Names of `self.engine_core.<name>` and, in the output handler, `engine_core.<name>`."""
    return {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Attribute) and node.value.attr == "engine_core")
            or (isinstance(node.value, ast.Name) and node.value.id == "engine_core")
        )
    }


@pytest.fixture(scope="module")
def async_llm() -> ast.ClassDef:
    spec = find_spec("vllm")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("vLLM is not installed")
    return class_in(tree(Path(spec.submodule_search_locations[0]) / "v1" / "engine" / "async_llm.py"), "AsyncLLM")


@pytest.fixture(scope="module")
def given() -> set[str]:
    """What FleetCoreClient defines, methods and attributes."""
    definition = class_in(tree(GATEWAY / "core_client.py"), "FleetCoreClient")
    methods = {node.name for node in definition.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return methods | attributes_set(definition)


def test_every_attribute_that_async_llm_sets_is_set_by_ours(async_llm: ast.ClassDef) -> None:
    ours = attributes_set(class_in(tree(GATEWAY / "async_llm.py"), "FleetLLM"))
    assert attributes_set(async_llm) - ours == set()


def test_everything_async_llm_asks_of_its_engine_core_is_answered_or_left_out_for_a_reason(
    async_llm: ast.ClassDef, given: set[str]
) -> None:
    assert names_asked(async_llm) - given == LEFT_OUT.keys()


def test_a_missing_attribute_or_question_would_be_noticed() -> None:
    """The negative control."""
    grown = ast.parse(
        "class AsyncLLM:\n"
        "    def __init__(self):\n        self.renderer: int = 1\n        self.brand_new, x = 1, 2\n"
        "    async def f(self):\n        await self.engine_core.ask_something_async()\n"
    )
    ours = attributes_set(class_in(tree(GATEWAY / "async_llm.py"), "FleetLLM"))
    assert attributes_set(class_in(grown, "AsyncLLM")) - ours == {"brand_new"}
    assert names_asked(class_in(grown, "AsyncLLM")) == {"ask_something_async"}
