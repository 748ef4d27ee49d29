"""Training an IP-Adapter over a frozen DiT: pictures become prompts beside the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...data.config import ImagePromptConfig
from ...data.dataset import Batch
from ...data.order import hash_int
from ...data.section import Section
from ...diffusion.schedule import Schedule
from ...errors import ConfigError
from ...facts import DiffusionConfig
from ...image_prompts.run import check_adapter, check_encoder
from ...model.attention import AttentionFn, ImageContext
from ...model.config import DiTConfig
from ...model.dit import DiT
from ...model.ip_adapter import IPAdapter, IPAdapterConfig
from ...text.features import TextFeatures
from ...weights import hub
from ...weights.frozen import OPERATIONS, splittable_bytes, store, stored_bytes
from ...weights.load import load_ip_adapter
from ...weights.save import save_ip_adapter
from ..draws import Draws
from ..model_section import ConfigPath
from ..networks import ModelParts, new_network
from ..sections import ObjectiveSection, TrainSections
from .base import DiffusionModule, DiffusionObjective, Rehearsal

if TYPE_CHECKING:  # they bring transformers, which a configuration is checked without
    from ...image_prompts.encoder import ImageEncoder
    from ...text.encoders import TextEncoders


class IPAdapterSection(Section):
    """An IP-Adapter's image encoder and beginning."""

    encoder: ConfigPath | None = Field(
        default=None,
        description="the CLIP image encoder, such as Tencent's clip_img_encoder.pt; unset: that of init_from",
    )
    init_from: ConfigPath | None = Field(
        default=None,
        description="an IP-Adapter to continue; unset: a new one, which changes nothing at first",
    )
    tokens: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="how many tokens a new one makes of a picture; init_from has its own",
    )


class IPAdapterModule(DiffusionModule):
    """An IP-Adapter in training beside a frozen DiT: from latents, text features and embeddings to losses."""

    def __init__(self, dit: DiT, ip_adapter: IPAdapter, schedule: Schedule, config: ObjectiveSection) -> None:
        super().__init__(dit, None, schedule, config)
        self.ip_adapter = ip_adapter

    def train(self, mode: bool = True) -> IPAdapterModule:
        """As usual, but the frozen base stays in eval mode."""
        super().train(mode)
        self.dit.eval()
        return self

    @torch.no_grad()  # the DiT's own text projections are frozen
    def contexts(self, text: TextFeatures, image_meta_size: Tensor | None) -> Any:
        return super().contexts(text, image_meta_size)

    def predict(self, x_t: Tensor, t: Tensor, contexts: Any, **conditions: Tensor) -> Tensor:
        """``embedding`` (B, embed_dim) is of the prompt pictures, zeros for none.

        Gradients flow through the DiT to the keys and values of its blocks; its weights get none.
        """
        seen = [ImageContext([attended]) for attended in self.ip_adapter(conditions["embedding"])]
        return self.dit(x_t, t, contexts, images=seen)


class IPAdapterObjective(DiffusionObjective):
    """All tensors of an IP-Adapter; DiT, text encoders and image encoder are frozen."""

    section: ClassVar[type[Section] | None] = IPAdapterSection
    export_name = "ip_adapter.safetensors"
    start_key = "ip_adapter.init_from"

    # -- the configuration -------------------------------------------------------------------------

    @classmethod
    def check(cls, config: TrainSections) -> None:
        samples, own = config.samples, _own(config)
        if config.model.init_from is None or config.objective.train_text_encoders:
            raise ValueError(
                "an IP-Adapter is trained for finished weights: give model.init_from, and leave "
                "objective.train_text_encoders off"
            )
        if own.encoder is None and own.init_from is None:
            raise ValueError(
                "ip_adapter.encoder is needed for a new one: the image encoder, such as clip_img_encoder.pt "
                "beside Tencent's ipa.pt"
            )
        if samples.every and len(samples.image_prompts) not in (1, len(samples.prompts)):
            raise ValueError(
                "samples.image_prompts: give one picture, or one for each of samples.prompts "
                f"({len(samples.prompts)})"
            )

    @classmethod
    def check_unused(cls, config: TrainSections) -> None:
        unused = {
            "objective.dropout_image": config.objective.dropout_image != ObjectiveSection().dropout_image,
            "samples.image_prompts": bool(config.samples.image_prompts),
            "the table data.image_prompt": config.data.image_prompt != ImagePromptConfig(),
        }
        for name, given in unused.items():
            if given:
                raise ValueError(f"{name} needs objective.kind = 'ip_adapter'")

    # -- the dry run -------------------------------------------------------------------------------

    @classmethod
    def shapes(cls, config: TrainSections, dit: DiT, text: TextEncoders) -> dict[str, Tensor]:
        encoder = open_encoder(config, device="meta")
        with torch.device("meta"):
            fresh = IPAdapter(
                IPAdapterConfig.for_dit(dit.config, encoder.config.embed_dim, _own(config).tokens)
            )
        adapter = _continued(config, dit.config, encoder) or fresh
        return {f"ip_adapter.{name}": p for name, p in adapter.named_parameters()}

    @classmethod
    def lines(cls, config: TrainSections, shapes: dict[str, Tensor]) -> Iterator[str]:
        adapter = IPAdapterConfig.from_state_dict(
            {name.removeprefix("ip_adapter."): tensor for name, tensor in shapes.items()}
        )
        yield (
            f"IP-Adapter from {_own(config).init_from or 'scratch'}: {adapter.num_tokens} tokens for "
            f"embeddings of {adapter.embed_dim} values by {_own(config).encoder or 'the encoder beside it'}"
        )

    @classmethod
    def frozen_bytes(cls, config: TrainSections, dit: DiT) -> int:
        encoder = 0
        if not config.data.cache.latents:  # else it is needed for the cache and the samples alone
            encoder = sum(p.numel() for p in open_encoder(config, device="meta").parameters())
        width = 2 if config.run.precision == "bf16" else 4
        return stored_bytes(dit, None, default=config.run.precision) + width * encoder

    @classmethod
    def split_bytes(cls, config: TrainSections, dit: DiT) -> int:
        return splittable_bytes(dit, None, default=config.run.precision)

    @classmethod
    def rehearsal(
        cls, config: TrainSections, dit: DiTConfig, *, attention: AttentionFn, dtype: torch.dtype
    ) -> Rehearsal:
        base = DiT(dit, attention=attention, dtype=dtype, operations=OPERATIONS).requires_grad_(False)
        width = open_encoder(config, device="meta").config.embed_dim
        adapter = IPAdapter(IPAdapterConfig.for_dit(dit, width, _own(config).tokens), dtype=dtype)
        module = IPAdapterModule(base, adapter, Schedule(DiffusionConfig()), config.objective)
        return Rehearsal(module, blocks=dit.depth, conditions={"embedding": (width,)})

    # -- the run -----------------------------------------------------------------------------------

    @classmethod
    def base_options(cls) -> dict[str, Any]:
        """The base is cast matrix by matrix, later; what is quantised in its file may stay so."""
        return {"operations": OPERATIONS, "keep_quantised": True}

    @classmethod
    def complete(cls, config: TrainSections, parts: ModelParts) -> None:
        dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
        encoder = parts.image_encoder = open_encoder(config, dtype=dtype)
        adapter = _continued(config, parts.dit.config, encoder, deferred=parts.deferred)
        if adapter is None:
            shape = IPAdapterConfig.for_dit(parts.dit.config, encoder.config.embed_dim, _own(config).tokens)
            seed = hash_int(config.run.seed, "ip_adapter") >> 1
            adapter = new_network(IPAdapter, shape, seed, parts.deferred)
        parts.ip_adapter = adapter.requires_grad_(True)

    @classmethod
    def make(cls, config: TrainSections, parts: ModelParts, device: torch.device) -> IPAdapterObjective:
        parts.dit.requires_grad_(False)
        store(parts.dit, None, default=config.run.precision)
        return cls(parts, config.objective, device)

    def __init__(self, parts: ModelParts, config: ObjectiveSection, device: torch.device) -> None:
        if parts.ip_adapter is None:
            raise ValueError("the parts hold no IP-Adapter")
        self.ip_adapter = parts.ip_adapter
        super().__init__(parts, config, device)

    def _module(self, config: ObjectiveSection) -> nn.Module:
        return IPAdapterModule(self.parts.dit, self.ip_adapter, self.schedule, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"ip_adapter.{name}": p for name, p in self.ip_adapter.named_parameters()}

    def inputs(self, batch: Batch, draws: Draws) -> dict[str, Any]:
        inputs = super().inputs(batch, draws)
        embedding = self._embedding(batch)
        dropped = torch.tensor(draws.drop_image).to(embedding.device, non_blocking=True)
        inputs["embedding"] = embedding.masked_fill(dropped[:, None], 0.0)
        return inputs

    @torch.no_grad()
    def _embedding(self, batch: Batch) -> Tensor:
        if batch.embeddings is not None:
            return batch.embeddings.to(self.device, non_blocking=True)
        encoder = self.parts.image_encoder
        if batch.prompts is None or encoder is None:
            raise ValueError("a batch needs prompt pictures or their embeddings")
        embedding: Tensor = encoder(batch.prompts)
        return embedding

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        """The adapter under Tencent's names; its image encoder stays a file of its own."""
        own = self.parts.content(self.ip_adapter)
        save_ip_adapter(path, own, self.parts.info, dtype=dtype, metadata=extra)


def open_encoder(config: TrainSections, **how: Any) -> ImageEncoder:
    """The image encoder of a run; ``how`` goes to :func:`~...image_prompts.encoder.load_image_encoder`."""
    from ...image_prompts.encoder import encoder_beside, load_image_encoder

    own = _own(config)
    if own.encoder is not None:
        return load_image_encoder(hub.local(own.encoder, ("vision",)), **how)
    assert own.init_from is not None
    return load_image_encoder(encoder_beside(own.init_from), **how)


def _continued(
    config: TrainSections, dit: DiTConfig, encoder: ImageEncoder, *, deferred: bool = False
) -> IPAdapter | None:
    """The IP-Adapter that a run continues, in float32.

    Raises :class:`ConfigError` if it is made for another DiT or image encoder.
    """
    path = _own(config).init_from
    if path is None:
        return None
    adapter = load_ip_adapter(hub.local(path, ("ip_adapter",)), dtype=torch.float32, deferred=deferred)
    try:
        check_adapter(adapter, dit)
        check_encoder(encoder.config.embed_dim, adapter)
    except ConfigError as error:
        raise ConfigError(f"ip_adapter.init_from: {path}: {error}") from None
    return adapter


def _own(config: TrainSections) -> IPAdapterSection:
    table: IPAdapterSection = config.own_table("ip_adapter")
    return table
