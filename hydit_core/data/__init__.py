"""Pictures and captions for training: sources, sizes, order, caches.

Every batch is a pure function of (configuration, seed, step): it does not depend on the rank, on the
number of workers, or on where a run was interrupted.
"""

from __future__ import annotations

from ..moved import former

__getattr__ = former(__name__)
