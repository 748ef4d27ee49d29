"""HunyuanDiT's ControlNet: from a hint picture's latents to one residual for each skip of the DiT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionFn, Options, sdpa
from .config import DiTConfig
from .dit import DiT
from .rope import rope_table
from .trunk import Context, Drawn, Trunk, everywhere


class ControlNet(Trunk):
    """A copy of the DiT's first half that also sees a hint (Zhang et al. 2023, Tencent/HunyuanDiT).

    ``config`` is that of the DiT that it controls. It has its own text projections: encode the prompt with
    its own :meth:`encode_context`. Parameters are described at :class:`Trunk`.
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
            num_blocks=config.num_controls,
            dtype=dtype,
            device=device,
            operations=operations,
            attention=attention,
        )
        dim = config.hidden_size
        self.before_proj = operations.Linear(dim, dim, dtype=dtype, device=device)
        self.after_proj_list = nn.ModuleList(
            operations.Linear(dim, dim, dtype=dtype, device=device) for _ in range(config.num_controls)
        )

    def forward(
        self, x: Tensor, t: Tensor, context: Context, hint: Tensor, *, options: Options = None
    ) -> list[Tensor]:
        """Residuals (B, N, D), one for each skip of the DiT, in the context's dtype.

        ``x`` (B, in_channels, H, W) and ``t`` are the DiT's; ``hint`` (B or 1, in_channels, H, W) is the hint
        picture as latents, scaled like ``x``.

        Raises :class:`ValueError` when the hint is of another size.
        """
        if hint.shape[1:] != x.shape[1:]:
            raise ValueError(f"hint latents are {tuple(hint.shape[1:])}; expected {tuple(x.shape[1:])} as x")
        config, dtype = self.config, context.text.dtype
        th, tw = (-(-size // config.patch_size) for size in x.shape[-2:])
        rope = rope_table(th, tw, config.head_dim, base=config.rope_base, device=x.device)
        vector = self._condition(t, context)  # (B, D)
        tokens = self.x_embedder(x.to(dtype)) + self.before_proj(self.x_embedder(hint.to(x.device, dtype)))

        residuals = []
        for i, after_proj in enumerate(self.after_proj_list):
            tokens = self._run_block(i, tokens, context.text, vector, rope, options=options)
            residuals.append(after_proj(tokens))
        return residuals

    def drawn(self, generator: torch.Generator | None = None) -> Drawn:
        """As :meth:`Trunk.drawn`; the added projections are zero, so a new one changes nothing."""
        yield from super().drawn(generator)
        for parameter in self.projections():
            yield parameter, everywhere(0.0, parameter)

    def projections(self) -> Iterator[nn.Parameter]:
        """What it has besides the DiT's first half."""
        for layer in (self.before_proj, self.after_proj_list):
            yield from layer.parameters()

    @classmethod
    @torch.no_grad()
    def from_base(cls, dit: DiT, *, operations: Any = nn, attention: AttentionFn = sdpa) -> ControlNet:
        """A new ControlNet for ``dit``: its first half copied, the added projections zero."""
        net = cls(
            dit.config,
            dtype=dit.dtype,
            device=dit.x_embedder.proj.weight.device,
            operations=operations,
            attention=attention,
        )
        source = dit.state_dict()
        added = ("before_proj.", "after_proj_list.")
        for name, weight in net.state_dict().items():
            if not name.startswith(added):
                weight.copy_(source[name])
        for parameter in net.projections():
            nn.init.zeros_(parameter)
        return net


def combine_controls(
    controls: Sequence[tuple[Sequence[Tensor], float | Sequence[float] | Tensor]],
) -> list[Tensor]:
    """Sum several ControlNets' residuals, each multiplied by its weight or by one weight per layer.

    Raises :class:`ValueError` when the numbers of residuals or of weights differ.
    """
    count = len(controls[0][0])
    combined: list[Tensor] = []
    for residuals, weights in controls:
        given = weights.reshape(-1).tolist() if isinstance(weights, Tensor) else weights
        factors = [float(w) for w in given] if isinstance(given, Iterable) else [float(given)]
        factors = factors * count if len(factors) == 1 else factors
        if len(residuals) != count or len(factors) != count:
            raise ValueError(
                f"{len(residuals)} residuals with {len(factors)} weights; expected {count} residuals and "
                f"1 or {count} weights"
            )
        scaled = [residual * factor for residual, factor in zip(residuals, factors, strict=True)]
        combined = [a + b for a, b in zip(combined, scaled, strict=True)] if combined else scaled
    return combined
