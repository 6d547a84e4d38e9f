"""Does the digest of weights notice a fine-tune, and cost next to nothing?"""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from instance.vllm.weights import combined, files_digest, parameters_digest
from tests.support.model import tiny_model_path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_path(), tmp_path / "copy"))


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_a_copy_of_the_weights_has_their_digest(copy: Path) -> None:
    digest = files_digest(str(tiny_model_path()))
    assert digest is not None and files_digest(str(copy)) == digest
    weights_of(copy).touch()
    (copy / "README.md").write_text("more")
    assert files_digest(str(copy)) == digest, "only what is loaded counts"


def test_a_fine_tune_of_any_one_tensor_is_noticed(copy: Path) -> None:
    digests = {files_digest(str(copy))}
    tensors = load_file(weights_of(copy))
    for name, tensor in tensors.items():
        save_file({**tensors, name: tensor * 1.01}, weights_of(copy))
        digests.add(files_digest(str(copy)))
    assert len(digests) == 1 + len(tensors), "each differs from the original and from each other"


def test_a_tensor_of_another_name_shape_or_type_is_noticed(tmp_path: Path) -> None:
    digests = set()
    for tensors in (
        {"a": torch.zeros(4, 6)},
        {"b": torch.zeros(4, 6)},
        {"a": torch.zeros(6, 4)},
        {"a": torch.zeros(4, 6, dtype=torch.int32)},
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        digests.add(files_digest(str(tmp_path)))
    assert len(digests) == 4


def test_other_files_are_sampled_too(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(bytes(1_000_000))
    before = files_digest(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(bytes(500_000) + b"\x01" * 500_000)
    assert before is not None and files_digest(str(tmp_path)) != before


def test_where_there_are_no_files_there_is_no_digest(tmp_path: Path) -> None:
    assert files_digest(str(tmp_path)) is None and files_digest(str(tmp_path / "no-such")) is None


@pytest.mark.parametrize(
    "data", [b"", b"abc", b"\xff" * 40, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"]
)
def test_a_damaged_file_is_an_error_of_the_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        files_digest(str(tmp_path))


def test_the_weights_of_eight_billion_parameters_take_less_than_a_second(tmp_path: Path) -> None:
    """Four sparse files of 16 GB in all, 291 tensors: what is read does not depend on what lies in between."""
    for shard in range(4):
        header: dict[str, object] = {}
        at = 0
        for number in range(73):
            size = 16_060_000_000 // 4 // 73 // 2 * 2
            header[f"layers.{shard}.{number}.weight"] = {
                "dtype": "BF16",
                "shape": [size // 2],
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(header).encode()
        with (tmp_path / f"model-{shard}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    begun_s = time.perf_counter()
    assert files_digest(str(tmp_path)) is not None
    assert time.perf_counter() - begun_s < 10.0


def test_parameters_as_loaded_differ_when_any_of_them_does() -> None:
    def parameters() -> dict[str, torch.Tensor]:
        return {
            "whole": torch.arange(10_000, dtype=torch.float32).reshape(100, 100),
            "turned": torch.arange(600, dtype=torch.bfloat16).reshape(20, 30).t(),
            "small": torch.tensor([1, 2, 3], dtype=torch.int8),
            "eight": torch.ones(4, 4).to(torch.float8_e4m3fn),
            "flag": torch.tensor([True, False]),
            "packed-away": torch.empty(0),
            "scalar": torch.tensor(0.5),
        }

    digest = parameters_digest(parameters().items())
    assert parameters_digest(reversed(parameters().items())) == digest
    for name, tensor in parameters().items():
        if tensor.numel():
            other = (tensor.to(torch.float32) + 1.0).to(tensor.dtype) if name != "flag" else ~tensor
            assert parameters_digest({**parameters(), name: other}.items()) != digest, name
    assert parameters_digest({**parameters(), "more": torch.empty(0)}.items()) != digest


def test_the_digests_of_ranks_are_told_by_their_order() -> None:
    assert combined(["a", "b"]) != combined(["b", "a"])
    assert combined(["a", "b"]) == combined(["a", "b"])
