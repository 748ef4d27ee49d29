"""Pictures and captions for training: sources, sizes, order, caches.

Every batch is a pure function of (configuration, seed, step): it does not depend on the rank, on the
number of workers, or on where a run was interrupted.
"""
