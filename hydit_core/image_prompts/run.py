"""Image prompts in a run: which pictures, how strongly, in which blocks, when and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ..diffusion.schedule import timestep_range
from ..errors import ConfigError, HyditError
from ..finite import DTYPE_ADVICE
from ..images import Geometry, Size, same_shape
from ..layer_weights import LayerWeights
from ..model.attention import Attended, ImageContext
from ..model.config import DiTConfig
from ..model.ip_adapter import IPAdapter
from ..tiles import Box

if TYPE_CHECKING:  # it brings transformers
    from .encoder import ImageEncoder


@dataclass(frozen=True)
class ImagePrompt:
    """A picture as a prompt, by an IP-Adapter.

    Args:
        adapter, encoder: on any device; one of each serves any number of pictures.
        image: of any size and shape; the encoder sees it squeezed into a square.
        weight: 1 is as trained, 0 is off.
        blocks: factors on the weight for each block of the DiT.
        start, end: fractions of the noise schedule between which it acts, 0 (pure noise) to 1 (finished), as
            ComfyUI counts them.
        mask: where in the picture that is drawn it acts: white fully, black not at all; None: everywhere.
            Of any size, but of the shape of what is drawn.
        text_scale: factor of what the text gives while it acts; 1 is as trained.

    Raises :class:`ConfigError` for values that are out of range, and networks that do not fit together.
    """

    adapter: IPAdapter
    encoder: ImageEncoder
    image: Image.Image
    weight: float = 1.0
    blocks: LayerWeights = field(default_factory=LayerWeights)
    start: float = 0.0
    end: float = 1.0
    mask: Image.Image | None = None
    text_scale: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.start, self.end)
        if not (math.isfinite(self.weight) and math.isfinite(self.text_scale)):
            raise ConfigError(f"image prompt weight {self.weight:g}, text {self.text_scale:g}: use numbers")
        check_encoder(self.encoder.config.embed_dim, self.adapter)


def check_range(start: float, end: float) -> None:
    """Raise :class:`ConfigError` unless 0 <= start <= end <= 1."""
    if not 0 <= start <= end <= 1:
        raise ConfigError(f"image prompt from {start:g} to {end:g}: use 0 <= start <= end <= 1")


def check_encoder(embed_dim: int, adapter: IPAdapter) -> None:
    """Raise :class:`ConfigError` unless an image encoder's embeddings fit an IP-Adapter."""
    if embed_dim != adapter.config.embed_dim:
        raise ConfigError(
            f"the image encoder gives {embed_dim} values, the IP-Adapter takes {adapter.config.embed_dim}: "
            "use the encoder that it was trained with"
        )


def check_adapter(adapter: IPAdapter, dit: DiTConfig, who: str = "the IP-Adapter") -> None:
    """Raise :class:`ConfigError` unless an IP-Adapter has the dimensions of the DiT."""
    wrong = [
        f"{name} {getattr(adapter.config, name)} instead of {getattr(dit, name)}"
        for name in ("hidden_size", "depth", "num_heads")
        if getattr(adapter.config, name) != getattr(dit, name)
    ]
    if wrong:
        raise ConfigError(f"{who} does not fit this HunyuanDiT: {', '.join(wrong)}; both must have one size")


def check_mask(mask: Image.Image, size: Size, who: str = "the mask of an image prompt") -> None:
    """Raise :class:`ConfigError` unless a mask has the proportions of what is drawn, (W, H)."""
    if not same_shape(mask.size, size):
        raise ConfigError(
            f"{who} is {mask.width}x{mask.height}, what is drawn {size[0]}x{size[1]}: "
            "they must have the same shape"
        )


def block_weights(weights: LayerWeights, depth: int) -> list[float]:
    """One for each block. Raises :class:`ConfigError` if a list has another length."""
    if len(weights.values) not in (0, depth):
        raise ConfigError(
            f"{len(weights.values)} weights of an image prompt for a model with {depth} blocks: give {depth} "
            "numbers, one for all, or the name of a curve"
        )
    return weights.resolve(depth)


def weighted(
    adapter: IPAdapter, embedding: Tensor, weights: Sequence[float], guided: bool
) -> list[Attended | None]:
    """What each block attends to for an embedding (1, embed_dim), None where its weight is 0.

    One row, or with ``guided`` two: the first is for the negative prompt, which sees no picture (an embedding
    of zeros). Weights are in the values, so that no step has to multiply. Computes in the embedding's dtype.

    Raises :class:`HyditError` where values overflow.
    """
    rows = torch.cat((torch.zeros_like(embedding), embedding)) if guided else embedding
    with torch.no_grad():
        seen = adapter(rows)
    if not all(one.values.isfinite().all() and one.keys.isfinite().all() for one in seen):
        raise HyditError(f"the IP-Adapter's values are not finite in {embedding.dtype}; {DTYPE_ADVICE}")
    weighed = [
        one._replace(values=one.values if weight == 1 else one.values * weight) if weight else None
        for one, weight in zip(seen, weights, strict=True)
    ]
    if not all(one is None or one.values.isfinite().all() for one in weighed):
        most = max(weights, key=abs)
        raise HyditError(
            f"the IP-Adapter's values are not finite in {embedding.dtype} with a weight of {most:g} (of "
            "picture and block): use a smaller one"
        )
    return weighed


def latent_mask(mask: Image.Image, size: Size, downscale: int = 8) -> Tensor:
    """A mask for pictures of ``size`` (W, H), scaled and cropped to them, as shares of their latents.

    Returns (1, 1, h, w), float32.
    """
    picture = Geometry.cover(mask.size, size).apply(mask.convert("L"))
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
    return functional.avg_pool2d(values.reshape(1, 1, size[1], size[0]), downscale, ceil_mode=True)


def token_mask(latents: Tensor, patch: int) -> Tensor:
    """(1, 1, h, w) -> (1, N, 1): the share of each token that it covers."""
    return functional.avg_pool2d(latents, patch, ceil_mode=True).flatten(1)[..., None]


@dataclass(frozen=True)
class PreparedImage:
    """An :class:`ImagePrompt` for one run: what each block attends to, where and when.

    ``mask`` is of the latents, see :func:`latent_mask`.
    """

    blocks: Sequence[Attended | None]
    mask: Tensor | None
    text_scale: float
    first_t: float
    last_t: float


def _repeated(one: Attended | None, repeats: int) -> Attended | None:
    if one is None or repeats == 1:
        return one
    return Attended(*(part.repeat_interleave(repeats, dim=0) for part in (one.keys, one.values)))


class Images:
    """Several image prompts for one run. Each step gets what was computed before the first.

    ``repeats`` is how often each of their rows stands in a batch, ``patch`` the side of a token in latents.
    """

    def __init__(self, images: Sequence[PreparedImage], repeats: int = 1, patch: int = 2):
        self.images = [
            replace(image, blocks=[_repeated(one, repeats) for one in image.blocks])
            for image in images
            if any(one is not None for one in image.blocks)
        ]
        self.patch = patch
        self._made: dict[tuple[tuple[int, ...], int, Box | None], list[ImageContext]] = {}

    def __call__(self, rows: int, now: float, box: Box | None = None) -> list[ImageContext] | None:
        """What each block attends to at timestep ``now``; None if no picture acts then.

        Fewer rows than were prepared are the last of them. ``box`` is the part of the latents that is drawn.
        """
        acting = tuple(i for i, image in enumerate(self.images) if image.last_t <= now <= image.first_t)
        if not acting:
            return None
        key = acting, rows, box
        if key not in self._made:
            images = [self.images[i] for i in acting]
            masks = [self._mask(image.mask, box) for image in images]
            scale = math.prod(image.text_scale for image in images)
            self._made[key] = [
                ImageContext(
                    [
                        Attended(one.keys[-rows:], one.values[-rows:], mask)
                        for one, mask in zip(block, masks, strict=True)
                        if one is not None
                    ],
                    scale,
                )
                for block in zip(*(image.blocks for image in images), strict=True)
            ]
        return self._made[key]

    def _mask(self, mask: Tensor | None, box: Box | None) -> Tensor | None:
        if mask is None:
            return None
        return token_mask(mask if box is None else box.of(mask), self.patch)


def prepare_images(
    prompts: Sequence[ImagePrompt],
    *,
    dit: DiTConfig,
    size: Size,
    downscale: int,
    guided: bool,
    repeats: int,
    visiting: Callable[[nn.Module], AbstractContextManager[None]],
    device: torch.device,
) -> Images:
    """Encode pictures and compute their keys and values, once for a run.

    Args:
        size: of the pictures that are drawn, (W, H) in pixels; their latents are ``downscale`` times smaller.
        guided: the batch has rows for the negative prompt before the others.
        repeats: pictures of a prompt in a batch.
        visiting: a network can compute inside, see :class:`~..offload.placement.Placement`.
        device: where the DiT computes.

    Raises:
        ConfigError: an adapter or its weights do not fit the model, or a mask the size.
        HyditError: values overflow.
    """
    prepared = []
    for prompt in prompts:
        check_adapter(prompt.adapter, dit)
        if prompt.mask is not None:
            check_mask(prompt.mask, size)
        weights = [prompt.weight * one for one in block_weights(prompt.blocks, dit.depth)]
        if not any(weights):
            continue
        with visiting(prompt.encoder):
            embedding = prompt.encoder.embed(prompt.image)
        with visiting(prompt.adapter):
            given = prompt.adapter.ip_adapter_clip_len_trans_block.weight
            seen = weighted(prompt.adapter, embedding.to(given.device, given.dtype), weights, guided)
            blocks = [one and one.to(device) for one in seen]
        mask = None
        if prompt.mask is not None:
            mask = latent_mask(prompt.mask, size, downscale).to(device, prompt.adapter.dtype)
        reach = timestep_range(prompt.start, prompt.end)
        prepared.append(PreparedImage(blocks, mask, prompt.text_scale, *reach))
    return Images(prepared, repeats, dit.patch_size)
