"""The DiT and its ControlNet."""
