"""The DiT and its ControlNet."""

from __future__ import annotations

from ..moved import former

__getattr__ = former(__name__)
