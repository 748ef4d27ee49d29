"""HunyuanDiT's IP-Adapter: from a picture's embedding to more keys and values for every cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import WeightsError
from ..untrusted import count_numbered
from .attention import Attended
from .config import DiTConfig, shape_of
from .trunk import Drawn, everywhere, xavier_uniform

_TOKENS, _NORM = "ip_adapter_clip_len_trans_block", "ip_adapter_img_norm_cond"
MARKS = ("kv_proj_ip_adapter", "k_norm_ip_adapter", _TOKENS, _NORM)
"""Parts of names that only IP-Adapters of HunyuanDiT have."""


@dataclass(frozen=True)
class IPAdapterConfig:
    """Dimensions, all read from the tensors' shapes; the defaults are those of the published one.

    ``hidden_size``, ``depth`` and ``num_heads`` are the DiT's. A picture's embedding of ``embed_dim`` values
    becomes ``num_tokens`` tokens of ``token_dim``.
    """

    hidden_size: int = 1408
    depth: int = 40
    num_heads: int = 16
    embed_dim: int = 1024
    num_tokens: int = 8
    token_dim: int = 1024

    @classmethod
    def for_dit(cls, dit: DiTConfig, embed_dim: int, num_tokens: int = 8) -> IPAdapterConfig:
        """Those of a new one for a DiT and an image encoder."""
        return cls(dit.hidden_size, dit.depth, dit.num_heads, embed_dim, num_tokens, dit.text_dim)

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, Any]) -> IPAdapterConfig:
        """Read from tensors or shapes by Tencent's names.

        Raises :class:`WeightsError` when a needed tensor is missing or the shapes contradict each other.
        """
        what = "an IP-Adapter of HunyuanDiT"
        rows, embed_dim = shape_of(shapes, f"{_TOKENS}.weight", 2, what)
        (token_dim,) = shape_of(shapes, f"{_NORM}.weight", 1, what)
        twice, _ = shape_of(shapes, "blocks.0.attn2.kv_proj_ip_adapter.weight", 2, what)
        (head_dim,) = shape_of(shapes, "blocks.0.attn2.k_norm_ip_adapter.weight", 1, what)
        if rows % token_dim or twice % (2 * head_dim):
            raise WeightsError(
                f"{_TOKENS}.weight has {rows} rows for tokens of {token_dim}, the first block's projection "
                f"{twice} for keys and values with heads of {head_dim}: neither may have a remainder"
            )
        depth = count_numbered(shapes, "blocks.")
        return cls(twice // 2, depth, twice // 2 // head_dim, embed_dim, rows // token_dim, token_dim)


class _Attn2(nn.Module):
    def __init__(self, config: IPAdapterConfig, operations: Any, **factory: Any):
        super().__init__()
        self.num_heads = config.num_heads
        head_dim = config.hidden_size // config.num_heads
        self.kv_proj_ip_adapter = operations.Linear(config.token_dim, 2 * config.hidden_size, **factory)
        self.k_norm_ip_adapter = operations.LayerNorm(head_dim, eps=1e-6, **factory)

    def forward(self, tokens: Tensor) -> Attended:
        keys, values = rearrange(
            self.kv_proj_ip_adapter(tokens),
            "b m (two heads d) -> two b m heads d",
            two=2,
            heads=self.num_heads,
        )
        return Attended(self.k_norm_ip_adapter(keys).to(values.dtype), values)


class _Block(nn.Module):
    def __init__(self, config: IPAdapterConfig, operations: Any, **factory: Any):
        super().__init__()
        self.attn2 = _Attn2(config, operations, **factory)

    def forward(self, tokens: Tensor) -> Attended:
        attended: Attended = self.attn2(tokens)
        return attended


class IPAdapter(nn.Module):
    """The tensors that Tencent's IP-Adapter adds to HunyuanDiT (after Ye et al. 2023), under their names.

    Keys and values do not depend on the noise: they are computed once for a picture.
    """

    def __init__(
        self,
        config: IPAdapterConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
    ):
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.ip_adapter_clip_len_trans_block = operations.Linear(
            config.embed_dim, config.num_tokens * config.token_dim, **factory
        )
        self.ip_adapter_img_norm_cond = operations.LayerNorm(config.token_dim, **factory)
        self.blocks = nn.ModuleList(_Block(config, operations, **factory) for _ in range(config.depth))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in."""
        return self.ip_adapter_clip_len_trans_block.weight.dtype

    def tokens(self, embeddings: Tensor) -> Tensor:
        """``embeddings`` (B, embed_dim) -> (B, num_tokens, token_dim). Without a picture they are zeros."""
        wide = self.ip_adapter_clip_len_trans_block(embeddings)
        # The tokens lie side by side: token j has the values j, j + num_tokens, ...
        tokens = rearrange(wide, "b (d m) -> b m d", m=self.config.num_tokens)
        return self.ip_adapter_img_norm_cond(tokens)

    def forward(self, embeddings: Tensor) -> list[Attended]:
        """``embeddings`` (B, embed_dim) -> keys and values for each block of the DiT. Differentiable."""
        tokens = self.tokens(embeddings)
        return [block(tokens) for block in self.blocks]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, see :meth:`drawn`."""
        for parameter, values in self.drawn(generator):
            parameter.copy_(values)

    def drawn(self, generator: torch.Generator | None = None) -> Drawn:
        """New weights as Tencent/HunyuanDiT draws them, with values of zero: a new one changes nothing.

        One parameter after the other with its values.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                new = xavier_uniform(module.weight.shape, generator)
                if name.endswith("kv_proj_ip_adapter"):
                    new[self.config.hidden_size :] = 0
                yield module.weight, new
                yield module.bias, everywhere(0.0, module.bias)
            elif isinstance(module, nn.LayerNorm):
                yield module.weight, everywhere(1.0, module.weight)
                yield module.bias, everywhere(0.0, module.bias)
