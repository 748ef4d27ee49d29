"""From text to pictures: encoders, DiT, sampler and autoencoder in one object."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .control import ControlInput, Controls, check_fit, prepare
from .diffusion.denoiser import Denoiser
from .diffusion.forecast import Forecaster, tolerance_of
from .diffusion.guidance import GuidedAtFirst, GuidedDenoiser
from .diffusion.masked import Known
from .diffusion.run import Progress, run_sampler
from .diffusion.samplers import draw_noise, start_latents
from .diffusion.schedule import Schedule
from .errors import ConfigError, HyditError
from .facts import ModelInfo, SamplingDefaults
from .finite import DTYPE_ADVICE
from .image_prompts.run import ImagePrompt, Images, prepare_images
from .images import Geometry, Size, to_image, to_tensor
from .inpaint import Inpainting
from .model.compiled import compile_blocks
from .model.controlnet import ControlNet
from .model.dit import Context, DiT
from .moved import former
from .offload.placement import Placement
from .plan import TILE as VAE_TILE
from .presets import (
    RunChoices,
    RunSettings,
    SamplingChoices,
    check_sampler,
    check_settings,
    choose_settings,
    distilled_advice,
    size_advice,
)
from .text.features import TextFeatures
from .tiles import Box, Tiles, overlap_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .lora.adapter import Adapter, Match
    from .text.encoders import TextEncoders
    from .vae import VAE

__getattr__ = former(__name__)

_TRAINED_SIZE = 1024
"""The original size that Tencent's inference gives to models with a size condition."""


class Picture(NamedTuple):
    """One result: the picture, with the position of its prompt, its seed, and what its batch took.

    ``pixels`` are the same before rounding to 8 bit: (3, H, W), float32 in 0..1, on the CPU.
    ``real_calls`` of the ``calls`` for a denoised result ran the network; the others were forecast.
    """

    image: Image.Image
    prompt: str
    prompt_index: int
    seed: int
    pixels: Tensor
    calls: int
    real_calls: int


class Pipeline:
    """Text to picture with one HunyuanDiT. Made by :func:`hydit_core.load`, or from loaded parts.

    Args:
        dit, text, vae: the three networks, on one device.
        info: what the model's file says about itself: noise schedule and recommended settings.
        name, title: of the file or folder, and what its metadata call it, for the pictures' metadata.
        placement: which networks are on the device when; default: all, always.
        compiled: run blocks as compiled graphs, see :func:`~.model.compiled.compile_blocks`.
    """

    def __init__(
        self,
        dit: DiT,
        text: TextEncoders,
        vae: VAE,
        info: ModelInfo,
        *,
        name: str = "",
        title: str = "",
        placement: Placement | None = None,
        compiled: bool = False,
    ):
        self.dit = dit
        self.text = text
        self.vae = vae
        self.info = info
        self.name, self.title = name, title
        self.placement = placement or Placement()
        self.compiled = compiled
        self.schedule = Schedule(info.diffusion)

    @property
    def device(self) -> torch.device:
        """The device that pictures are computed on."""
        return self.placement.device or self.home

    @property
    def home(self) -> torch.device:
        """The device that the networks are on between runs; with offloading not :attr:`device`."""
        return next(self.dit.parameters()).device

    def load_lora(
        self,
        lora: str | Path | Adapter,
        strength: float = 1.0,
        block_weights: Any = None,
        *,
        partial: bool = False,
    ) -> Match:
        """Add a LoRA to the weights of the DiT and the text encoders that it changes.

        Several LoRAs add up. Adding a plain LoRA again with the opposite strength removes it, up to rounding.
        What a distilled one recommends (:mod:`.lora.distilled`) is recommended from then on.

        Args:
            lora: a file in any common format, a PEFT folder, or what was read from one.
            strength: 1 is as trained.
            block_weights: factors on the strength for each block of the DiT: a number, numbers, or a curve as
                in "decay(0.9)"; layers outside the blocks have weight 1.
            partial: allow more than a tenth of it to be for layers that the model does not have.

        Returns:
            Which of its modules the model has.

        Raises:
            LoraError: it cannot be read or does not fit; the model is then unchanged.
            ConfigError: the block weights do not fit the number of blocks.
        """
        from .lora import merge, reading
        from .lora.distilled import with_lora

        adapter = reading.read(lora) if isinstance(lora, (str, Path)) else lora
        parts = {"dit": self.dit, "bert": self.text.bert, "t5": self.text.t5}
        base = self.name or "the model"
        info = with_lora(self.info, adapter, strength)
        match = merge.apply(adapter, parts, strength, block_weights, base=base, partial=partial)
        self.info = info
        return match

    # -- settings --------------------------------------------------------------------------------------------

    def settings(
        self, preset: str | None = None, *, negative: str | None = None, **given: Unpack[SamplingChoices]
    ) -> SamplingDefaults:
        """The model's recommended settings, or a preset's, with those of ``given`` that are not None.

        A sampler that is given without a spacing brings its own (``DEFAULT_SPACING`` of the samplers).

        Raises:
            ConfigError: a value is unknown or out of range; the message lists what is possible.
        """
        settings = choose_settings(self.info.defaults, preset, negative=negative, **given)
        check_settings(settings, self.vae.downscale, self.info)
        self.schedule.timesteps(settings.spacing, settings.steps)
        return settings

    def advice(self, prompts: Sequence[str], settings: SamplingDefaults) -> list[str]:
        """What the user should know before sampling: cut prompts, unknown words, unsuitable settings."""
        texts = {f"prompt {i}": prompt for i, prompt in enumerate(prompts, 1)}
        if settings.cfg > 1:
            texts["negative prompt"] = settings.negative
        notes = [
            f"{name}, {report}"
            for name, reports in zip(texts, self.text.tokenize([*texts.values()]).reports, strict=True)
            for report in reports
            if report.truncated or report.unknown
        ]
        notes += distilled_advice(self.info, settings)
        size = size_advice(self.info.defaults, settings.width, settings.height)
        return notes if size is None else [*notes, size]

    # -- sampling --------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative: str | None = None,
        *,
        seed: int = 0,
        batch: int = 1,
        init_image: Image.Image | None = None,
        mask: Image.Image | None = None,
        strength: float = 1.0,
        eta: float | None = None,
        forecast: str | float = "off",
        cfg_end: float = 1.0,
        tile: Size | None = None,
        controls: Sequence[ControlInput] = (),
        images: Sequence[ImagePrompt] = (),
        preset: str | None = None,
        callback: Progress | None = None,
        **given: Unpack[SamplingChoices],
    ) -> list[Image.Image]:
        """Draw pictures of each prompt; what is not given is as the model's file recommends.

        Picture i of a prompt is drawn with ``seed + i``, whatever the batch that it is part of.

        Args:
            prompt: one text or several.
            negative: what to steer away from; "" for nothing. Not used when ``cfg`` is 1.
            seed, batch, strength, eta, forecast, cfg_end, tile: see :class:`~.presets.RunSettings`.
            init_image: start from this picture, scaled and cropped to fit.
            mask: what of it is drawn: white; all else stays. See :class:`~.inpaint.Inpainting`.
            controls: ControlNets with their pictures; their residuals add up.
            images: pictures that are prompts, by IP-Adapters; what is attended to of them adds up.
            preset: published settings instead of the recommended ones, see :data:`~.presets.PRESETS`.
            callback: see :data:`Progress`.
            given: ``width``, ``height``, ``steps``, ``cfg``, ``guidance_rescale``, ``sampler``, ``spacing``:
                see :class:`~.presets.SamplingChoices`.

        Returns:
            Pictures in the order of the prompts, ``batch`` for each. Warns of cut prompts and poor sizes.

        Raises:
            ConfigError: a setting is out of range.
            HyditError: the networks' values overflowed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings = self.settings(preset, negative=negative, **given)
        run = RunSettings(settings, seed, batch, strength, eta, forecast, cfg_end, tile)
        for note in self.advice(prompts, settings):
            warnings.warn(note, stacklevel=2)
        given_pictures: dict[str, Any] = {"init_image": init_image, "mask": mask}
        drawn = self.pictures(
            prompts, run, **given_pictures, controls=controls, images=images, callback=callback
        )
        return [picture.image for picture in drawn]

    def pictures(
        self,
        prompts: Sequence[str],
        settings: RunSettings | SamplingDefaults,
        *,
        init_image: Image.Image | None = None,
        mask: Image.Image | None = None,
        controls: Sequence[ControlInput] = (),
        images: Sequence[ImagePrompt] = (),
        callback: Progress | None = None,
        each: Sequence[tuple[int, str]] | None = None,
        **given: Unpack[RunChoices],
    ) -> Iterator[Picture]:
        """As :meth:`__call__`, one picture at a time, so that each can be shown before the next is drawn.

        ``given`` are fields of :class:`~.presets.RunSettings` that replace those of ``settings``. With
        ``each``, a seed and a negative prompt for each prompt, all are one batch of a picture each.
        """
        run = settings if isinstance(settings, RunSettings) else RunSettings(settings)
        run = replace(run, **given)
        sampling = run.sampling
        check_sampler(self.info, sampling.sampler)
        sigmas = self.schedule.sigmas_for(sampling.spacing, sampling.steps, run.strength)
        if init_image is None and run.strength != 1:
            raise ConfigError(f"strength {run.strength} without a picture to start from: give init_image")
        part = None
        if mask is not None:
            if init_image is None:
                raise ConfigError("a mask without the picture that it belongs to: give init_image")
            size = (sampling.width, sampling.height)
            part = Inpainting(init_image.convert("RGB"), mask, size, multiple=self.vae.downscale)
            init_image = part.picture
        tiles, vae_tile = self._tiles(run)
        init = None if init_image is None else self._encode_image(init_image, sampling, vae_tile)
        for control in controls:
            check_fit(control.net.config, self.dit.config)
        hints = [self._hints(control.image, sampling, tiles) for control in controls]
        nets = [control.net for control in controls]
        repeats = run.batch if each is None else 1
        seeds = run.seeds if each is None else [seed for seed, _ in each]
        together = 1 if each is None else max(1, len(prompts))
        negatives = [sampling.negative] * together if each is None else [text for _, text in each]
        pictured = self._images(images, sampling, len(seeds))
        if self.compiled:
            for net in (self.dit, *nets):
                compile_blocks(net)
        negative = list(dict.fromkeys(negatives)) if sampling.cfg > 1 else []
        encoded = self._encoded([*negative, *prompts])
        known = {text: next(encoded) for text in negative}
        # In the order of the guided batch: unconditional rows first
        first = [known[text] for text in negatives] if known else []
        for start in range(0, len(prompts), together):
            features = TextFeatures.cat([*first, *islice(encoded, together)]).to(self.device)
            with self.placement.sampling(self.dit, nets):
                seen = self._seen(sampling, tiles)
                context = self._context(self.dit, features, seen, repeats)
                steering = self._controls(controls, hints, features, seen, repeats)
                network = {"context": context, "tiles": tiles, "controls": steering, "images": pictured}
                model = self._denoiser(run, sigmas)
                latents = self._sample(model, network, run, seeds, sigmas, init, part, callback)
            for number, (latent, seed) in enumerate(zip(latents, seeds, strict=True)):
                pixels = self._decode(latent, vae_tile)
                if part is not None:
                    pixels = part.composed(pixels)
                index = start + number // repeats
                image, prompt = to_image(pixels), prompts[index]
                yield Picture(image, prompt, index, seed, pixels, model.calls, model.real)

    @torch.no_grad()
    def context(self, prompts: Sequence[str], settings: SamplingDefaults) -> Context:
        """The DiT's :class:`Context` for B prompts and, if it was trained with sizes, for the size."""
        features = TextFeatures.cat([*self._encoded(prompts)]).to(self.device)
        with self.placement.sampling(self.dit, ()):
            return self._context(self.dit, features, settings, 1)

    def _encoded(self, texts: Sequence[str]) -> Iterator[TextFeatures]:
        """The features of each text, one row each."""
        return self.placement.encoded(self.text, texts, self._features)

    def _features(self, text: str) -> TextFeatures:
        features = self.text.encode([text])
        if not all(torch.isfinite(part).all() for part in (features.bert, features.t5)):
            raise HyditError(f"the text encoders' output is not finite in {self.text.dtype}; {DTYPE_ADVICE}")
        return features.to(self.home)

    @torch.no_grad()
    def _context(
        self, net: DiT | ControlNet, features: TextFeatures, settings: SamplingDefaults, repeats: int
    ) -> Context:
        """A network's :class:`Context` for B texts, each row ``repeats`` times."""
        bert, bert_mask, t5, t5_mask = features
        size = None
        if net.config.size_cond:
            row = [_TRAINED_SIZE, _TRAINED_SIZE, settings.width, settings.height, 0, 0]
            size = torch.tensor([row] * len(bert), dtype=torch.float32, device=self.device)
        dtype = net.dtype
        context = net.encode_context(bert.to(dtype), bert_mask, t5.to(dtype), t5_mask, image_meta_size=size)
        if not all(torch.isfinite(part).all() for part in context):
            what = "DiT" if net is self.dit else "ControlNet"
            raise HyditError(
                f"the {what}'s projections of the text are not finite in {dtype}; {DTYPE_ADVICE}"
            )
        return Context(*(part.repeat_interleave(repeats, dim=0) for part in context))

    def _controls(
        self,
        controls: Sequence[ControlInput],
        hints: Sequence[Sequence[Tensor]],
        features: TextFeatures,
        settings: SamplingDefaults,
        repeats: int,
    ) -> list[Controls]:
        """For each tile, the ControlNets with their hints for it."""
        contexts = [self._context(control.net, features, settings, repeats) for control in controls]
        prepared = [
            [prepare(control, hint, context) for hint in tiled]
            for control, tiled, context in zip(controls, hints, contexts, strict=True)
        ]
        return [Controls(one) for one in zip(*prepared, strict=True)]

    def _images(self, images: Sequence[ImagePrompt], settings: SamplingDefaults, repeats: int) -> Images:
        """The image prompts of a run, encoded once for all its prompts."""
        if not images:
            return Images(())
        return prepare_images(
            images,
            dit=self.dit.config,
            size=(settings.width, settings.height),
            downscale=self.vae.downscale,
            guided=settings.cfg > 1,
            repeats=repeats,
            visiting=self.placement.visiting,
            device=self.device,
        )

    def _denoiser(self, run: RunSettings, sigmas: Tensor) -> Forecaster:
        """What the samplers call, for one run."""
        settings = run.sampling
        plain = Denoiser(self._predict, self.schedule)
        model: Denoiser | GuidedAtFirst = plain
        if settings.cfg != 1:
            guided = GuidedDenoiser(self._predict, self.schedule, settings.cfg, settings.guidance_rescale)
            model = GuidedAtFirst(guided, plain, sigmas, run.cfg_end)
        return Forecaster(model, sigmas, tolerance_of(run.forecast))

    @torch.no_grad()
    def _sample(
        self,
        denoiser: Forecaster,
        network: dict[str, Any],
        run: RunSettings,
        seeds: Sequence[int],
        sigmas: Tensor,
        init: Tensor | None,
        part: Inpainting | None,
        callback: Progress | None,
    ) -> Tensor:
        """Latents (B, C, h, w), float32, one for each seed."""
        settings = run.sampling
        scale = self.vae.downscale
        shape = (self.dit.config.in_channels, settings.height // scale, settings.width // scale)
        generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
        noise = draw_noise((len(seeds), *shape), generators).to(self.device)
        x = start_latents(noise, sigmas, init)
        known = None
        if part is not None and init is not None:
            known = Known(init, noise, part.latents.to(self.device))

        return run_sampler(
            settings.sampler,
            denoiser,
            x,
            sigmas,
            self.schedule.sigma_to_t(sigmas[:-1]).tolist(),
            network,
            generators,
            dit=self.dit,
            dtype=self.dit.dtype,
            eta=run.eta,
            known=known,
            callback=callback,
        )

    def _predict(
        self,
        x_t: Tensor,
        t: Tensor,
        *,
        context: Context,
        tiles: Tiles,
        controls: Sequence[Controls],
        images: Images,
        now: float,
    ) -> Tensor:
        """The network's prediction, tile by tile (MultiDiffusion, Bar-Tal et al. 2023).

        To blend it is to blend denoised results: of one x and sigma, these are the same but for a factor.
        """
        rows = context.last(len(x_t))

        def part(box: Box, steering: Controls | None) -> Tensor:
            x = box.of(x_t)
            control = None if steering is None else steering(x, t, now)
            seen = images(len(x), now, box)
            return self.dit(x.to(self.dit.dtype), t, rows, control, images=seen).float()

        each: Sequence[Controls | None] = controls or [None] * len(tiles.boxes)
        return tiles.blended(part(box, one) for box, one in zip(tiles.boxes, each, strict=True))

    def _tiles(self, run: RunSettings) -> tuple[Tiles, int | None]:
        """The tiles of a run, in latents, and the side of the VAE's, which are no smaller."""
        scale = self.vae.downscale
        whole = run.sampling.height // scale, run.sampling.width // scale
        if run.tile is None:
            return Tiles(*whole, whole, 0), self.placement.tile
        tile = run.tile[1] // scale, run.tile[0] // scale
        return Tiles(*whole, tile, overlap_of(tile)), self.placement.tile or max(*tile, VAE_TILE)

    def _seen(self, settings: SamplingDefaults, tiles: Tiles) -> SamplingDefaults:
        """The settings with the size that the network sees: a tile is to it a picture of its own."""
        height, width = (side * self.vae.downscale for side in tiles.tile)
        return replace(settings, width=width, height=height)

    # -- pictures and latents --------------------------------------------------------------------------------

    @torch.no_grad()
    def _encode_image(
        self, image: Image.Image, settings: SamplingDefaults, tile: int | None = None
    ) -> Tensor:
        pixels = _fitted(image, settings)
        with self.placement.visiting(self.vae):
            return self.vae.encode_mode(pixels, tile=tile).to(self.device)

    @torch.no_grad()
    def _hints(self, image: Image.Image, settings: SamplingDefaults, tiles: Tiles) -> list[Tensor]:
        """A control picture's latents for each tile: of its own part, as if that were a picture."""
        pixels = _fitted(image, settings)
        with self.placement.visiting(self.vae):
            parts = (box.of(pixels, self.vae.downscale) for box in tiles.boxes)
            return [self.vae.encode_mode(part).to(self.device) for part in parts]

    @torch.no_grad()
    def _decode(self, latent: Tensor, tile: int | None) -> Tensor:
        with self.placement.visiting(self.vae):
            pixels = self.vae.decode(latent[None], tile=tile)[0]  # (3, H, W)
        if not torch.isfinite(pixels).all():
            raise HyditError(f"the VAE's output is not finite in {self.vae.dtype}; {DTYPE_ADVICE}")
        return ((pixels.float() + 1) / 2).clamp(0, 1).cpu()


def _fitted(image: Image.Image, settings: SamplingDefaults) -> Tensor:
    """A picture as (1, 3, H, W) in [-1, 1], scaled and cropped to the size that is drawn."""
    geometry = Geometry.cover(image.size, (settings.width, settings.height))
    return to_tensor(geometry.apply(image.convert("RGB")))[None]
