"""How do our processes say what they do? One line a record: time, level, logger, words, then key=value pairs."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

ROOT_LOGGER = "kvferry"
_HIDDEN = ("token", "secret", "password", "authorization")


class LineFormatter(logging.Formatter):
    """One line even for exceptions, so that lines can be counted and cut."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return " | ".join(line.strip() for line in text.splitlines() if line.strip())


def fields(**values: object) -> str:
    """`key=value` pairs; the values of keys that name a secret are hidden, texts with blanks are quoted."""
    return " ".join(f"{key}={_shown(key, value)}" for key, value in values.items())


def _shown(key: str, value: object) -> str:
    if any(word in key.lower() for word in _HIDDEN):
        return "***"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return f'"{text}"' if " " in text else text


def set_up(level: str, stream: TextIO | None = None) -> logging.Logger:
    """Send our loggers to `stream` (stderr), once; other libraries keep their own."""
    logger = logging.getLogger(ROOT_LOGGER)
    logger.setLevel(level)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger.addHandler(handler)
    return logger


def logger(name: str) -> logging.Logger:
    return logging.getLogger(f"{ROOT_LOGGER}.{name}")
