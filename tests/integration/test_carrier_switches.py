"""Do --carrier and --carrier-checksum arrive where blocks are moved, and does a carrier that cannot be had say so?"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator

import pytest

from instance.errors import StartError
from instance.service import InstanceService
from instance.spec import Carrier, EngineKind, InstanceSpec
from orchestrator.config import serve_config
from tests.support.fleet import a_request, expected_output, fleet_of
from tests.support.model import tiny_model_path


class LyingSum:
    """Never says the same sum twice: the two ends of a carrier never agree."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = itertools.count(1)
        self.num_asked = 0

    def __call__(self, data: object, value: int = 0) -> int:
        self.num_asked += 1
        return next(self._numbers)


@pytest.fixture
def lying_sum(monkeypatch: pytest.MonkeyPatch) -> LyingSum:
    lying = LyingSum()
    monkeypatch.setattr(zlib, "crc32", lying)
    return lying


@pytest.mark.parametrize("carrier", [Carrier.TCP, Carrier.SHM])
@pytest.mark.parametrize("checksum", [True, False])
async def test_a_sum_that_does_not_match_fails_a_migration_exactly_when_sums_are_on(
    checksum: bool, carrier: Carrier, lying_sum: LyingSum
) -> None:
    request = a_request(1, num_prompt_tokens=300, max_tokens=600)
    async with fleet_of(2, carrier=carrier, carrier_checksum=checksum) as fleet:
        await fleet.run("i0", "r", request, 20)
        told = await fleet.services["i0"].migrate("r", fleet.members["i1"])
        if checksum:
            assert (told.outcome, told.num_bytes) == ("fault", 0), told
            assert "checksum of a chunk does not match" in told.reason
            assert lying_sum.num_asked >= 2, "both ends sum"
        else:
            assert (told.outcome, lying_sum.num_asked) == ("committed", 0), told
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        assert fleet.gateway.senders("r") == (["i0"] if checksum else ["i0", "i1"])
        await fleet.check_rest()


async def test_with_sums_on_requests_move_as_ever() -> None:
    """The control of the lie."""
    async with fleet_of(2, carrier_checksum=True) as fleet:
        request = a_request(2, num_prompt_tokens=300, max_tokens=600)
        await fleet.run("i0", "r", request, 20)
        told = await fleet.services["i0"].migrate("r", fleet.members["i1"])
        assert told.outcome == "committed", told
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)


def test_serve_hands_its_switches_to_every_instance() -> None:
    from orchestrator.runtime.compose import instance_specs  # noqa: PLC0415 - it imports Ray

    settings = serve_config(
        {"model": "m", "carrier": "tcp", "carrier_checksum": True, "copy_mb_per_s": 40.0}, {}, None, ()
    )
    specs = instance_specs(settings, "token")
    switches = [(spec.carrier, spec.carrier_checksum, spec.copy_bytes_per_s) for spec in specs]
    assert switches == [(Carrier.TCP, True, 40e6)] * 2
    plain = instance_specs(serve_config({"model": "m"}, {}, None, ()), "token")
    switches = [(spec.carrier, spec.carrier_checksum, spec.copy_bytes_per_s) for spec in plain]
    assert switches == [(Carrier.SHM, False, None)] * 2


@pytest.mark.parametrize(
    ("engine", "model", "words"),
    [
        (EngineKind.FAKE, "fake", "needs KV memory on a GPU"),
        (EngineKind.VLLM, str(tiny_model_path()), "cannot be used here: "),
    ],
)
async def test_nccl_without_a_gpu_is_one_line_that_says_what_to_do(engine: EngineKind, model: str, words: str) -> None:
    if engine is EngineKind.VLLM:
        pytest.importorskip("vllm", reason="vLLM is not installed")
        nccl = pytest.importorskip("migration.transports.nccl")
        if nccl.why_unavailable() is None:
            pytest.skip("NCCL can be used here")
    spec = InstanceSpec("i0", 1, engine, (model,), carrier=Carrier.NCCL, token="token")
    service = InstanceService()
    with pytest.raises(StartError) as error:
        await service.start(spec)
    text = str(error.value)
    assert words in text and "--carrier tcp" in text and "\n" not in text


async def test_sums_with_nccl_are_refused_before_anything_is_loaded() -> None:
    spec = InstanceSpec("i0", 1, EngineKind.VLLM, ("m",), carrier=Carrier.NCCL, carrier_checksum=True, token="token")
    with pytest.raises(StartError, match="knows no checksums"):
        await InstanceService().start(spec)
