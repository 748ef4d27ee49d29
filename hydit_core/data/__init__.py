"""Pictures and captions for training: sources, sizes, order, caches.

Every batch is a pure function of (configuration, seed, step): it does not depend on the rank, on the
number of workers, or on where a run was interrupted.
"""

from __future__ import annotations

from ..moved import former

_HOMES = (
    "cache.latents", "cache.text", "config", "control_images", "dataset", "manifest", "order", "summary",
)  # fmt: skip
__getattr__ = former(__name__, _HOMES)
