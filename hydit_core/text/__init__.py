"""BERT and mT5: prompts to the features that a HunyuanDiT is conditioned on."""

from __future__ import annotations

from ..moved import former

__getattr__ = former(__name__)
