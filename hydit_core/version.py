"""The version of hydit, which ``pyproject.toml`` alone states: ComfyUI's manager reads it there."""

from __future__ import annotations

import re
from pathlib import Path

_STATED = re.compile(r'^name = "hydit"$.*?^version = "([^"]+)"$', re.MULTILINE | re.DOTALL)


def _find() -> str:
    """Of a folder that was cloned or unpacked, else of the package that was installed."""
    try:
        stated = _STATED.search((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        stated = None
    if stated:
        return stated[1]
    from importlib import metadata

    try:
        return metadata.version("hydit")
    except metadata.PackageNotFoundError:
        return "unknown"


VERSION = _find()
