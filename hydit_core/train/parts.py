"""The networks of a run, loaded or fresh, and what the exported file says of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..data.order import hash_int
from ..errors import ConfigError, HyditError
from ..facts import ModelInfo
from ..model.attention import training_attention
from ..model.config import DiTConfig
from ..model.dit import DiT
from ..text.encoders import TextEncoders
from ..text.loading import load_text_encoders
from ..vae import VAE, load_vae
from ..weights.bundle import Bundle, bundle
from ..weights.load import load_dit
from .checks import check_parts, check_text_options
from .config import TrainConfig
from .model_section import TextScratch
from .networks import ModelParts, new_network
from .objectives.table import objective_of

# What load_vae takes from a file's description.
_VAE_OPTIONS = ("scaling_factor", "shift_factor", "norm_num_groups", "preview_rgb", "act_fn")


def build(config: TrainConfig, *, deferred: bool = False) -> ModelParts:
    """Load or initialize the networks of a run, on the CPU.

    A fresh model is a function of ``run.seed``. What is trained is float32; frozen text encoders take
    the precision of the run.

    ``deferred``: processes may hold parts of what is trained and of its base, which stay on the meta device
    until each reads its own (:mod:`hydit_core.weights.unread`); :meth:`~.networks.ModelParts.read` reads all.

    Raises:
        WeightsError: a file is missing or holds something else.
        ConfigError: parts do not fit each other.
    """
    model, objective = config.model, objective_of(config)
    base = open_base(config)
    if model.from_scratch is not None:
        shape = DiTConfig.from_dict(model.from_scratch.model_dump())
        dit = new_network(DiT, shape, _seed(config, "dit"), deferred, attention=training_attention)
        info = ModelInfo.published(dit.config.version)
        info = dataclasses.replace(info, pooler_heads=dit.config.pooler_heads, rope_base=dit.config.rope_base)
    else:
        assert model.init_from is not None and base is not None
        how: dict[str, Any] = {**objective.base_options(), "deferred": deferred}
        dit, info = load_dit(base, attention=training_attention, **how)
        info = dataclasses.replace(info, base=model.init_from.name, variant="")
    learn = objective.text_option(config) is not None  # frozen ones are needed whole, in every process
    text = load_text(config, dit.config, base, deferred=deferred and learn)
    vae = open_vae(config, base)
    info = described(config, info, text, vae)
    check_parts(config, dit.config, text, vae, info)
    parts = ModelParts(dit, text, vae, info, deferred=deferred)
    objective.complete(config, parts)
    return parts


def described(config: TrainConfig, info: ModelInfo, text: TextEncoders, vae: VAE) -> ModelInfo:
    """What the exported file says: ``info``, that of the base, with ``model.info`` and what the parts say.

    Raises:
        ConfigError: it cannot be meant.
    """
    options = text.info()
    try:
        info = config.model.info.applied_to(info)
        return dataclasses.replace(info, bert=options["bert"], t5=options["t5"], vae=_vae_info(vae, info))
    except ConfigError as error:
        raise ConfigError(f"model.info: {error}") from None


def open_base(config: TrainConfig) -> Bundle | None:
    """The weights that a run starts from, opened once for all that take a part of them."""
    model = config.model
    if model.init_from is None:
        return None
    return bundle(model.init_from, only=("dit",), kinds=("dit",), load_key=model.load_key)


def open_vae(config: TrainConfig, base: Bundle | None) -> VAE:
    """The VAE of a run, in float32 on the CPU."""
    return load_vae(config.model.vae or _present(base))


def load_text(
    config: TrainConfig,
    dit: DiTConfig,
    base: Bundle | None,
    *,
    like_file: bool = False,
    deferred: bool = False,
) -> TextEncoders:
    """The text encoders of a run; ``like_file`` keeps the dtype of their file, which is then only mapped.

    ``deferred`` as in :func:`build`; but transformers draws fresh encoders at once.
    """
    source = config.model.text_encoders
    trained = config.objective.train_text_encoders
    if not isinstance(source, TextScratch):
        half = config.run.precision == "bf16" and not trained
        dtype = None if like_file else torch.bfloat16 if half else torch.float32
        path = source or _present(base)
        return load_text_encoders(
            path, dtype=dtype, text_len=dit.text_len, t5_len=dit.t5_len, deferred=deferred
        )
    contents = []
    for path in (source.vocab, source.spiece):
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"model.text_encoders: cannot read {path}: {error.strerror}") from error
    vocab, spiece = contents
    seed = _seed(config, "text encoders")
    check_text_options(source)
    try:
        encoders = TextEncoders.build(
            source.bert, source.t5, vocab, spiece, dit.text_len, dit.t5_len, seed=seed
        )
    except HyditError:
        raise
    except Exception as error:  # transformers has classes of its own for what it does not like
        raise ConfigError(f"model.text_encoders: cannot be built so: {error}") from error
    return encoders.requires_grad_(trained).eval()


def _present(base: Bundle | None) -> Bundle:
    """The configuration guarantees ``init_from`` where nothing else is named."""
    assert base is not None
    return base


def _seed(config: TrainConfig, purpose: str) -> int:
    return hash_int(config.run.seed, purpose) >> 1


def _vae_info(vae: VAE, info: ModelInfo) -> dict[str, object]:
    # The VAE may be another one than that of the file that the DiT comes from: nothing of that one stays.
    found: dict[str, object] = {key: value for key, value in info.vae.items() if key not in _VAE_OPTIONS}
    found["scaling_factor"] = vae.scaling_factor
    config: Any = vae.model.config
    if (activation := config.get("act_fn")) != ("relu" if vae.is_tiny else "silu"):
        found["act_fn"] = activation
    groups = config.get("norm_num_groups")
    if groups is not None:
        found["norm_num_groups"] = groups
    if vae.shift_factor:
        found["shift_factor"] = vae.shift_factor
    if vae.preview_rgb is not None:
        found["preview_rgb"] = vae.preview_rgb
    return found
