"""The training configuration: one TOML file, checked completely before any model is loaded.

Unknown keys are refused with the nearest known name. Relative paths in the file are relative to the
file's own folder; relative paths given by ``--set`` are relative to the current folder.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ..data.config import DataConfig
from ..data.section import MAX_COUNT, AnyDtypeName, Section, leaves
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedule import SPACINGS
from ..errors import ConfigError
from ..images import MAX_SIDE, MIN_SIDE
from ..untrusted import parse_toml, read_toml
from .model_section import ConfigPath, ModelSection

Beta = Annotated[float, Field(ge=0, lt=1)]


class ObjectiveSection(Section):
    kind: Literal["full", "controlnet", "lora"] = Field(
        default="full", description="what is trained: all weights of the DiT, a ControlNet or a LoRA"
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
    controlnet: ConfigPath | None = Field(
        default=None, description="ControlNet: weights to continue from; unset: copied from the base"
    )


TARGETS = ("attention", "attention+mlp", "all-linear")


class LoraSection(Section):
    rank: int = Field(default=16, gt=0, le=8192, description="rank of the two matrices of each layer")
    alpha: float | None = Field(
        default=None, gt=0, le=1e6, description="the strength is alpha / rank; unset: the rank, so strength 1"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on the adapters' inputs")
    rslora: bool = Field(default=False, description="take alpha / sqrt(rank) as the strength instead")
    dora: bool = Field(default=False, description="DoRA: train the norm of each output's weights separately")
    targets: str | tuple[str, ...] = Field(
        default="attention", description="which linear layers get adapters"
    )
    train_bert: bool = Field(default=False, description="adapters in BERT too")
    train_t5: bool = Field(default=False, description="adapters in mT5 too")
    init_from: ConfigPath | None = Field(
        default=None, description="a LoRA to continue from, in any format and of the same rank"
    )
    base_precision: Annotated[Literal["fp32", "bf16", "fp16", "fp8", "int8", "nf4"] | None, AnyDtypeName] = (
        Field(default=None, description="how the frozen DiT's matrices are stored; unset: run.precision")
    )
    trigger: str = Field(
        default="", description="words in the captions that call up the LoRA, for the exported files"
    )

    @field_validator("targets")
    @classmethod
    def _known_targets(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(targets, str) and targets not in TARGETS:
            raise ValueError(f"use one of {', '.join(TARGETS)}, or a list of patterns such as ['Wqkv']")
        if not targets:
            raise ValueError("an empty list: nothing would be trained")
        return targets

    @property
    def trains_text(self) -> bool:
        return self.train_bert or self.train_t5


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
    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for the matrices of the DiT's blocks and AdamW for the rest; needs torch 2.9",
    )
    lr: float = Field(default=1e-4, gt=0, le=1, description="learning rate of AdamW")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="AdamW's two decay rates")
    eps: float = Field(default=1e-8, gt=0, le=1, description="AdamW's epsilon")
    weight_decay: float = Field(
        default=0.0, ge=0, le=10, description="for parameters with two or more dimensions"
    )
    muon_lr: float = Field(default=0.02, gt=0, le=1, description="learning rate of Muon")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="momentum of Muon")
    groups: tuple[GroupSection, ...] = Field(default=(), description="exceptions for some parameters")


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
    batch_size: int = Field(gt=0, le=65536, description="samples per micro-batch and per process")
    grad_accumulation: int = Field(default=1, gt=0, le=65536, description="micro-batches per optimizer step")
    clip_norm: float = Field(
        default=1.0, ge=0, le=1e6, description="largest norm of the gradients; 0 turns clipping off"
    )
    precision: Annotated[Literal["fp32", "bf16"], AnyDtypeName] = Field(
        default="fp32",
        description="precision of the computation; trained weights are kept in fp32 either way",
    )
    gradient_checkpointing: bool | float = Field(
        default=False,
        description="recompute activations instead of keeping them: true or a fraction of the blocks",
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


class SamplesSection(Section):
    """Settings that are not given are those that the model's file recommends."""

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
    control_images: tuple[ConfigPath, ...] = Field(
        default=(),
        description="ControlNet: what data.control makes control pictures from; one, or one per prompt",
    )

    @field_validator("sampler", "spacing")
    @classmethod
    def _known(cls, name: str | None, info: ValidationInfo) -> str | None:
        known = SAMPLERS if info.field_name == "sampler" else SPACINGS
        if name is not None and name not in known:
            raise ValueError(f"unknown {info.field_name}: use one of {', '.join(known)}")
        return name

    def given(self) -> dict[str, Any]:
        """The settings of sampling; None where the model's own count."""
        return self.model_dump(exclude={"every", "prompts", "seed", "control_images"})


class CheckpointSection(Section):
    every: int = Field(
        default=1000, gt=0, le=MAX_COUNT, description="how often to save, and to write the model file"
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


class TrainConfig(Section):
    model: ModelSection
    data: DataConfig
    run: RunSection
    objective: ObjectiveSection = ObjectiveSection()
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: EmaSection = EmaSection()
    validation: ValidationSection = ValidationSection()
    samples: SamplesSection = SamplesSection()
    checkpoint: CheckpointSection = CheckpointSection()
    metrics: MetricsSection = MetricsSection()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.samples.every and not self.samples.prompts:
            raise ValueError("samples.every is set but samples.prompts is empty")
        if self.validation.every and not self.data.validation:
            raise ValueError(
                "validation.every is set but data.validation holds out no pictures: say how many, "
                "for example data.validation = 16"
            )
        if self.data.cache.text and self.trains_text:
            option = (
                "objective.train_text_encoders" if self.objective.train_text_encoders else "lora.train_..."
            )
            raise ValueError(
                f"data.cache.text keeps the outputs of the text encoders, but {option} "
                "changes them at every step: turn one of the two off"
            )
        if self.checkpoint.keep_best and not self.validation.every:
            raise ValueError("checkpoint.keep_best goes by the validation loss: set validation.every")
        self._check_control()
        self._check_lora()
        if self.schedule.warmup_steps > self.run.steps:
            raise ValueError("schedule.warmup_steps is larger than run.steps")
        return self

    @property
    def trains_text(self) -> bool:
        """Whether the text encoders, or adapters of theirs, are trained."""
        return self.objective.train_text_encoders or self.lora.trains_text

    @property
    def exports_text(self) -> bool:
        """Whether the file that is written holds the text encoders."""
        return self.objective.kind == "full" and self.checkpoint.export_all_in_one

    @property
    def base_precision(self) -> str:
        """What the matrices of a frozen DiT are stored in."""
        return self.lora.base_precision or self.run.precision

    def _check_lora(self) -> None:
        if self.objective.kind != "lora":
            if self.lora != LoraSection():
                raise ValueError("the table lora needs objective.kind = 'lora'")
            return
        if self.model.init_from is None:
            raise ValueError("a LoRA is trained for finished weights: give model.init_from")
        if self.objective.train_text_encoders:
            raise ValueError(
                "objective.train_text_encoders trains all their weights: a LoRA takes lora.train_bert and "
                "lora.train_t5"
            )

    def _check_control(self) -> None:
        objective = self.objective
        trained = objective.kind == "controlnet"
        if trained != (self.data.control is not None):
            raise ValueError(
                "objective.kind = 'controlnet' and a table data.control (for example kind = 'canny') belong "
                "together"
            )
        others = ("controlnet", "dropout_control")
        if not trained and any(getattr(objective, name) for name in others):
            raise ValueError("objective.controlnet and dropout_control need objective.kind = 'controlnet'")
        if not trained:
            if self.samples.control_images:
                raise ValueError("samples.control_images needs objective.kind = 'controlnet'")
            return
        if self.model.init_from is None or objective.train_text_encoders:
            raise ValueError(
                "a ControlNet is trained for finished weights: give model.init_from, and leave "
                "objective.train_text_encoders off"
            )
        if self.samples.every and len(self.samples.control_images) not in (1, len(self.samples.prompts)):
            raise ValueError(
                "samples.control_images: give one picture, or one for each of samples.prompts "
                f"({len(self.samples.prompts)})"
            )


def load_config(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read and check a TOML file; ``overrides`` are ``dotted.key=value`` with TOML values.

    Raises :class:`ConfigError` with every fault found, each with its dotted path.
    """
    raw = read_toml(path)
    for override in overrides or []:
        _apply(raw, override)
    base = path.resolve().parent
    try:
        config = TrainConfig.model_validate(raw, context={"base": base})
    except ValidationError as error:
        raise ConfigError(f"{path}:", *map(_explain, _faults(error))) from None
    return config.model_copy(update={"data": config.data.resolved(base)})


def _apply(raw: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"--set {override}: expected key=value, for example run.steps=500")
    try:
        value = parse_toml(f"value = {text}", "--set")["value"]
    except ConfigError:
        value = text
    *parents, last = key.strip().split(".")
    table = raw
    for name in parents:
        child = table.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {name} is not a table")
        table = child
    table[last] = _from_here(value, parents, last)


def _from_here(value: Any, parents: Sequence[str], last: str) -> Any:
    """``value`` with all paths in it, in tables and lists too, made to start at the current folder."""
    if isinstance(value, dict):
        return {key: _from_here(inner, [*parents, last], key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_here(inner, parents, last) for inner in value]
    if isinstance(value, str) and value and _is_path(parents, last):
        return str(Path.cwd() / Path(value).expanduser())
    return value


# In the words of TOML, not of Python.
_WORDS = {
    "missing": "is needed and not there",
    "model_type": "expected a table",
    "dict_type": "expected a table",
    "tuple_type": "expected a list",
}


def _faults(error: ValidationError) -> list[Any]:
    """Without those that only follow from another: a list is not empty because its entries are wrong."""
    found = error.errors()
    inside = {one["loc"][:-n] for one in found for n in range(1, len(one["loc"]))}
    return [one for one in found if one["type"] != "too_short" or one["loc"] not in inside]


def _explain(error: Any) -> str:
    loc = [part for part in error["loc"] if part not in ("table", "path") or part is error["loc"][-1]]
    dotted = ".".join(str(part) for part in loc) or "(whole file)"
    if error["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(sorted(known))
        return f"  {dotted}: unknown key; {hint}"
    message = _WORDS.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if error["type"] == "too_short":
        message = f"expected at least {error['ctx']['min_length']} in the list"
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"  {dotted}: {message}{shown}"


def _section_at(loc: Sequence[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = TrainConfig
    for part in loc:
        if isinstance(part, int):
            continue
        field = None if section is None else section.model_fields.get(str(part))
        inside = [] if field is None else leaves(field.annotation)
        section = next((leaf for leaf in inside if issubclass(leaf, BaseModel)), None)
    return section


def _known_keys(loc: Sequence[Any]) -> list[str]:
    section = _section_at(loc)
    return [] if section is None else list(section.model_fields)


def _is_path(parents: Sequence[str], last: str) -> bool:
    section = _section_at(parents)
    field = None if section is None else section.model_fields.get(last)
    return field is not None and Path in list(leaves(field.annotation))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for each value that differs between two dumped configurations."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return found
