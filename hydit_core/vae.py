"""The autoencoder between pictures and latents, through diffusers' classes.

``AutoencoderKL`` (the SDXL VAE's architecture, of any size) and ``AutoencoderTiny`` (TAESD) have one
interface. Latents that leave this module are *scaled*, as the diffusion model needs them, to about unit
variance (Rombach et al. 2022, section D.1). VAEs are loaded from a diffusers folder, from a file with LDM,
TAESD or diffusers names, or from an all-in-one checkpoint.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import HyditError, WeightsError
from .facts import ModelInfo
from .quiet import quiet_imports
from .tiles import Tiles
from .weights import vae_layout
from .weights.bundle import Bundle, Place, bundle
from .weights.detect import what_to_do
from .weights.source import TensorSource, as_source
from .weights.vae_layout import SCALING_FACTOR

_FALLBACK_TILE = 64
_NO_VAE = (
    "no VAE found; give one separately, or a checkpoint that holds one. Expected names such as "
    "vae.encoder.down.0.block.0.conv1.weight (LDM), "
    "encoder.down_blocks.0.resnets.0.conv1.weight (diffusers) or taesd_decoder.1.weight"
)


class VAE(nn.Module):
    """An autoencoder with the diffusion model's latent scale.

    Args:
        model: ``AutoencoderKL`` or ``AutoencoderTiny`` of diffusers.
        scaling_factor, shift_factor: scaled latents are ``(z - shift_factor) * scaling_factor``.
        preview_rgb: rows of 3 that turn a latent pixel's channels into a color in [-1, 1]: one row per
            channel, and optionally one more, which is added to the sum.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scaling_factor: float = SCALING_FACTOR,
        shift_factor: float = 0.0,
        preview_rgb: list[list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.preview_rgb = preview_rgb
        config: Any = model.config
        self.is_tiny = not hasattr(model, "quant_conv")
        self.latent_channels: int = config["latent_channels"]
        #: Side of a picture divided by the side of its latents.
        self.downscale: int = 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode_moments(self, images: Tensor) -> Tensor:
        """Encode pictures into the parameters of the latents' distribution.

        Args:
            images: (B, 3, H, W) in [-1, 1]; H and W multiples of :attr:`downscale`.

        Returns:
            (B, 2C, h, w) float32: C channels of mean, then C of log-variance, **unscaled**; :meth:`sample`
            and :meth:`mode` turn them into scaled latents. A TAESD has no variance: its log-variance is -30,
            the lowest that :meth:`sample` honors.
        """
        if any(side % self.downscale for side in images.shape[-2:]):
            raise HyditError(
                f"pictures of {images.shape[-1]}x{images.shape[-2]} pixels cannot be encoded: width and "
                f"height must be multiples of {self.downscale}"
            )
        images = images.to(self.device, self.dtype)
        encoder: Any = self.model
        if self.is_tiny:
            mean = encoder.encode(images).latents.float()
            return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)
        return encoder.encode(images).latent_dist.parameters.float()

    def mode(self, moments: Tensor) -> Tensor:
        """Moments (B, 2C, h, w) -> the most likely scaled latents (B, C, h, w)."""
        return (moments.chunk(2, dim=1)[0] - self.shift_factor) * self.scaling_factor

    def sample(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Moments (B, 2C, h, w) -> scaled latents (B, C, h, w) drawn from their distribution.

        The noise is drawn on the generator's device: a CPU generator gives the same latents everywhere.
        """
        mean, log_variance = moments.chunk(2, dim=1)
        device = generator.device if generator is not None else moments.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return (mean + deviation * noise.to(mean.device) - self.shift_factor) * self.scaling_factor

    def encode_mode(self, images: Tensor, *, tile: int | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> their most likely scaled latents (B, C, h, w), float32.

        ``tile``: side, in latent pixels, of the pieces to encode one after another; ``None``: the whole.
        """
        scale = self.downscale
        height, width = (side // scale for side in images.shape[-2:])
        if tile is None or max(height, width) <= tile:
            return self.mode(self.encode_moments(images))
        tiles = Tiles(height, width, (tile, tile), tile // 4)
        return tiles.blended(self.encode_mode(box.of(images, scale)) for box in tiles.boxes)

    def decode(self, latents: Tensor, *, tile: int | None = None, overlap: int | None = None) -> Tensor:
        """Decode scaled latents.

        A float16 decoder that overflows (the original SDXL VAE does) is converted to float32 and run again;
        without enough memory for the whole picture, it is decoded in tiles. A warning tells of either.

        Args:
            latents: (B, C, h, w), scaled.
            tile: side, in latent pixels, of the square pieces to decode one after another; ``None`` decodes
                the whole picture at once. Norms see one tile only, so tiles change a picture slightly.
            overlap: latent pixels that neighboring tiles share and blend; by default a quarter of ``tile``.

        Returns:
            (B, 3, h * downscale, w * downscale) float32, nominally in [-1, 1], not clamped.
        """
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise HyditError(
                f"this VAE decodes latents of shape (batch, {self.latent_channels}, height, width), "
                f"got {tuple(latents.shape)}"
            )
        z = latents.to(self.device, torch.float32) / self.scaling_factor + self.shift_factor
        images = None
        try:
            images = self._decode(z, tile, overlap)
        except torch.OutOfMemoryError:
            if tile is not None:
                raise
        if images is None:
            # Outside the except block: the error's traceback keeps the failed attempt's tensors alive.
            warnings.warn("not enough memory to decode the whole picture: decoding in tiles", stacklevel=2)
            tile = _FALLBACK_TILE
            images = self._decode(z, tile, overlap)
        if self.dtype == torch.float16 and not torch.isfinite(images).all():
            warnings.warn("the VAE overflowed in float16: using it in float32 from now on", stacklevel=2)
            self.model.float()
            images = self._decode(z, tile, overlap)
        return images

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The weights under the names of an all-in-one checkpoint (LDM or TAESD), without its prefix.

        A TAESD's scale and shift are among them; those of a KL autoencoder belong in the metadata.
        """
        state = self.model.state_dict()
        if not self.is_tiny:
            return vae_layout.diffusers_to_ldm(state)
        vae_scale, vae_shift = vae_layout.taesd_scale(self.scaling_factor, self.shift_factor)
        return vae_layout.diffusers_to_taesd(state, vae_scale=vae_scale, vae_shift=vae_shift)

    def _decode(self, z: Tensor, tile: int | None, overlap: int | None) -> Tensor:
        decoder: Any = self.model
        if tile is None or max(z.shape[-2:]) <= tile:
            return decoder.decode(z.to(self.dtype)).sample.float()
        height, width = z.shape[-2:]
        tiles = Tiles(height, width, (tile, tile), tile // 4 if overlap is None else overlap)
        parts = (decoder.decode(box.of(z).to(self.dtype)).sample.float() for box in tiles.boxes)
        return tiles.blended(parts, self.downscale)


def load_vae(
    path_or_source: Place | TensorSource | Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    info: ModelInfo | None = None,
) -> VAE:
    """Load a VAE, frozen and in eval mode.

    Args:
        path_or_source: a diffusers folder (the VAE's own, or a pipeline's with ``vae/`` inside), Tencent's
            ``t2i`` folder, a weights file (LDM, TAESD or diffusers names, with prefix ``vae.``,
            ``first_stage_model.`` or none; other tensors in the file are ignored), what was opened there, or
            an open mapping from such names to tensors.
        dtype, device: of the loaded weights.
        info: what the checkpoint's metadata says; by default read from the file. Its ``vae`` entry may
            hold ``norm_num_groups``, ``scaling_factor``, ``shift_factor`` and ``preview_rgb``.

    Raises:
        WeightsError: there is no VAE, or it does not fit the architecture that its names belong to.
    """
    if isinstance(path_or_source, (str, os.PathLike, Bundle)):
        opened = bundle(path_or_source, only=("vae",))
        if opened.vae is None:
            other = "" if opened.kind.kind == "dit" else f"; {what_to_do(opened.source, opened.kind)}"
            raise WeightsError(f"{opened.path}: {_NO_VAE}; it is {opened.kind.name}{other}")
        source, info = opened.vae, info or opened.info
    else:
        source = as_source(path_or_source)
    try:
        # The version only picks defaults that do not concern the VAE.
        info = info or ModelInfo.from_metadata(source.metadata, version="v1.2")
        return _build(source, info.vae, dtype, device)
    except WeightsError as error:
        raise WeightsError(f"{source.path}: {error}") from None


def _build(
    source: TensorSource, options: dict[str, Any], dtype: torch.dtype, device: str | torch.device
) -> VAE:
    kind = vae_layout.detect_vae(source.keys())
    if kind is None:
        found = ", ".join(list(source.keys())[:3]) or "no tensor at all"
        raise WeightsError(f"{_NO_VAE}; found {found}")
    stored = vae_layout.strip_vae_prefix(source.keys(), kind)
    names = _diffusers_names(stored, kind)
    model = _empty_model(kind, names, source, options)
    _check_fit(model, names, source)
    model.load_state_dict(_read(names, source, dtype, device), assign=True)
    model.requires_grad_(False).eval()
    scaling, shift = vae_layout.latent_scale(kind, stored, source, options)
    vae = VAE(model, scaling_factor=scaling, shift_factor=shift, preview_rgb=options.get("preview_rgb"))
    return vae.eval()


def _diffusers_names(stored: dict[str, str], kind: vae_layout.VaeKind) -> dict[str, str]:
    """diffusers name -> name in the file."""
    if kind.architecture == "tiny":
        wanted = ("encoder.", "decoder.", "taesd_encoder.", "taesd_decoder.")
    else:
        wanted = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    own = {name: key for name, key in stored.items() if name.startswith(wanted)}
    if kind.layout == "diffusers":
        return {vae_layout.undeprecate(name): key for name, key in own.items()}
    rename = vae_layout.taesd_renaming if kind.architecture == "tiny" else vae_layout.kl_renaming
    return {new: own[name] for name, new in rename(own, to="diffusers").items()}


def _empty_model(
    kind: vae_layout.VaeKind, names: dict[str, str], source: TensorSource, options: dict[str, Any]
) -> nn.Module:
    """The architecture that the shapes describe, on the meta device."""
    with quiet_imports():
        from diffusers import AutoencoderKL, AutoencoderTiny

    def shape(name: str) -> tuple[int, ...]:
        try:
            return source.shape(names[name])
        except KeyError:
            raise WeightsError(f"the VAE is incomplete: tensor {name} is missing") from None

    chosen = {"act_fn": options["act_fn"]} if "act_fn" in options else {}
    with torch.device("meta"):
        model: Any
        if kind.architecture == "tiny":
            model = AutoencoderTiny(**vae_layout.tiny_config(names, shape), **chosen)
        else:
            groups = int(options.get("norm_num_groups", 32))
            config = vae_layout.kl_config(names, shape, norm_num_groups=groups)
            model = AutoencoderKL(**config, **chosen)
    return model


def _check_fit(model: nn.Module, names: dict[str, str], source: TensorSource) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in names]
    problems += [f"{name} is not part of the architecture" for name in names if name not in expected]
    for name, shape in expected.items():
        found = source.shape(names[name]) if name in names else shape
        if vae_layout.is_attention_matrix(name):
            found = found[:2]
        if found != shape:
            problems.append(f"{name} has shape {found} instead of {shape}")
        elif name in names and not source.dtype(names[name]).is_floating_point:
            problems.append(f"{name} is {source.dtype(names[name])}, not floating-point")
    if problems:
        raise WeightsError(
            f"the VAE does not fit {type(model).__name__} ({len(problems)} problems): "
            f"{'; '.join(problems[:3])}"
        )


def _read(
    names: dict[str, str], source: TensorSource, dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    tensors = {}
    for name, key in names.items():
        tensor = source.get(key, dtype).to(device)
        tensors[name] = vae_layout.to_matrix(tensor) if vae_layout.is_attention_matrix(name) else tensor
    return tensors
