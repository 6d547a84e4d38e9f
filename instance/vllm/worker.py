"""What must a rank do for a migration? Give access to its KV pages, and to what its runner remembers of a request.

`FerryWorkerExtension` is mixed into vLLM's worker on every rank. collective_rpc serves set-up and small state only;
blocks go through the rank's own endpoint (`rank.py`), beside the engine's steps. `compat.py` checks vLLM's names.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from vllm.sampling_params import SamplingType
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from instance.spec import Carrier
from instance.vllm.codec import decode_request, decode_state
from instance.vllm.pages import PageStore
from instance.vllm.rank import Carriage, RankEndpoint, RankServer
from instance.vllm.weights import parameters_digest

MAX_EXPECTED = 64
"""Submissions decoded ahead of their commit; more than an instance lets in at once."""
MAX_EXPECTED_BYTES = 64 << 20
"""Encoded, of all of them: images are large."""


def page_store(model_runner: Any) -> PageStore:
    """Lay pages over the raw storage behind vLLM's per-layer views: independent of the attention backend's inner
    layout."""
    config = model_runner.kv_cache_config
    first = model_runner.kv_caches[0]
    raw = torch.empty(0, dtype=torch.int8, device=first.device)
    raw.set_(first.untyped_storage())
    group_of_layer = {name: i for i, group in enumerate(config.kv_cache_groups) for name in group.layer_names}
    pages = []
    for tensor in config.kv_cache_tensors:
        group = group_of_layer[tensor.layers[0]]
        page_bytes = _layer_spec(config, group, tensor.layers[0]).page_size_bytes
        shape, strides = (
            (len(tensor.layers), config.num_blocks, page_bytes),
            (tensor.layer_stride, tensor.block_stride, 1),
        )
        pages.append((group, raw.as_strided(shape, strides, tensor.offset)))
    return PageStore(tuple(pages), len(config.kv_cache_groups), config.num_blocks)


def layout_text(config: Any) -> str:
    """All that two KV memories must agree on to exchange pages; part of the KV fingerprint. `config`: KVCacheConfig."""
    group_of_layer = {name: i for i, group in enumerate(config.kv_cache_groups) for name in group.layer_names}
    parts = [str(config.kv_cache_layout)]
    for tensor in config.kv_cache_tensors:
        group = group_of_layer[tensor.layers[0]]
        spec = _layer_spec(config, group, tensor.layers[0])
        parts.append(f"{group}:{len(tensor.layers)}:{spec.page_size_bytes}:{spec.block_size}:{type(spec).__name__}")
    return "|".join(parts)


def _layer_spec(config: Any, group: int, layer: str) -> Any:
    spec = config.kv_cache_groups[group].kv_cache_spec
    return getattr(spec, "kv_cache_specs", {}).get(layer, spec)


def _generator(params: Any, state: bytes | None, device: torch.device) -> torch.Generator | None:
    """A seeded request's sampler where it stood, or at its start if it has not drawn yet."""
    if params.sampling_type != SamplingType.RANDOM_SEED:
        return None
    generator = torch.Generator(device=device)
    generator.manual_seed(params.seed)
    if state is not None:
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


class FerryWorkerExtension:
    """Methods that collective_rpc can call on every rank. `self` is vLLM's worker."""

    def ferry_open(
        self: Any, carrier: str, host: str, token: str, limits: tuple[bool, float | None], control_address: str | None
    ) -> tuple[str, str]:
        """Start this rank's data endpoint; returns (where peers push to, layout).

        `limits`: checksum and bytes_per_s of `Carriage`, in plain types. `control_address`: also serve the agent's
        orders there (it lives in another process); the rank's number is appended.
        """
        carriage = Carriage(Carrier(carrier), host, token, *limits)
        params = carriage.params(is_cpu=self.model_runner.device.type == "cpu")
        endpoint = RankEndpoint(page_store(self.model_runner), carriage, params)
        self.ferry_endpoint = endpoint
        self.ferry_expected: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self.ferry_server = None
        if control_address is not None:
            self.ferry_server = RankServer(endpoint, f"{control_address}-{self.rank}", token)
        return endpoint.url, layout_text(self.model_runner.kv_cache_config)

    def ferry_weights_digest(self: Any) -> str:
        """Of this rank's parameters as they were loaded."""
        return parameters_digest(self.model_runner.model.named_parameters())

    def ferry_close(self: Any) -> None:
        self.ferry_endpoint.shut_down()  # first: it breaks off the pushes that the server's threads wait for
        if self.ferry_server is not None:
            self.ferry_server.close()

    def ferry_export_generator(self: Any, request_id: str) -> bytes | None:
        """State of a seeded request's sampler; None where there is none to carry (the V2 runner's is stateless)."""
        known = getattr(self.model_runner, "requests", {}).get(request_id)
        if known is None or known.generator is None:
            return None
        return bytes(known.generator.get_state().numpy().tobytes())

    def ferry_generator_after(self: Any, seed: int, num_tokens: int) -> bytes | None:
        """State of a seeded request's sampler once it has drawn for so many tokens. None as above.

        As vLLM's `TopKTopPSampler` draws: on a CPU a seed for each token, elsewhere (and with --use-fp64-gumbel) an
        exponential variate for every token of the vocabulary.
        """
        runner = self.model_runner
        if hasattr(runner, "req_states"):
            return None
        generator = torch.Generator(device=runner.device)
        generator.manual_seed(seed)
        is_double = bool(runner.sampler.topk_topp_sampler.use_fp64_gumbel)
        if runner.device.type == "cpu" and not is_double:
            for _ in range(num_tokens):
                torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        else:
            dtype = torch.float64 if is_double else torch.float32
            row = torch.empty(runner.model_config.get_vocab_size(), dtype=dtype, device=runner.device)
            for _ in range(num_tokens):
                row.exponential_(generator=generator)
        return bytes(generator.get_state().numpy().tobytes())

    def ferry_expect(self: Any, request_id: str, payload: bytes) -> None:
        """Decode a submission while its request still decodes elsewhere: thousands of prompt tokens would otherwise be
        decoded while it stands still. The latest are kept; `ferry_import` manages without."""
        expected = self.ferry_expected
        expected[request_id] = (decode_request(payload), len(payload))
        expected.move_to_end(request_id)
        while len(expected) > MAX_EXPECTED or sum(size for _, size in expected.values()) > MAX_EXPECTED_BYTES:
            expected.popitem(last=False)

    def ferry_import(
        self: Any, payload: bytes, state_bytes: bytes, request_id: str, block_ids: tuple[list[int], ...]
    ) -> None:
        """V1 runner: a request that arrives with output must be known before the scheduler hands it over as resumed."""
        self.ferry_drop(request_id)
        runner = self.model_runner
        if hasattr(runner, "req_states"):
            return  # the V2 runner is sent resumed requests whole
        request, _ = self.ferry_expected.pop(request_id, None) or (decode_request(payload), 0)
        state = decode_state(state_bytes)
        generator = _generator(request.sampling_params, state.generator, runner.device)
        known = CachedRequestState(
            req_id=request_id,
            prompt_token_ids=request.prompt_token_ids,
            mm_features=request.mm_features or [],
            sampling_params=request.sampling_params,
            generator=generator,
            block_ids=tuple(list(group) for group in block_ids),
            num_computed_tokens=state.computed_tokens,
            output_token_ids=list(state.output_token_ids),
            lora_request=request.lora_request,
        )
        runner.requests[request_id] = known
        runner.late_interaction_runner.register_request(request_id, None)
        if runner.uses_mrope:
            runner._init_mrope_positions(known)

    def ferry_drop(self: Any, request_id: str) -> None:
        """Forget what the runner remembers from the request's last stay here."""
        runner = self.model_runner
        if hasattr(runner, "req_states"):
            return
        runner.requests.pop(request_id, None)
        runner.num_prompt_logprobs.pop(request_id, None)
        # The batch's tensors may have been made in inference mode, and only there they can be written to.
        with torch.inference_mode():
            runner.input_batch.remove_request(request_id)
