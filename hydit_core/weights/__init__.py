"""Weights on disk: safe and lazy reading, atomic writing, all key layouts, and recognizing what a file is."""
