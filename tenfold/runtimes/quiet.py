"""Keep warnings of exporter libraries from the terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_TALKERS = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "torch.fx", "executorch", "torchao", "root")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, and log lines below errors, of the libraries that write files."""
    loggers = [logging.getLogger(name if name != "root" else None) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
