"""What would bench.exactness say of an instance that forgets something? `instance.standalone`, with one fault put in.

    python -m bench.exactness_sabotage CONTROL SPEC_JSON

One negative control for each class of state that a migration carries. `bench.exactness --control` starts its instances
through this module; it must then report mismatches (or a leak, or lost tokens) and end with status 1.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from instance import standalone
from instance.environment import apply_environment
from instance.spec import InstanceSpec
from migration.types import BlockRange, CopyReceipt

CONTROLS: Mapping[str, str] = {
    "generator": "the state of the sampler stays behind",
    "tail": "the blocks left at the stop are not copied",
    "stage": "the first block of each push beside decoding is not copied",
    "outputs": "outputs arrive as if they were prompt",
    "grammar": "the grammar is not replayed over the output",
    "parameters": "bias, allowed and bad words, min_tokens and stop ids stay behind",
    "offset": "the stream goes on one token too early",
    "adapter": "the LoRA adapter stays behind",
    "release": "the source never frees what it gave away",
}


def _module(name: str) -> Any:
    """Imported late: vLLM reads the environment when it is imported."""
    return importlib.import_module(name)


def _generator() -> None:
    mixin = _module("instance.vllm.scheduler").FerryMixin
    export = mixin.ferry_export

    def without(self: Any, request_id: str, without_kv: bool, generator: bytes | None) -> Any:
        del generator
        return export(self, request_id, without_kv, None)

    mixin.ferry_export = without


def _push(is_left_out: Callable[[bool], bool], num_left: int | None) -> None:
    """Leave out `num_left` blocks (None: all) of such pushes (by `urgent`), and say that they have landed."""
    mover = _module("instance.vllm.mover").RanksMover
    push = mover.push

    async def partly(
        self: Any, migration_id: Any, endpoints: Any, block_table: Any, blocks: BlockRange, *, urgent: bool
    ) -> Any:
        if not is_left_out(urgent):
            return await push(self, migration_id, endpoints, block_table, blocks, urgent=urgent)
        first = blocks.end if num_left is None else min(blocks.end, blocks.first + num_left)
        num_bytes = 1
        if first < blocks.end:
            rest = BlockRange(first, blocks.end)
            num_bytes = (await push(self, migration_id, endpoints, block_table, rest, urgent=urgent)).num_bytes
        return CopyReceipt(len(blocks), num_bytes)

    mover.push = partly


def _outputs() -> None:
    worker = _module("instance.vllm.worker")
    known = worker.CachedRequestState

    def as_prompt(**values: Any) -> Any:
        made = known(**values)
        made.prompt_token_ids = [*made.prompt_token_ids, *made.output_token_ids]
        made.output_token_ids = []
        made.num_prompt_tokens = len(made.prompt_token_ids)
        return made

    worker.CachedRequestState = as_prompt


def _grammar() -> None:
    engine = _module("instance.vllm.host").VllmEngine
    commit = engine.commit

    def unreplayed(self: Any, migration_id: Any, state: bytes) -> Any:
        manager = self._scheduler.structured_output_manager
        accept, manager.accept_tokens = manager.accept_tokens, lambda *_: True
        try:
            return commit(self, migration_id, state)
        finally:
            manager.accept_tokens = accept

    engine.commit = unreplayed


def _parameters() -> None:
    host, codec = _module("instance.vllm.host"), _module("instance.vllm.codec")
    decode = host.decode_described

    def stripped(payload: bytes) -> Any:
        described = decode(payload)
        request = codec.decode_request(described.core)
        params = request.sampling_params
        params.logit_bias, params.allowed_token_ids, params._bad_words_token_ids = None, None, None
        params.min_tokens, params.stop_token_ids = 0, []
        return msgspec.structs.replace(described, core=codec.encode_request(request))

    host.decode_described = stripped


def _adapter() -> None:
    host, codec = _module("instance.vllm.host"), _module("instance.vllm.codec")
    decode = host.decode_described

    def plain(payload: bytes) -> Any:
        described = decode(payload)
        request = codec.decode_request(described.core)
        request.lora_request = None
        return msgspec.structs.replace(described, core=codec.encode_request(request), adapter=None)

    host.decode_described = plain


def _offset() -> None:
    table = _module("instance.stream").StreamTable
    begin = table.open

    def too_early(self: Any, request_id: Any, gateway: str, offset: int, now_s: float) -> None:
        begin(self, request_id, gateway, max(0, offset - 1), now_s)

    table.open = too_early


def _release() -> None:
    engine = _module("instance.vllm.host").VllmEngine
    engine.release = lambda self, request_id: request_id in self._scheduler.ferry_out


FAULTS: Mapping[str, Callable[[], None]] = {
    "generator": _generator,
    "tail": lambda: _push(lambda urgent: urgent, None),
    "stage": lambda: _push(lambda urgent: not urgent, 1),
    "outputs": _outputs,
    "grammar": _grammar,
    "parameters": _parameters,
    "adapter": _adapter,
    "offset": _offset,
    "release": _release,
}


def main() -> None:
    name = sys.argv.pop(1)
    # As the service does, and before vLLM is imported to put the fault in.
    apply_environment(msgspec.json.decode(sys.argv[1], type=InstanceSpec))
    FAULTS[name]()
    standalone.main()


if __name__ == "__main__":
    main()
