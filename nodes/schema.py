"""One way to write a node's schema for every ComfyUI that the pack runs on."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

from comfy_api.latest import io


@cache
def _known() -> frozenset[str]:
    return frozenset(field.name for field in fields(io.Schema))


def make_schema(**kwargs: Any) -> io.Schema:
    """``io.Schema`` without what this ComfyUI's schema does not have (``search_aliases`` ... came later).

    ``has_intermediate_output``: a run sends once more what the node told the page, where its result comes
    from the cache. Where ComfyUI does not know that, the page reads it in the history of the run.
    """
    return io.Schema(**{name: value for name, value in kwargs.items() if name in _known()})
