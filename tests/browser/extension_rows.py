"""The nodes that have help, and whether a page shows the rows that the pack adds to them."""

from __future__ import annotations

from typing import Any

from find_host import ROOT


def rows_are_shown(page: Any) -> bool:
    """Nodes 2.0 of the oldest frontend (a hidden experiment there) shows no HTML widgets at all."""
    return not (page.nodes2 and page.server.version.startswith("0.3."))


def documented() -> list[str]:
    return sorted(path.name for path in (ROOT / "web" / "docs").iterdir() if path.name.startswith("HyDiT"))
