"""The tables of a training configuration that every objective shares.

What objectives have of their own, and what they ask of these, is in :mod:`.objectives`; :mod:`.config` puts
the whole together.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..data.config import DataConfig
from ..data.section import MAX_COUNT, AnyDtypeName, Section
from ..diffusion.forecast import tolerance_of
from ..diffusion.samplers import SAMPLERS
from ..errors import ConfigError
from ..facts import SPACINGS
from ..images import MAX_SIDE, MIN_SIDE
from .model_section import ConfigPath, ModelSection
from .optimizer_kinds import with_own_defaults

Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(max_length=40)]
Prompt = Annotated[str, Field(min_length=1)]


class ObjectiveSection(Section):
    kind: str = Field(
        default="full",
        description="what is trained: all weights of the DiT, a ControlNet, a LoRA, few steps, an IP-Adapter",
    )
    train_text_encoders: bool = Field(
        default=False, description="full training: train BERT and mT5 along with the DiT"
    )
    timesteps: Literal["uniform", "stratified", "logit_normal"] = Field(
        default="uniform",
        description="how timesteps are drawn: independently, spread over each batch, or more in the middle",
    )
    weighting: Literal["constant", "min_snr", "min_snr_v"] = Field(
        default="constant",
        description="how much each timestep counts; min_snr holds back those with little noise",
    )
    snr_gamma: float = Field(
        default=5.0, gt=0, le=1000, description="where min_snr caps the signal-to-noise ratio"
    )
    vlb: bool = Field(default=True, description="add the variational bound, which trains the variances")
    noise_offset: float = Field(
        default=0.0, ge=0, le=1, description="size of a random shift of each channel's noise"
    )
    dropout_bert: float = Field(default=0.0, ge=0, le=1, description="probability of an empty text for BERT")
    dropout_t5: float = Field(default=0.0, ge=0, le=1, description="probability of an empty text for mT5")
    dropout_joint: float = Field(
        default=0.0, ge=0, le=1, description="probability that both get an empty text"
    )
    dropout_control: float = Field(
        default=0.0, ge=0, le=1, description="ControlNet: probability that the control latents are zeros"
    )
    dropout_image: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="IP-Adapter: probability that the prompt picture's embedding is zeros",
    )
    controlnet: ConfigPath | None = Field(
        default=None, description="ControlNet: weights to continue from; unset: copied from the base"
    )
    controlnet_load_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="which of them, if a torch file has several: ema (taken if unset), module, distill",
    )

    @model_validator(mode="after")
    def _key_of_something(self) -> ObjectiveSection:
        if self.controlnet_load_key is not None and self.controlnet is None:
            raise ValueError(
                "controlnet_load_key chooses among the weights of objective.controlnet, which is not given"
            )
        return self


class GroupSection(Section):
    """Parameters by name: a glob (``dit.blocks.*.attn1.*``) or, after ``re:``, a regular expression."""

    match: str = Field(description="the parameters' names; the first group that matches counts")
    lr_scale: float = Field(default=1.0, ge=0, le=1000, description="factor on the learning rate")
    weight_decay: float | None = Field(
        default=None, ge=0, le=10, description="instead of optimizer.weight_decay"
    )
    freeze: bool = Field(default=False, description="leave these parameters as they are")

    @field_validator("match")
    @classmethod
    def _valid_expression(cls, match: str) -> str:
        if match.startswith("re:"):
            try:
                re.compile(match[3:])
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return match


class OptimizerSection(Section):
    name: Literal["adamw", "muon", "adamw_8bit", "lion", "adafactor", "came", "prodigy", "schedule_free"] = (
        Field(
            default="adamw",
            description="muon: Muon for the matrices of the DiT's blocks and AdamW for the rest; prodigy "
            "finds the learning rate, schedule_free needs no schedule; all but adamw and muon need a library",
        )
    )
    lr: float = Field(
        default=1e-4,
        gt=0,
        le=1,
        description="learning rate; unset: of came 2e-4, schedule_free 2.5e-3, prodigy 1 (a factor on what "
        "it finds), and of the others",
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999),
        description="the two decay rates; unset: of lion 0.9 and 0.99, and of the others",
    )
    eps: float = Field(default=1e-8, gt=0, le=1, description="epsilon, of those that have one")
    weight_decay: float = Field(
        default=0.0, ge=0, le=10, description="for parameters with two or more dimensions"
    )
    args: dict[Name, bool | int | float | str | tuple[float, ...]] = Field(
        default={}, description="more for an optimizer of a library, by the names of its own arguments"
    )
    loraplus_lr_ratio: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="LoRA+: the learning rate of the matrices B, which begin as zeros, is so many times lr",
    )
    muon_lr: float = Field(default=0.02, gt=0, le=1, description="learning rate of Muon")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="momentum of Muon")
    groups: tuple[GroupSection, ...] = Field(default=(), description="exceptions for some parameters")

    @model_validator(mode="before")
    @classmethod
    def _own_defaults(cls, table: Any) -> Any:
        return with_own_defaults(table)


class ScheduleSection(Section):
    kind: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="how the learning rate falls after the warm-up"
    )
    warmup_steps: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="how long the learning rate rises from 0"
    )
    decay_start: float = Field(default=0.0, ge=0, le=1, description="fraction of the steps before the decay")
    min_lr: float = Field(default=0.0, ge=0, le=1, description="final learning rate as a fraction of lr")


class RunSection(Section):
    output_dir: ConfigPath = Field(description="the run's folder, for all that training writes")
    steps: int = Field(gt=0, le=MAX_COUNT, description="optimizer steps in all")
    minutes: float = Field(
        default=0.0, ge=0, le=1e7, description="end the run when it has trained for so long; 0: no limit"
    )
    batch_size: int = Field(gt=0, le=65536, description="samples per micro-batch and per process")
    grad_accumulation: int = Field(default=1, gt=0, le=65536, description="micro-batches per optimizer step")
    clip_norm: float = Field(
        default=1.0, ge=0, le=1e6, description="largest norm of the gradients; 0 turns clipping off"
    )
    precision: Annotated[Literal["fp32", "bf16"], AnyDtypeName] = Field(
        default="fp32",
        description="precision of the computation; what is trained is kept as run.weights says",
    )
    weights: Annotated[Literal["fp32", "bf16"], AnyDtypeName] = Field(
        default="fp32",
        description="in which dtype the blocks' matrices are kept while they are trained, and their "
        "gradients; bf16 takes half the memory and rounds every update at random, up or down, right in the "
        "mean; needs optimizer.name = 'adamw_8bit'",
    )
    gradient_checkpointing: bool | float = Field(
        default=False,
        description="recompute activations instead of keeping them: true or a fraction of the blocks",
    )
    compile: bool = Field(
        default=False, description="let torch compile the blocks; the first step of each shape takes longer"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of every random draw")
    threads: int | None = Field(default=None, gt=0, le=4096, description="CPU threads; unset: torch decides")
    device: str = Field(default="auto", description="where to compute; auto: a GPU if there is one")
    max_bad_steps: int = Field(
        default=10, gt=0, le=MAX_COUNT, description="stop after this many non-finite steps in a row"
    )
    answer_within: float = Field(
        default=240.0, gt=0, le=1e6, description="several processes: how long one may be silent"
    )
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        default="auto",
        description="several processes: each holds the whole model (ddp), or a part of it (fsdp), or groups "
        "of them hold a copy and split it (hsdp); auto: ddp where it fits, else fsdp",
    )
    parallel_replicas: int | None = Field(
        default=None, gt=0, le=65536, description="hsdp: how many copies; unset: one on each machine"
    )
    parallel_offload: bool = Field(
        default=False,
        description="fsdp, hsdp on GPUs: parts of weights, gradients, optimizer states and averages stay in "
        "the host's memory, where the optimizer works; slower, for models too large for all GPUs together",
    )

    @field_validator("gradient_checkpointing")
    @classmethod
    def _fraction(cls, value: bool | float) -> bool | float:
        if not 0 <= value <= 1:
            raise ValueError("use true, false, or a fraction of the blocks from 0 to 1")
        return value


class EmaSection(Section):
    enabled: bool = Field(default=True, description="keep a running average of the weights, and export it")
    decay: float = Field(default=0.9999, ge=0, lt=1, description="share of the average that a step keeps")
    warmup: bool = Field(
        default=True, description="begin with less: at step n, min(decay, 1 - (1 + n) ** -power)"
    )
    power: float = Field(default=2 / 3, gt=0, le=10, description="the exponent of that warm-up")


class ValidationSection(Section):
    every: int = Field(default=0, ge=0, le=MAX_COUNT, description="how often to measure that loss; 0: never")
    patience: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="end the run when that loss has not become lower for so long; 0: never; needs "
        "checkpoint.keep_best",
    )
    min_epochs: float = Field(default=0.0, ge=0, le=1e6, description="patience: but not before")
    min_improvement: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="patience: a loss that is lower by a smaller share does not count",
    )
    prior: tuple[Prompt, ...] = Field(
        default=(),
        description="prompts that the base draws before the run: that loss on them shows what is forgotten",
    )
    draws: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="at how many timesteps each held-out picture is measured; more where they are few",
    )


class SamplesSection(Section):
    """Settings that are not given are taken from what the model's file recommends."""

    every: int = Field(
        default=0, ge=0, le=MAX_COUNT, description="how often to draw, from step 0 on; 0: never"
    )
    prompts: tuple[str, ...] = Field(default=(), description="one picture each")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of every sample picture")
    negative: str | None = Field(default=None, description="negative prompt")
    steps: int | None = Field(default=None, gt=0, le=100_000, description="sampling steps")
    cfg: float | None = Field(default=None, ge=1, le=1000, description="guidance scale; 1 is off")
    guidance_rescale: float | None = Field(default=None, ge=0, le=1, description="guidance rescale; 0 is off")
    sampler: str | None = Field(default=None, description="sampler")
    spacing: str | None = Field(default=None, description="spacing of the timesteps")
    width: int | None = Field(
        default=None, ge=MIN_SIDE, le=MAX_SIDE, multiple_of=8, description="width of the samples"
    )
    height: int | None = Field(
        default=None, ge=MIN_SIDE, le=MAX_SIDE, multiple_of=8, description="height of the samples"
    )
    forecast: str | float = Field(
        default="off", description="replace calls of the network by forecasts: off, safe, fast or a tolerance"
    )
    control_images: tuple[ConfigPath, ...] = Field(
        default=(),
        description="ControlNet: what data.control makes control pictures from; one, or one per prompt",
    )

    image_prompts: tuple[ConfigPath, ...] = Field(
        default=(), description="IP-Adapter: the prompt pictures; one, or one per prompt"
    )

    @field_validator("sampler", "spacing")
    @classmethod
    def _known(cls, name: str | None, info: ValidationInfo) -> str | None:
        known = SAMPLERS if info.field_name == "sampler" else SPACINGS
        if name is not None and name not in known:
            raise ValueError(f"unknown {info.field_name}: use one of {', '.join(known)}")
        return name

    @field_validator("forecast")
    @classmethod
    def _tolerance(cls, forecast: str | float) -> str | float:
        try:
            tolerance_of(forecast)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return forecast

    def given(self) -> dict[str, Any]:
        """The settings for sampling; None leaves a setting to the model's file."""
        beside = {"every", "prompts", "seed", "forecast", "control_images", "image_prompts"}
        return self.model_dump(exclude=beside)


class CheckpointSection(Section):
    every: int = Field(
        default=1000, gt=0, le=MAX_COUNT, description="how often to save, and to write the model file"
    )
    background: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="write while training goes on, from a copy in the host's memory; auto: where that fits",
    )
    keep_last: int = Field(
        default=2,
        gt=0,
        le=MAX_COUNT,
        description="how many of the newest checkpoints stay, and of the newest good ones",
    )
    keep_every: int = Field(
        default=0,
        ge=0,
        le=MAX_COUNT,
        description="how often a checkpoint stays for good, with its own export; 0: never",
    )
    keep_best: bool = Field(
        default=False,
        description="keep the one of the lowest validation loss, with an export best.safetensors",
    )
    export_dtype: Annotated[Literal["fp16", "bf16", "fp32"], AnyDtypeName] = Field(
        default="fp16", description="dtype of the exported file"
    )
    export_all_in_one: bool = Field(
        default=True, description="full training: text encoders and VAE go into the file too"
    )
    metadata: dict[str, str] = Field(
        default={}, description='more about the file, for example "modelspec.title" and "modelspec.license"'
    )

    @field_validator("metadata")
    @classmethod
    def _not_ours(cls, metadata: dict[str, str]) -> dict[str, str]:
        ours = [key for key in metadata if key.startswith("hydit.") or key == "format"]
        if ours:
            raise ValueError(
                f"{', '.join(ours)}: written by the trainer itself; what the file says of the model is "
                "set in model.info"
            )
        return metadata


class MetricsSection(Section):
    every: int = Field(default=10, gt=0, le=MAX_COUNT, description="how often to add a line to metrics.jsonl")
    tensorboard: bool = Field(default=True, description="write for TensorBoard too, if it is installed")


class WatchdogSection(Section):
    """A process that takes longer for one of these ends, so that a launcher can start it anew; 0: never."""

    data: float = Field(default=900.0, ge=0, le=1e6, description="waiting for the next batch")
    step: float = Field(
        default=1800.0, ge=0, le=1e6, description="one micro-batch; the first may include compilation"
    )
    validation: float = Field(
        default=7200.0, ge=0, le=1e6, description="one measurement of validation losses"
    )
    samples: float = Field(default=3600.0, ge=0, le=1e6, description="drawing the sample pictures")
    checkpoint: float = Field(default=3600.0, ge=0, le=1e6, description="a checkpoint with its export")


class TrainSections(Section):
    """A whole configuration as far as its tables are the same for every objective."""

    model: ModelSection
    data: DataConfig
    run: RunSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: EmaSection = EmaSection()
    validation: ValidationSection = ValidationSection()
    samples: SamplesSection = SamplesSection()
    checkpoint: CheckpointSection = CheckpointSection()
    metrics: MetricsSection = MetricsSection()
    watchdog: WatchdogSection = WatchdogSection()

    def own_table(self, objective: str) -> Any:
        """The table that belongs to one objective and is called like it."""
        return getattr(self, objective)
