"""ComfyUI's attention as the attention function of hydit_core's models."""

from __future__ import annotations

import comfy.ldm.modules.attention
import torch
from torch import Tensor

from ...hydit_core.model.attention import Options
from .patches import REPLACEMENT


class HostAttention:
    """The attention that ComfyUI was started with, or that a node replaced it with.

    ``precision`` is the dtype of the scores, if the backend allows a choice; None: that of the queries.
    """

    def __init__(self, precision: torch.dtype | None = None) -> None:
        self.precision = precision

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, options: Options = None) -> Tensor:
        """``q`` (B, N, heads, head_dim), ``k``, ``v`` (B, M, heads, head_dim) -> (B, N, heads * head_dim).

        ``options`` are ComfyUI's ``transformer_options``: an ``optimized_attention_override`` in them is
        called, and so are the replacements that :mod:`.patches` puts there.
        """
        if options is not None and REPLACEMENT in options:
            return options[REPLACEMENT](q.flatten(2), k.flatten(2), v.flatten(2))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, head_dim)
        # Looked up at each call: some nodes replace the module's function.
        return comfy.ldm.modules.attention.optimized_attention(
            q, k, v, q.shape[1],
            skip_reshape=True, attn_precision=self.precision, transformer_options=options,
        )  # fmt: skip
