"""Does a hand-shake say which thing differs, with both values, and take nothing else for one?"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from instance.fake_model import fake_compatibility
from instance.vllm.handshake import (
    HANDSHAKE_VERSION,
    MAX_HANDSHAKE_BYTES,
    Adapter,
    Compatibility,
    HandshakeError,
    decode,
    encode,
    why_incompatible,
    why_refused,
)

HERE = Compatibility(
    engine_version="0.31.1",
    model="m",
    weights="aaaa",
    model_config="cccc",
    dtype="torch.bfloat16",
    quantization="",
    kv_dtype="auto",
    kv_layout="0:4:1024",
    block_size=16,
    max_model_len=8192,
    tensor_parallel_size=2,
    model_runner="V1",
    speculation="3 tokens by ngram of 1 to 3",
    adapters=(Adapter("french", "ffff"),),
)

DIFFERENCES: dict[str, tuple[Any, str]] = {
    "engine_version": ("0.32.0", "the source runs vLLM 0.32.0, this instance 0.31.1"),
    "model": ("n@main", "the source serves model n@main, this instance m"),
    "weights": ("bbbb", "the source has weights of digest bbbb, this instance aaaa"),
    "model_config": ("dddd", "the source has a model configuration of digest dddd, this instance cccc"),
    "dtype": ("torch.float32", "the source computes in torch.float32, this instance torch.bfloat16"),
    "quantization": ("fp8", "the source has quantization fp8, this instance none"),
    "kv_dtype": ("fp8", "the source keeps KV as fp8, this instance auto"),
    "kv_layout": ("0:4:2048", "the source has KV layout 0:4:2048, this instance 0:4:1024"),
    "block_size": (32, "the source has blocks of 32 tokens, this instance 16"),
    "max_model_len": (4096, "the source has a context of 4096 tokens, this instance 8192"),
    "tensor_parallel_size": (1, "the source runs at tensor parallelism 1, this instance 2"),
    "model_runner": ("V2", "the source has model runner V2, this instance V1"),
    "speculation": ("", "the source guesses none, this instance 3 tokens by ngram of 1 to 3"),
    "adapters": ((), "the source has LoRA adapters none, this instance french (ffff)"),
}


def changed(**fields: Any) -> Compatibility:
    return msgspec.structs.replace(HERE, **fields)


def test_every_field_but_the_version_has_a_difference_here() -> None:
    assert {*DIFFERENCES, "version"} == set(Compatibility.__struct_fields__)


@pytest.mark.parametrize("field", DIFFERENCES)
def test_a_difference_is_refused_with_its_name_and_both_values(field: str) -> None:
    value, reason = DIFFERENCES[field]
    assert why_incompatible(changed(**{field: value}), HERE) == reason
    assert why_refused(encode(changed(**{field: value})), encode(HERE)) == reason


def test_equals_are_taken() -> None:
    assert why_incompatible(HERE, changed()) is None
    assert why_refused(encode(changed()), encode(HERE)) is None
    # The control: the same text is not the only way to be equal.
    assert why_refused(encode(HERE).replace(",", ", "), encode(HERE)) is None


def test_all_differences_are_named() -> None:
    reason = why_incompatible(changed(dtype="x", block_size=1), HERE)
    assert (
        reason
        == "the source computes in x, this instance torch.bfloat16; the source has blocks of 1 tokens, this instance 16"
    )


def test_an_adapter_of_the_same_name_with_other_weights_is_another_one() -> None:
    reason = why_incompatible(changed(adapters=(Adapter("french", "eeee"),)), HERE)
    assert reason == "the source has LoRA adapters french (eeee), this instance french (ffff)"


def test_what_is_encoded_is_decoded() -> None:
    assert decode(encode(HERE)) == HERE
    assert decode(encode(fake_compatibility(16))) == fake_compatibility(16)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "another",
        "[]",
        encode(HERE)[:-1],
        encode(HERE) + " {}",
        encode(HERE)[:-1] + ',"more":1}',
        encode(HERE).replace('"block_size":16', '"block_size":-1'),
        encode(HERE).replace('"block_size":16', '"block_size":"16"'),
        encode(HERE).replace(f'"version":{HANDSHAKE_VERSION}', '"version":99'),
        encode(HERE).replace('"model":"m"', '"model":"' + "m" * 5000 + '"'),
        "[" * 50_000,
        '"\ud800"',
        " " * (MAX_HANDSHAKE_BYTES + 1),
    ],
)
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(HandshakeError):
        decode(text)
    reason = why_refused(text, encode(HERE))
    assert reason is not None and reason.startswith("the source's hand-shake cannot be read") and "\n" not in reason


def test_a_reason_has_a_bound() -> None:
    assert len(str(why_incompatible(changed(model="m" * 4000, kv_layout="k" * 4000), HERE))) <= 1000
