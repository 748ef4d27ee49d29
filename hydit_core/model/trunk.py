"""What DiT and ControlNet share: embedders, text context, blocks, initialization."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionFn, ImageContext, Options, Rope, sdpa
from .blocks import Block
from .config import DiTConfig
from .embeddings import AttentionPool, PatchEmbed, TimestepEmbedder, timestep_embedding


class Context(NamedTuple):
    """A prompt as the blocks use it: ``text`` (B, L, text_dim) and ``vector`` (B, hidden_size)."""

    text: Tensor
    vector: Tensor

    @staticmethod
    def cat(contexts: list[Context]) -> Context:
        """Join several contexts into one batch, for guidance in one forward."""
        return Context(*(torch.cat(parts) for parts in zip(*contexts, strict=True)))

    def last(self, rows: int) -> Context:
        """The last rows alone: of a guided batch those of the prompts, without the negative ones."""
        return Context(*(part[len(part) - rows :] for part in self))


Drawn = Iterator[tuple[Tensor, Tensor]]
"""Parameters with their first values."""


class Trunk(nn.Module):
    """Embedders, text context and the first ``num_blocks`` blocks of a HunyuanDiT, under Tencent's names.

    ``operations`` provides Linear, LayerNorm, Conv2d and Embedding (default: ``torch.nn``); ``attention`` is
    called for every attention of the blocks. There are no buffers, and parameters outside such layers are
    cast to the input's device and dtype where they are used.

    ``gradient_checkpointing`` is the fraction of the blocks (True: all) whose activations are recomputed in
    the backward pass instead of being kept.
    """

    block_class: type[Block] = Block
    gradient_checkpointing: float = 0.0
    random_blocks: bool = False  # dropout in adapters: recomputation must draw the same numbers

    def __init__(
        self,
        config: DiTConfig,
        *,
        num_blocks: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any = nn,
        attention: AttentionFn = sdpa,
    ):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.text_embedding_padding = nn.Parameter(
            torch.zeros(config.text_len + config.t5_len, config.text_dim, **factory)
        )
        self.mlp_t5 = nn.Sequential(
            operations.Linear(config.t5_dim, config.t5_hidden, **factory),
            nn.SiLU(),
            operations.Linear(config.t5_hidden, config.text_dim, **factory),
        )
        self.pooler = AttentionPool(
            config.t5_len, config.t5_dim, config.pooler_heads, config.pooled_dim, operations, **factory
        )
        if config.style_cond:
            self.style_embedder = operations.Embedding(1, dim, **factory)
        self.extra_embedder = nn.Sequential(
            operations.Linear(config.extra_dim, 4 * dim, **factory),
            nn.SiLU(),
            operations.Linear(4 * dim, dim, **factory),
        )
        self.t_embedder = TimestepEmbedder(dim, operations, **factory)
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, dim, operations, **factory)
        self.blocks = nn.ModuleList(
            self.block_class(config, attention, operations, skip=i > config.depth // 2, **factory)
            for i in range(num_blocks)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in."""
        return self.x_embedder.proj.weight.dtype

    def encode_context(
        self,
        bert: Tensor,
        bert_mask: Tensor,
        t5: Tensor,
        t5_mask: Tensor,
        *,
        image_meta_size: Tensor | None = None,
        style: Tensor | None = None,
    ) -> Context:
        """Turn text features into a :class:`Context`, in the dtype of ``bert``; differentiable.

        ``bert`` (B, text_len, text_dim), ``t5`` (B, t5_len, t5_dim), masks (B, length) with 0 for padding.
        Longer text is allowed: padding rows repeat, and the pooled vector uses the first ``t5_len`` rows.
        ``image_meta_size`` (B, 6) is (original width, original height, width, height, crop left, crop top) in
        pixels, ``style`` (B,) a row number (default 0); models without those conditions ignore both.

        Raises :class:`ValueError` on features of other dimensions, or when a needed size is missing.
        """
        self._check_features(bert, bert_mask, t5, t5_mask)
        t5 = t5.to(bert.dtype)
        text = torch.cat((bert, self.mlp_t5(t5)), dim=1)  # (B, L, text_dim)
        mask = torch.cat((bert_mask.bool(), t5_mask.bool()), dim=1)[..., None].to(text.device)  # (B, L, 1)
        text = torch.where(mask, text, self._padding(bert.shape[1], t5.shape[1]).to(text))

        # The pooled vector uses the raw features, padding rows included
        extra = [self.pooler(t5[:, : self.config.t5_len])]
        if self.config.size_cond:
            if image_meta_size is None:
                raise ValueError("this model (v1.1 or older) needs image_meta_size (B, 6)")
            sizes = timestep_embedding(image_meta_size.flatten()).view(len(bert), -1)
            extra.append(sizes.to(bert))
        if self.config.style_cond:
            rows = torch.zeros(len(bert), dtype=torch.long, device=bert.device) if style is None else style
            extra.append(self.style_embedder(rows.to(bert.device)).to(bert.dtype))
        return Context(text, self.extra_embedder(torch.cat(extra, dim=1)))

    def _check_features(self, bert: Tensor, bert_mask: Tensor, t5: Tensor, t5_mask: Tensor) -> None:
        config = self.config
        for name, features, mask, length, dim in (
            ("bert", bert, bert_mask, config.text_len, config.text_dim),
            ("t5", t5, t5_mask, config.t5_len, config.t5_dim),
        ):
            if features.ndim != 3 or features.shape[1] < length or features.shape[2] != dim:
                raise ValueError(
                    f"{name} features {tuple(features.shape)}; expected (batch, {length}, {dim})"
                )
            if mask.shape != features.shape[:2]:
                raise ValueError(f"{name} mask {tuple(mask.shape)}; expected {tuple(features.shape[:2])}")

    def _padding(self, text_len: int, t5_len: int) -> Tensor:
        """The learned rows that replace padding, (text_len + t5_len, text_dim)."""
        rows, config = self.text_embedding_padding, self.config
        if (text_len, t5_len) == (config.text_len, config.t5_len):
            return rows
        text_rows = torch.arange(text_len, device=rows.device) % config.text_len
        t5_rows = torch.arange(t5_len, device=rows.device) % config.t5_len + config.text_len
        return rows[torch.cat((text_rows, t5_rows))]

    def _condition(self, t: Tensor, context: Context) -> Tensor:
        """The vector that modulates the blocks, (B, hidden_size), from ``t`` (B,) or a scalar."""
        vector = context.vector
        t = t.to(vector.device).float().expand(len(vector))
        return self.t_embedder(t, vector.dtype) + vector

    def _run_block(
        self,
        index: int,
        x: Tensor,
        text: Tensor,
        vector: Tensor,
        rope: Rope,
        skip: Tensor | None = None,
        options: Options = None,
        images: ImageContext | None = None,
    ) -> Tensor:
        """Run block ``index``; subclasses override it to observe or replace single blocks."""
        block = self.blocks[index]
        fraction = float(self.gradient_checkpointing)
        if int((index + 1) * fraction) > int(index * fraction) and torch.is_grad_enabled():
            keep = self.random_blocks  # the generator's state, a waste if nothing is random
            given = (x, text, vector, rope, skip, options, images)
            return checkpoint(block, *given, use_reentrant=False, preserve_rng_state=keep)
        return block(x, text, vector, rope, skip, options, images)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, see :meth:`drawn`."""
        for parameter, values in self.drawn(generator):
            parameter.copy_(values)

    def drawn(self, generator: torch.Generator | None = None) -> Drawn:
        """The weights of a new model as Tencent/HunyuanDiT draws them for training from scratch.

        One parameter after the other with its values; of several of one, the last count. They are drawn on
        the generator's device (default: CPU), so one seed gives one model everywhere.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                yield module.weight, xavier_uniform(module.weight.shape, generator)
            elif isinstance(module, nn.LayerNorm):
                yield module.weight, everywhere(1.0, module.weight)
            elif isinstance(module, nn.Embedding):
                yield module.weight, _normal(module.weight, 1.0, generator)
        for mlp in (self.t_embedder.mlp, self.extra_embedder):
            for layer in mlp:
                if isinstance(layer, nn.Linear):
                    yield layer.weight, _normal(layer.weight, 0.02, generator)
        for name, parameter in self.named_parameters():
            # zero modulation: at first the condition shifts nothing in the blocks
            if name.endswith(".bias") or ".default_modulation." in name:
                yield parameter, everywhere(0.0, parameter)
        yield self.text_embedding_padding, _normal(self.text_embedding_padding, 1.0, generator)
        position = self.pooler.positional_embedding
        yield position, _normal(position, self.config.t5_dim**-0.5, generator)


def xavier_uniform(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Glorot & Bengio 2010; a convolution counts as the matrix from its patch to its channels."""
    bound = (6 / (shape[0] + math.prod(shape[1:]))) ** 0.5
    return torch.empty(*shape, device=_device(generator)).uniform_(-bound, bound, generator=generator)


def everywhere(value: float, like: Tensor) -> Tensor:
    """One value in the shape of ``like``, which takes no memory."""
    return torch.full((), value).expand(like.shape)


def _normal(like: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    return torch.empty(like.shape, device=_device(generator)).normal_(0, std, generator=generator)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
