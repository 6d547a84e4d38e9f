"""Which requests would kill vLLM 0.32, or this process, and are they kept away from it? And what does a wrong start
say?"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from instance.errors import StartError
from instance.messages import OutputEntry
from instance.spec import Carrier
from instance.vllm import compat
from instance.vllm.codec import CodecError, decode_output, decode_request, encode_output, encode_request
from instance.vllm.flags import FlagError, engine_config, has_our_hooks, parse_serve_argv, with_memory_share
from instance.vllm.host import VllmEngine
from instance.vllm.rank import Carriage
from instance.vllm.refusals import why_unmovable
from instance.vllm.scheduler import FerryMixin
from migration.types import RequestId
from tests.support.model import tiny_model_path
from tests.support.pair import EnginePair, Shape
from tests.support.vllm_kit import VllmKit, engine_argv, prompt_of, shared_kit, start_engine, submission_of

pytestmark = pytest.mark.timeout(300)
"""Engines start in it."""


def seeded(max_tokens: int = 20, **values: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=11, max_tokens=max_tokens, ignore_eos=True, **values)


@pytest.fixture(scope="module")
def narrow_kit() -> VllmKit:
    """Engines whose steps are shorter than a prompt: prefills are cut."""
    return VllmKit(start_engine(max_num_batched_tokens=256), start_engine(max_num_batched_tokens=256))


@pytest.fixture
def narrow(narrow_kit: VllmKit) -> Iterator[EnginePair]:
    pair = EnginePair(narrow_kit)
    yield pair
    pair.drain()
    pair.close()


# ---- P1: a seeded prefill that is cut kills vLLM on CPU


def test_a_seeded_prefill_is_never_cut_whatever_runs_beside_it(narrow: EnginePair) -> None:
    """1. A long prompt is being computed in pieces. 2. Seeded ones come: each must wait until it fits whole into a
    step."""
    engine = narrow.first
    narrow.add(engine, Shape(900, 30, prompt_key=1))
    narrow.step(engine)
    ids = [narrow.new_id() for _ in range(4)]
    for i, request_id in enumerate(ids):
        assert engine.add(submission_of(request_id, prompt_of(20 + i, 150 + i), seeded())) is None
    narrow.finish(engine, *ids)
    for i, request_id in enumerate(ids):
        alone = narrow.new_id()
        assert engine.add(submission_of(alone, prompt_of(20 + i, 150 + i), seeded())) is None
        narrow.finish(engine, alone)
        assert narrow.tokens(alone) == narrow.tokens(request_id)


def test_without_the_guard_the_same_traffic_kills_the_engine() -> None:
    """The negative control. When it fails, vLLM has mended its fault, and the guard can go."""
    engine: Any = start_engine(max_num_batched_tokens=256)
    engine._scheduler._ferry_whole_seeded_prefills = False
    pair = EnginePair(VllmKit(engine, engine))
    pair.add(engine, Shape(900, 30, prompt_key=2))
    pair.step(engine)
    assert engine.add(submission_of(pair.new_id(), prompt_of(30, 240), seeded(10))) is None
    with pytest.raises(RuntimeError, match="offset"):
        pair.step_until(engine, lambda: not engine.requests())
    pair.close()


def test_preempted_seeded_requests_are_computed_again_without_a_cut() -> None:
    """Three seeded requests grow until one is preempted; its prompt and output come back in one step."""
    pair = EnginePair(shared_kit())
    engine = pair.first
    ids = [pair.new_id() for _ in range(3)]
    for i, request_id in enumerate(ids):
        assert engine.add(submission_of(request_id, prompt_of(40 + i, 640), seeded(90))) is None
    pair.finish(engine, *ids)
    assert all(len(pair.tokens(request_id)) == 90 for request_id in ids)
    pair.drain()
    pair.close()


def test_a_seeded_request_with_a_shared_prefix_runs(narrow: EnginePair) -> None:
    """The prefix cache makes its prefill shorter, never cut."""
    engine = narrow.first
    ids = [narrow.new_id() for _ in range(3)]
    for request_id in ids:
        assert engine.add(submission_of(request_id, prompt_of(50, 200), seeded())) is None
        narrow.step(engine)
    narrow.finish(engine, *ids)
    assert len({tuple(narrow.tokens(request_id)) for request_id in ids}) == 1


def test_a_seeded_request_that_could_not_be_computed_again_whole_is_refused_for_good(narrow: EnginePair) -> None:
    refusal = narrow.first.add(submission_of(narrow.new_id(), prompt_of(60, 200), seeded(100)))
    assert refusal is not None and refusal.final
    assert "raise --max-num-batched-tokens" in refusal.reason
    unseeded = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    assert narrow.first.add(submission_of(narrow.new_id(), prompt_of(60, 300), unseeded)) is None


def test_a_seeded_prefill_that_vllm_would_cut_beside_others_is_refused_for_good() -> None:
    """Cut to the threshold whenever somebody else is there, and left out for that, it and all behind it would wait."""
    engine = start_engine(max_num_batched_tokens=512, long_prefill_token_threshold=128)
    pair = EnginePair(VllmKit(engine, engine))
    refusal = engine.add(submission_of(pair.new_id(), prompt_of(60, 130), seeded()))
    assert refusal is not None and refusal.final
    assert "--long-prefill-token-threshold" in refusal.reason
    ids = [pair.new_id() for _ in range(2)]
    for request_id in ids:
        assert engine.add(submission_of(request_id, prompt_of(61, 100), seeded())) is None
    pair.finish(engine, *ids)
    pair.drain()
    pair.close()


# ---- P2: on the V2 runner, min_tokens with many stop ids kills the engine


@pytest.mark.parametrize(
    ("is_v2", "num_stop_ids", "is_refused"), [(True, 129, True), (True, 128, False), (False, 129, False)]
)
def test_min_tokens_with_many_stop_ids_is_refused_on_the_v2_runner(
    is_v2: bool, num_stop_ids: int, is_refused: bool
) -> None:
    scheduler: Any = SimpleNamespace(
        max_model_len=1000,
        block_size=32,
        kv_cache_manager=SimpleNamespace(
            block_pool=SimpleNamespace(num_gpu_blocks=100), coordinator=SimpleNamespace(single_type_managers=())
        ),
        use_v2_model_runner=is_v2,
        num_spec_tokens=0,
        encoder_cache_manager=SimpleNamespace(cache_size=0),
        max_num_encoder_input_tokens=0,
        _ferry_whole_seeded_prefills=False,
    )
    params = SamplingParams(min_tokens=5, max_tokens=50, stop_token_ids=list(range(num_stop_ids)))
    request: Any = SimpleNamespace(num_prompt_tokens=10, max_tokens=50, sampling_params=params, mm_features=[])
    assert (FerryMixin.ferry_why_unservable(scheduler, request) is not None) is is_refused


# ---- what cannot be moved says why


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("resumable", True, "streaming session"),
        ("kv_transfer_params", {"do_remote_prefill": True}, "connector"),
        ("mm_features", [SimpleNamespace(modality="audio", data={})], "multimodal"),
        ("prompt_embeds", object(), "embeddings"),
        ("lora_request", SimpleNamespace(load_inplace=True), "LoRA"),
        ("sampling_params", None, "pooling"),
    ],
)
def test_what_cannot_be_moved_yet_is_refused_with_its_reason(field: str, value: object, word: str) -> None:
    request: Any = SimpleNamespace(
        sampling_params=SamplingParams(max_tokens=5),
        resumable=False,
        kv_transfer_params=None,
        ec_transfer_params=None,
        status=None,
        mm_features=[],
        prompt_embeds=None,
        prompt_token_ids=[1, 2],
        lora_request=None,
        num_computed_tokens=0,
        num_prompt_tokens=2,
    )
    assert why_unmovable(request) is None
    setattr(request, field, value)
    assert word in str(why_unmovable(request))


def test_a_streaming_session_is_refused_at_describe() -> None:
    pair = EnginePair(shared_kit())
    request_id = pair.new_id()
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    assert pair.first.add(submission_of(request_id, prompt_of(70, 40), params, resumable=True)) is None
    pair.decode_until(pair.first, request_id, 3)
    assert "streaming session" in str(pair.first.describe(request_id))
    pair.drain()
    pair.close()


# ---- the version check


def test_this_vllm_is_supported_and_another_one_is_not() -> None:
    assert compat.why_unsupported() is None
    assert "0.33.1" in str(compat.why_unsupported("0.33.1"))


def test_a_missing_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = compat._Needed("vllm.v1.request", "Request", ("no_such_method",))
    monkeypatch.setattr(compat, "_NEEDED", (*compat._NEEDED, lost))
    assert "Request.no_such_method" in str(compat.why_unsupported())


@pytest.mark.parametrize("what", ["0.99.0", "EngineCore.add_lora"])
def test_an_engine_that_moves_nothing_still_serves_and_says_why(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Of another version, or of ours without one of the names we need."""
    if what == "0.99.0":
        monkeypatch.setattr(compat, "engine_version", lambda: what)
    else:
        monkeypatch.delattr(EngineCore, "add_lora")
    engine = start_engine()
    assert what in str(engine.facts.migration_refused_because)
    kit = shared_kit()
    pair = EnginePair(VllmKit(engine, kit.second))
    shape = Shape(60, 12, prompt_key=80)
    tokens = pair.run_alone(engine, shape)
    assert tokens == pair.run_alone(kit.second, shape)
    request_id = pair.add(engine, shape)
    pair.decode_until(engine, request_id, 3)
    assert what in str(engine.describe(request_id))
    assert engine.requests()[0].movable is False
    assert engine.load().num_running == 1
    pair.finish(engine, request_id)
    pair.close()


# ---- flags


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "name a model"),
        (("/no/such/folder",), "no model at /no/such/folder"),
        (("./nowhere",), "no model at ./nowhere"),
        ((str(tiny_model_path()), "--no-such-flag"), "--no-such-flag"),
        ((str(tiny_model_path()), "--max-num-seqs", "many"), "many"),
        ((str(tiny_model_path()), "--data-parallel-size", "2"), "--instances"),
        ((str(tiny_model_path()), "--lora-modules", "a=./nowhere"), "--enable-lora"),
        ((str(tiny_model_path()), "--enable-lora", "--lora-modules", "a=./nowhere"), "no LoRA adapter a at ./nowhere"),
        ((str(tiny_model_path()), "--enable-lora", "--lora-modules", f"a={tiny_model_path()}"), "adapter_config.json"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(FlagError) as error:
        parse_serve_argv(argv)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_model_is_told(tmp_path: Any) -> None:
    with pytest.raises(FlagError, match=r"config\.json"):
        parse_serve_argv((str(tmp_path),))


def test_a_value_vllm_refuses_is_one_line_and_a_start_error() -> None:
    argv = engine_argv(max_model_len=10_000_000)
    with pytest.raises(FlagError) as error:
        engine_config(parse_serve_argv(argv))
    assert "\n" not in str(error.value)
    with pytest.raises(StartError):
        VllmEngine.from_argv(argv, Carriage(Carrier.TCP, "127.0.0.1", "token"))


def test_our_defaults_give_way_to_the_users_flags() -> None:
    model = str(tiny_model_path())
    ours = engine_config(parse_serve_argv((model, "--max-model-len", "512", "--max-num-seqs", "8")))
    assert ours.model_config.enforce_eager is True
    assert ours.scheduler_config.max_num_batched_tokens == 512
    assert ours.parallel_config.distributed_executor_backend == "uni"
    assert has_our_hooks(ours)
    theirs = engine_config(
        parse_serve_argv((model, "--max-model-len", "512", "--max-num-batched-tokens", "128", "--no-enforce-eager"))
    )
    assert theirs.scheduler_config.max_num_batched_tokens == 128
    assert theirs.model_config.enforce_eager is False


@pytest.mark.parametrize("said", ["--gpu-memory-utilization", "--kv-cache-memory-bytes=1G", "--kv_cache_memory_bytes"])
def test_instances_share_a_cpu_machines_memory_unless_the_user_says_how_much(said: str) -> None:
    argv = (str(tiny_model_path()), "--max-model-len", "512")
    shared = parse_serve_argv(with_memory_share(argv, 4))
    assert shared.gpu_memory_utilization == pytest.approx(0.15)
    assert with_memory_share((*argv, "--tensor-parallel-size", "2"), 4)[-1] == "0.0750"
    assert with_memory_share((*argv, said, "0.5"), 4) == (*argv, said, "0.5")


# ---- the codec


def test_requests_and_outputs_survive_the_wire() -> None:
    params = SamplingParams(temperature=0.5, seed=3, stop_token_ids=[4], logprobs=2)
    submission = submission_of(RequestId("a"), [1, 2, 3], params, priority=4, cache_salt="salt")
    request = decode_request(submission.payload)
    assert isinstance(request, EngineCoreRequest)
    assert (request.request_id, request.prompt_token_ids, request.priority) == ("a", [1, 2, 3], 4)
    assert request.sampling_params == params
    assert decode_request(encode_request(request)) == request
    plain = EngineCoreOutput("a", [5, 6], stop_reason="x")
    assert encode_output(plain) == ()
    entry = OutputEntry("a", 7, (5, 6), 1, None, ())
    decoded = decode_output(entry)
    assert (decoded.new_token_ids, str(decoded.finish_reason)) == ([5, 6], "length")
    with pytest.raises(CodecError, match="77"):
        decode_output(OutputEntry("a", 7, (5, 6), 77, None, ()))


def test_bytes_that_are_no_request_and_values_that_need_pickle_are_refused() -> None:
    with pytest.raises(CodecError):
        decode_request(b"\x00\x01")
    with pytest.raises(CodecError):
        encode_request(
            EngineCoreRequest("a", [1], None, SamplingParams(extra_args={"f": object()}), None, 0.0, None, None, None)
        )
