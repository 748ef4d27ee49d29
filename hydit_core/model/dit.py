"""HunyuanDiT: latents, timestep and text in, prediction and variance out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .attention import AttentionFn, ImageContext, Options, Rope, sdpa
from .blocks import FinalLayer
from .config import DiTConfig
from .rope import rope_table
from .trunk import Context, Drawn, Trunk, everywhere

__all__ = ["Context", "DiT"]


class DiT(Trunk):
    """HunyuanDiT (Li et al. 2024): a U-shaped transformer over latent patches.

    Construction does not initialize the weights: load a state dict or call :meth:`initialize`.
    Parameters are described at :class:`Trunk`.
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        attention: AttentionFn = sdpa,
    ):
        super().__init__(
            config,
            num_blocks=config.depth,
            dtype=dtype,
            device=device,
            operations=operations,
            attention=attention,
        )
        patch_values = config.patch_size**2 * config.out_channels
        self.final_layer = FinalLayer(
            config.hidden_size, patch_values, operations, dtype=dtype, device=device
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Context,
        control: Sequence[Tensor | None] | None = None,
        *,
        images: Sequence[ImageContext] | None = None,
        options: Options = None,
    ) -> Tensor:
        """Predict from noisy latents.

        ``x`` (B, in_channels, H, W), any H and W; ``t`` (B,) or scalar, the timestep 0..999, fractions
        allowed; ``context`` from :meth:`encode_context`. ``control[i]`` (B, N, D), from a ControlNet, is
        added to skip i; None adds nothing. ``images[i]`` is what block i attends to beside the text
        (:class:`~.ip_adapter.IPAdapter`). ``options`` is handed to the attention function.

        Returns (B, out_channels, H, W) in the dtype of ``x``: the prediction (v for the published weights) in
        the first half of the channels, the learned variance in the second. Computes in the context's dtype.

        Raises :class:`ValueError` unless ``control`` has ``config.num_controls`` entries and ``images`` one
        for each block.
        """
        config = self.config
        if control is not None and len(control) != config.num_controls:
            raise ValueError(
                f"control has {len(control)} residuals; this model of depth {config.depth} has "
                f"{config.num_controls} skips to add them to"
            )
        if images is not None and len(images) != config.depth:
            raise ValueError(f"images are for {len(images)} blocks; this model has {config.depth}")
        th, tw = (-(-size // config.patch_size) for size in x.shape[-2:])
        rope = self._rope(th, tw, x.device, options)
        vector = self._condition(t, context)  # (B, D)
        tokens = self.x_embedder(x.to(context.text.dtype))  # (B, N, D)

        skips: list[Tensor] = []
        for i in range(config.depth):
            skip = skips.pop() if i > config.depth // 2 else None
            if skip is not None and control is not None:
                residual = control[len(skips)]
                skip = skip if residual is None else skip + residual.to(skip.dtype)
            seen = {} if images is None or not images[i].matters else {"images": images[i]}
            tokens = self._run_block(i, tokens, context.text, vector, rope, skip, options, **seen)
            if i < config.num_controls:
                skips.append(tokens)

        out = self._unpatchify(self.final_layer(tokens, vector), th, tw)
        return out[..., : x.shape[-2], : x.shape[-1]].to(x.dtype)

    def _rope(self, th: int, tw: int, device: torch.device, options: Options) -> Rope:
        """The positions of the tokens; subclasses override it to move them."""
        return rope_table(th, tw, self.config.head_dim, base=self.config.rope_base, device=device)

    def _unpatchify(self, tokens: Tensor, th: int, tw: int) -> Tensor:
        """Put the patches at their places in the picture."""
        p = self.config.patch_size
        return rearrange(tokens, "b (th tw) (p q c) -> b c (th p) (tw q)", th=th, tw=tw, p=p, q=p)

    def drawn(self, generator: torch.Generator | None = None) -> Drawn:
        """As :meth:`Trunk.drawn`; the final layer is zero, so a new model outputs exactly 0."""
        yield from super().drawn(generator)
        for layer in (self.final_layer.adaLN_modulation, self.final_layer.linear):
            for parameter in layer.parameters():
                yield parameter, everywhere(0.0, parameter)
