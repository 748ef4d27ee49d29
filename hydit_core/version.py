"""The version of hydit. Only ``pyproject.toml`` states it, where ComfyUI's manager reads it."""

from __future__ import annotations

import re
from pathlib import Path

_STATED = re.compile(r'^name = "hydit"$.*?^version = "([^"]+)"$', re.MULTILINE | re.DOTALL)


def _find() -> str:
    """From ``pyproject.toml`` in a cloned or unpacked folder, else from the installed package."""
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
