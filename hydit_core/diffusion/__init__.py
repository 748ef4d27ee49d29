"""Noise schedule, denoisers, guidance, samplers and training losses."""

from __future__ import annotations

from ..moved import former

__getattr__ = former(__name__)
