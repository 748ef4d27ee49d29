"""Where the nodes of a graph stand on ComfyUI's page: in columns, from left to right."""

from __future__ import annotations

from .workflow import KINDS

BELOW = 780
"""Top of the second row, below loaders and prompts."""
COLUMN = 360
"""From the left of one node to that of the next. The page leaves out texts if a graph is too wide for it."""
GAP = 50
"""Between two nodes of a column, for the title of the lower one."""


def beneath(kind: str, top: int = 0) -> int:
    """The top of the next node in a column, below one of this kind."""
    return top + KINDS[kind].size[1] + GAP
