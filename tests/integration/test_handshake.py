"""Do two real engines find out that they are not of one kind, before a block is held?"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vllm.sampling_params import SamplingParams

from instance.vllm import handshake
from instance.vllm.host import VllmEngine
from instance.vllm.weights import combined
from migration.types import Description, MigrationId, Refusal, RequestId, Reservation
from tests.support.model import tiny_model_path
from tests.support.vllm_kit import prompt_of, start_engine, submission_of

pytestmark = pytest.mark.timeout(300)
"""Engines start in it."""

R = RequestId("r")


def fine_tuned(folder: Path) -> None:
    """One tensor of it is a little larger; names, shapes and types are as before."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.0" in name and "mlp" in name)
    save_file({**tensors, name: tensors[name] * 1.01}, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[VllmEngine, VllmEngine]:
    """Of one model by name and shape; between their starts its weights were replaced."""
    model = Path(shutil.copytree(tiny_model_path(), tmp_path_factory.mktemp("model") / "tiny"))
    first = start_engine(model=model)
    fine_tuned(model)
    second = start_engine(model=model)
    # Neither is closed: that would end vLLM's process groups, which the engines of other tests in this process share.
    return first, second


def described(engine: VllmEngine) -> Description:
    assert engine.add(submission_of(R, prompt_of(1, 40), SamplingParams(max_tokens=50, ignore_eos=True))) is None
    engine.step()
    description = engine.describe(R)
    assert isinstance(description, Description)
    return description


def test_other_weights_of_the_same_name_are_refused_with_both_digests(engines: tuple[VllmEngine, VllmEngine]) -> None:
    first, second = engines
    ours, theirs = (handshake.decode(engine.facts.kv_fingerprint) for engine in engines)
    refusal = second.reserve(MigrationId("m"), described(first), 0)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == f"the source has weights of digest {ours.weights}, this instance {theirs.weights}"
    assert (second.load().reserved_blocks, second.requests()) == (0, ())
    second.check_integrity()
    # The control: with the digest it has itself, it would have held blocks.
    first.abort((R,))
    own = described(second)
    second.abort((R,))
    assert isinstance(second.reserve(MigrationId("n"), own, 0), Reservation)
    second.cancel(MigrationId("n"))
    second.check_integrity()


def test_a_rank_samples_what_it_holds_the_same_way_each_time(engines: tuple[VllmEngine, VllmEngine]) -> None:
    """The way for weights that never were in a file. On a CPU vLLM packs linear layers and drops their parameters, so
    the change above is out of its sight: files come first."""
    first, second = (engine._core.collective_rpc("ferry_weights_digest") for engine in engines)
    assert len(first) == 1 and first == second == engines[0]._core.collective_rpc("ferry_weights_digest")
    assert combined(first) != handshake.decode(engines[0].facts.kv_fingerprint).weights
