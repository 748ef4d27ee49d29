"""One training at a time in a run's folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from .. import locks
from ..locks import FILE, holder

__all__ = ["FILE", "hold", "holder", "in_use"]


def hold(folder: Path) -> AbstractContextManager[None]:
    """As :func:`~..locks.hold`, for a training."""
    return locks.hold(folder, lambda name: in_use(folder, name))


def in_use(folder: Path, name: str) -> str:
    """The error's text for a folder that ``name`` holds."""
    return (
        f"{folder}: another training writes there ({name}); wait until it ends or stop it, or choose "
        "another run.output_dir"
    )
