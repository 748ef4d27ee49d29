"""LoRA files in and out: see :func:`read` and :func:`write`."""

from __future__ import annotations

from .reading import from_tensors, read
from .writing import FORMATS, to_tensors, write

__all__ = ["FORMATS", "from_tensors", "read", "to_tensors", "write"]
