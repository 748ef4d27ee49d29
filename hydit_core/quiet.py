"""Importing transformers, diffusers and peft without what torchao says on the way.

They import torchao wherever it is installed, to know its quantised weights. A torchao that was built for
another torch, or without a GPU's libraries, then reports on what we never use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

#: Who speaks: torchao, torch about torchao's classes, and diffusers about torchao.
_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Meanwhile torchao's warnings are not shown. Errors are, and so is what the user has set a level for."""
    hushed = [logger for logger in map(logging.getLogger, _LOGGERS) if logger.level == logging.NOTSET]
    for logger in hushed:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger in hushed:
            logger.setLevel(logging.NOTSET)
