"""Where is the tests' model that sees through sliding windows? In the folder for temporary files, made once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from bench.models.windowed import MIXED, SLIDING, WINDOW, write_windowed_model
from tests.support.model import random_model_path

__all__ = ["MIXED", "SLIDING", "WINDOW", "windowed_model_path"]


@functools.cache
def windowed_model_path(layers: str) -> Path:
    """Its layers from first to last, S a sliding one, F a full one."""
    folder = Path(tempfile.gettempdir()) / f"kvferry-windowed-model-1-{WINDOW}-{layers}"
    return write_windowed_model(folder, layers, random_model_path())
