"""Text to picture on the command line: ``python -m hydit_core.generate``."""

from __future__ import annotations

from ..moved import former

__getattr__ = former(__name__)
