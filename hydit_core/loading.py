"""A pipeline from files: the model, and what belongs to it, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .devices import choose_device
from .dtypes import choose_dtype
from .embedded import embedded_model
from .errors import WeightsError
from .model.config import DiTConfig
from .offload.placement import Offload, Placement
from .pipeline import Pipeline
from .plan import Choice, choose, for_pipeline, free_memory

if TYPE_CHECKING:  # they bring transformers and diffusers
    from .text.encoders import TextEncoders
    from .vae import VAE

_TITLE = 200
"""Characters of a file's title that pictures remember."""


def load(
    path: str | Path | None = None,
    *,
    text_encoders: str | Path | None = None,
    vae: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    load_key: str | None = None,
    offload: str | Choice = "off",
    compile: bool = False,
) -> Pipeline:
    """Load a model and what belongs to it.

    Quantised matrices stay in 8 bits in memory, if comfy-kitchen is installed.

    Args:
        path: an all-in-one checkpoint, a diffusers folder, a folder in Tencent's layout (``t2i/``), or the
            weights of a DiT alone; or ``hub:ORG/NAME[@REVISION][/INSIDE]``, of which what is needed is
            downloaded. None: the model that comes with hydit.
        text_encoders, vae: files or folders that hold these; needed where ``path`` does not.
        dtype: to compute in: "auto", "float32", "float16", "bfloat16", or a torch dtype. "auto" is float32 on
            the CPU, bfloat16 on GPUs that have it, and float16 on others.
        device: "auto" (a GPU if there is one), or a torch device.
        load_key: which set of weights to take from a ``.pt`` file with several: ema, module, distill.
        offload: "off" keeps everything on the device; for small GPUs "encoders" and "blocks" keep weights on
            the host and bring them when they are needed, see :class:`~.offload.placement.Offload`. "auto"
            takes the first of these that fits into what the GPU has free, for one picture of the recommended
            size; :mod:`~.plan` chooses for others.
        compile: run the blocks as graphs that torch compiles, which takes a while at the first step.

    Raises:
        WeightsError: a file is missing, damaged, or holds something else.
        ConfigError: an unknown dtype, device or way of offloading.
    """
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    places: dict[str, Any] = {"text_encoders": text_encoders, "vae": vae, "load_key": load_key}
    if offload == "auto":
        free = free_memory(device)
        offload = "off" if free is None else choose(for_pipeline(outline(path, dtype, **places)), free)
    if isinstance(offload, str):
        placement = Placement() if offload == "off" else Offload(device, offload)
    else:
        placement = offload.placement(device)
    pipe = _loaded(path, dtype, placement.home(device), **places)
    pipe.placement, pipe.compiled = placement, compile
    return pipe


def outline(path: str | Path | None, dtype: torch.dtype, **places: Any) -> Pipeline:
    """What :func:`load` would load, without the weights: its networks are on the meta device, to plan with.

    Raises :class:`WeightsError` as :func:`load` does.
    """
    return _loaded(path, dtype, torch.device("meta"), **places)


def misfits(dit: DiTConfig, text: TextEncoders, vae: VAE) -> Iterator[tuple[str, str]]:
    """What does not go together: the option that names it (``text_encoders``, ``vae``), and how, in words."""
    bert, mt5 = text.bert.config.hidden_size, text.t5.config.d_model
    for name, found, wanted in (("BERT", bert, dit.text_dim), ("mT5", mt5, dit.t5_dim)):
        if found != wanted:
            yield "text_encoders", f"{name}'s features have {found} values, the DiT takes {wanted}"
    if vae.latent_channels != dit.in_channels:
        yield "vae", f"the VAE's latents have {vae.latent_channels} channels, the DiT takes {dit.in_channels}"


def _loaded(
    path: str | Path | None,
    dtype: torch.dtype,
    device: torch.device,
    *,
    text_encoders: str | Path | None = None,
    vae: str | Path | None = None,
    load_key: str | None = None,
) -> Pipeline:
    from .text.loading import load_text_encoders
    from .vae import load_vae
    from .weights.bundle import bundle, say_where
    from .weights.load import load_dit

    source = embedded_model() if path is None else Path(path).expanduser()
    opened = bundle(source, only=("dit",), kinds=("dit",), load_key=load_key)
    dit, info = load_dit(opened, dtype=dtype, device=device, keep_quantised=True)
    with say_where("text_encoders", given=text_encoders is not None):
        text = load_text_encoders(
            text_encoders or opened,
            dtype=dtype,
            device=device,
            text_len=dit.config.text_len,
            t5_len=dit.config.t5_len,
            keep_quantised=True,
        )
    with say_where("vae", given=vae is not None):
        autoencoder = load_vae(vae or opened, dtype=dtype, device=device)
    for part, what in misfits(dit.config, text, autoencoder):
        option = f"--{part.replace('_', '-')} PATH, or {part}= in Python"
        raise WeightsError(f"{what}: they are of different models; give one that belongs to it ({option})")
    title = opened.metadata.get("modelspec.title", "")[:_TITLE]
    return Pipeline(dit, text, autoencoder, info, name=source.name, title=title)
