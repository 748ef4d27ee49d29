"""LoRA files in and out: see :func:`read` and :func:`write`."""

from __future__ import annotations

from .reading import read
from .writing import FORMATS, write

__all__ = ["FORMATS", "read", "write"]
