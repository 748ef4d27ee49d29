"""Weights on disk: safe lazy reading, atomic writing, every key layout, and naming what a file is."""
