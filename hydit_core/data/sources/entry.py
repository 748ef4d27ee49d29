"""The row that every source yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """One picture and its captions, before the picture has been looked at.

    ``key`` names the picture within its source, the same wherever the source lies. Width and height
    are 0 unless the source itself tells them. ``hint`` says where a missing caption may be.
    """

    key: str
    path: Path
    captions: tuple[str, ...]
    width: int = 0
    height: int = 0
    extra: dict[str, str] = field(default_factory=dict)
    hint: str = ""
