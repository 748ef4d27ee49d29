"""The DiT and its ControlNet."""

from .attention import sdpa
from .controlnet import ControlNet, combine_controls
from .dit import Context, DiT
from .rope import apply_rope, rope_table

__all__ = ["Context", "ControlNet", "DiT", "apply_rope", "combine_controls", "rope_table", "sdpa"]
