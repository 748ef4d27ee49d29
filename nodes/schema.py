"""Node schemas for every version of ComfyUI that the pack supports."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

from comfy_api.latest import io


@cache
def _known() -> frozenset[str]:
    return frozenset(field.name for field in fields(io.Schema))


def make_schema(**kwargs: Any) -> io.Schema:
    """``io.Schema`` without the fields that this version of ComfyUI lacks (``search_aliases`` ... are newer).

    ``has_intermediate_output``: a run whose result comes from the cache sends the page again what the node
    showed. In versions without it, the page reads that in the history of the run.
    """
    return io.Schema(**{name: value for name, value in kwargs.items() if name in _known()})
