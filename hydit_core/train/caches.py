"""What a run keeps of its pictures and captions: encoded as it begins, or ahead, by any number of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..data.cache.embeddings import EmbeddingCache, build_embedding_cache
from ..data.cache.latents import LatentCache, build_latent_cache, cache_folder
from ..data.cache.text import TextCache, build_text_cache
from ..data.dataset import TrainData
from ..data.manifest import Texts
from ..data.mapped import MappedManifest
from ..data.prepared import find_prepared, prepared_layout
from ..data.prompt_images import PromptImages
from ..errors import ConfigError, DataError
from .conditioning import CaptionFit, caption_fits
from .config import TrainConfig
from .distributed import Processes
from .networks import ModelParts
from .objectives.table import objective_of
from .samples import sample_texts

if TYPE_CHECKING:  # it brings transformers
    from ..image_prompts.encoder import ImageEncoder

Progress = Callable[[int, int], None]
Bars = Callable[[str], AbstractContextManager[Progress]]
"""Shows how far something is, by its name."""


def require_caches(config: TrainConfig) -> None:
    """Raise :class:`ConfigError` if the configuration wants nothing kept."""
    cache = config.data.cache
    if not (cache.latents or cache.text):
        raise ConfigError(
            "nothing to cache: set data.cache.latents = true (encoded pictures) or data.cache.text = true "
            "(encoded captions)"
        )


def prepare_data(config: TrainConfig, data: TrainData, parts: ModelParts, processes: Processes) -> None:
    """Encode what is missing from the configured caches, and read what they hold from them from then on.

    Text encoders that nothing else needs give their memory back.
    """
    bars = partial(progress_of, processes=processes)
    if config.data.cache.latents:
        _fill_latents(data, parts, processes.device, bars)
        processes.barrier()
        data.use_latents(LatentCache(data, parts.vae, cache_folder(config.data)))
    if parts.image_encoder is not None:
        prompts = _prompts(config, parts.image_encoder)
        if config.data.cache.latents:
            _fill_prompts(data, parts.image_encoder, prompts, processes.device, bars)
            processes.barrier()
            folder = cache_folder(config.data)
            data.use_prompts(prompts, EmbeddingCache(data, parts.image_encoder, prompts, folder))
        else:
            parts.image_encoder.to(processes.device)
            data.use_prompts(prompts)
    if config.data.cache.text:
        stored = _fill_text(config, data, parts, processes.device, bars)
        processes.barrier()
        stored.store.refresh()  # what other processes encoded
        parts.stored_text = stored
        parts.text.to("cpu" if objective_of(config).exports_text(config) else "meta")


def prepared(config: TrainConfig) -> MappedManifest:
    """What was prepared. Raises :class:`DataError` on a machine that does not see it."""
    found = find_prepared(config.data)
    if found is None:
        raise DataError(
            "what was prepared is not seen here: set data.cache.dir to a folder that all machines share"
        )
    return found


def share_of(config: TrainConfig, number: int, count: int) -> TrainData:
    """The data as prepared, for one of ``count`` that encode them."""
    manifest = prepared(config)
    return TrainData(
        config.data,
        manifest,
        manifest.findings,
        seed=config.run.seed,
        batch_size=config.run.batch_size,
        world_size=count,
        rank=number,
        layout=prepared_layout(config.data, manifest),
    )


def encode_share(
    config: TrainConfig,
    parts: ModelParts,
    device: torch.device,
    number: int,
    count: int,
    bars: Bars,
) -> list[CaptionFit]:
    """Encode what the caches lack of a part of what was prepared; gives how its captions fit the encoders."""
    data = share_of(config, number, count)
    if config.data.cache.latents:
        _fill_latents(data, parts, device, bars)
        if parts.image_encoder is not None:
            _fill_prompts(data, parts.image_encoder, _prompts(config, parts.image_encoder), device, bars)
    if config.data.cache.text:
        _fill_text(config, data, parts, device, bars)
    return caption_fits(_share(data.manifest.captions, number, count), parts.text.tokenizers)


def _share(captions: Texts, number: int, count: int) -> Iterator[str]:
    """Captions that follow each other."""
    first, end = (len(captions) * n // count for n in (number, number + 1))
    return (captions[i] for i in range(first, end))


def _fill_latents(data: TrainData, parts: ModelParts, device: torch.device, bars: Bars) -> None:
    parts.vae.to(device)
    with bars("encoding pictures") as progress:
        build_latent_cache(data, parts.vae, progress, batch_size=_encoded_together(data, device))
    parts.vae.to("cpu")


def _encoded_together(data: TrainData, device: torch.device) -> int:
    """How many pictures the VAE encodes at once: 4; on a GPU, as many as fit into 4 of 1024 x 1024."""
    largest = max(width * height for width, height in data.sizes)
    return 4 if device.type == "cpu" else max(4, 4 * 1024**2 // largest)


def _prompts(config: TrainConfig, encoder: ImageEncoder) -> PromptImages:
    size, alpha_color = encoder.config.size, config.data.alpha_color
    return PromptImages(config.data.image_prompt, size, alpha_color=alpha_color)


def _fill_prompts(
    data: TrainData, encoder: ImageEncoder, prompts: PromptImages, device: torch.device, bars: Bars
) -> None:
    encoder.to(device)
    with bars("encoding prompt pictures") as progress:
        build_embedding_cache(data, encoder, prompts, progress)
    encoder.to("cpu")


def _fill_text(
    config: TrainConfig, data: TrainData, parts: ModelParts, device: torch.device, bars: Bars
) -> TextCache:
    parts.text.to(device)
    with bars("encoding captions") as progress:
        return build_text_cache(data, parts.text, progress, others=sample_texts(config.samples, parts))


@contextmanager
def progress_of(what: str, processes: Processes) -> Iterator[Progress]:
    """A bar that the first process shows."""
    with tqdm(desc=what, disable=not processes.is_main) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
