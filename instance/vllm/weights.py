"""Which weights are these? A digest that is cheap for any model and still notices a fine-tune of equal shapes.

Sampled, not read whole: of a safetensors file the header (names, shapes, types), the size, and up to PIECES_A_TENSOR
pieces of every tensor; of other files the size and FILE_PIECES pieces. A change that misses all pieces is not noticed;
training changes nearly every element of a tensor. Where nothing lies in files (dummy weights, streams), each rank
samples its parameters as they were loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

PIECE_BYTES = 64
PIECES_A_TENSOR = 8
MAX_PIECES = 32_768
"""Over all tensors: of a model of very many tensors each gives fewer, but never less than one."""
FILE_PIECES = 1024
PARAMETER_SAMPLES = 256
MAX_HEADER_BYTES = 100 << 20
_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def files_digest(folder: str) -> str | None:
    """Of the weights in a folder (or of a file). None: there are none. Raises OSError when they cannot be read."""
    files = _weight_files(Path(folder).expanduser())
    if not files:
        return None
    digest = _digest()
    plans = [(path, _tensor_ranges(path) if path.suffix == ".safetensors" else None) for path in files]
    num_tensors = sum(len(plan[1]) for _, plan in plans if plan is not None)
    pieces = max(1, min(PIECES_A_TENSOR, MAX_PIECES // max(1, num_tensors)))
    for path, plan in plans:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb", buffering=0) as file:
            if plan is None:
                _update_pieces(digest, file.fileno(), 0, size, FILE_PIECES)
                continue
            header, ranges = plan
            digest.update(header)
            for first, end in ranges:
                _update_pieces(digest, file.fileno(), first, end, pieces)
    return str(digest.hexdigest())


def parameters_digest(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of one rank's parameters. Copies PARAMETER_SAMPLES elements of each from its device, never a whole tensor."""
    digest = _digest()
    for name, parameter in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}\n".encode())
        count = parameter.numel()
        if count == 0 or parameter.element_size() not in _SAME_SIZE:
            continue
        positions = torch.linspace(0, count - 1, min(count, PARAMETER_SAMPLES), dtype=torch.float64).long()
        index = torch.unravel_index(positions.to(parameter.device), parameter.shape)
        words = parameter.detach().view(_SAME_SIZE[parameter.element_size()])
        digest.update(words[index].cpu().numpy().tobytes())
    return str(digest.hexdigest())


def combined(digests: Iterable[str]) -> str:
    """Of all ranks, in their order."""
    return str(_digest("+".join(digests).encode()).hexdigest())


def _digest(data: bytes = b"") -> Any:
    return hashlib.blake2b(data, digest_size=12)


def _weight_files(path: Path) -> list[Path]:
    """The files vLLM would load: those of the first kind that is there."""
    if path.is_file():
        return [path]
    for suffix in _SUFFIXES:
        if files := sorted(path.glob(f"*{suffix}")):
            return files
    return []


def _tensor_ranges(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """The header of a safetensors file, and where each tensor lies in the file, by name. Raises OSError when it is
    damaged."""
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if size > MAX_HEADER_BYTES:
            raise OSError(f"{path.name} is no safetensors file")
        header = file.read(size)
    try:
        offsets = [one["data_offsets"] for name, one in sorted(json.loads(header).items()) if name != "__metadata__"]
        ranges = [(8 + size + int(first), 8 + size + int(end)) for first, end in offsets]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OSError(f"{path.name} has a header that cannot be read") from error
    return header, ranges


def _update_pieces(digest: Any, file: int, first: int, end: int, num_pieces: int) -> None:
    """Evenly spread, the first and the last one included; all of it if it is small."""
    room = end - first
    if room <= num_pieces * PIECE_BYTES:
        digest.update(os.pread(file, max(0, room), first))
        return
    for piece in range(num_pieces):
        at = first + (room - PIECE_BYTES) * piece // max(1, num_pieces - 1)
        digest.update(os.pread(file, PIECE_BYTES, at))
