"""Importing transformers, diffusers and peft without torchao's messages.

They import torchao if it is installed, to support its quantised weights. A torchao that was built for
another torch, or without a GPU's libraries, then complains about things that we never use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

#: The loggers: torchao's, torch's about torchao's classes, and diffusers' about torchao.
_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide torchao's warnings inside the block, but not errors, nor loggers whose level the user has set."""
    hushed = [logger for logger in map(logging.getLogger, _LOGGERS) if logger.level == logging.NOTSET]
    for logger in hushed:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger in hushed:
            logger.setLevel(logging.NOTSET)
