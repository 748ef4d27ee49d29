"""What a model's file says about itself, and which values are possible: checked on writing and on reading.

:class:`ModelInfo` and :class:`DiffusionConfig` check themselves against :data:`RULES`, so that the same rules
hold for a file, a training's ``[model.info]``, a config.json and a node.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

from .errors import ConfigError, WeightsError, printable
from .untrusted import parse_json

VERSIONS = ("v1.0", "v1.1", "v1.2")
PREDICTIONS = ("v", "epsilon", "sample")
SAMPLER_NAMES = ("ddpm", "ddim", "dpmpp_2m", "euler", "lcm")
SPACINGS = ("leading", "linspace", "trailing")
ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu",
    "swish", "mish", "tanh",
)  # fmt: skip
_FEED_FORWARD = tuple(f"{gated}{name}" for gated in ("", "gated-") for name in ACTIVATIONS)
_LEAST_SIGNAL = 1e-20


class Rule(NamedTuple):
    """What a value has to be: in words, and as a test."""

    words: str
    test: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(low: int, high: int, multiple: int = 1) -> Rule:
    words = f"a whole number from {low} to {high:,}" + (f" that {multiple} divides" if multiple > 1 else "")
    return Rule(words, lambda value: type(value) is int and low <= value <= high and value % multiple == 0)


def number(low: float, high: float) -> Rule:
    words = f"a number from {low:g} to {high:g}"
    return Rule(words, lambda value: _is_number(value) and low <= value <= high)


def one_of(names: Collection[str], words: str = "") -> Rule:
    words = words or f"one of {', '.join(names)}"
    return Rule(words, lambda value: isinstance(value, str) and value in names)


def text(most: int) -> Rule:
    words = f"a text of up to {most:,} characters"
    return Rule(words, lambda value: isinstance(value, str) and len(value) <= most)


_BOOL = Rule("true or false", lambda value: isinstance(value, bool))
_EPSILON = number(1e-20, 0.1)
_HEADS = whole(1, 1024)


def _is_rgb(value: Any) -> bool:
    rows = isinstance(value, list | tuple) and 1 <= len(value) <= 1025
    return rows and all(
        isinstance(row, list | tuple) and len(row) == 3 and all(_is_number(v) and abs(v) <= 1000 for v in row)
        for row in value
    )


RULES: dict[str, dict[str, Rule]] = {
    "": {
        "version": one_of(VERSIONS),
        "variant": text(100),
        "base": text(1000),
        "pooler_heads": _HEADS,
        "rope_base": whole(1, 4096),
        "posterior": one_of(("", "sample", "mode"), "'sample' or 'mode'"),
        "folded_cfg": number(0, 1000),
    },
    "diffusion": {
        "num_train_timesteps": whole(2, 100_000),
        "beta_start": number(1e-8, 0.999),
        "beta_end": number(1e-8, 0.999),
        "prediction": one_of(PREDICTIONS),
    },
    "defaults": {
        "sampler": one_of(SAMPLER_NAMES),
        "spacing": one_of(SPACINGS),
        "steps": whole(1, 100_000),
        "cfg": number(1, 1000),
        "guidance_rescale": number(0, 1),
        "width": whole(8, 8192, 8),
        "height": whole(8, 8192, 8),
        "negative": text(100_000),
    },
    "bert": {
        "num_attention_heads": _HEADS,
        "hidden_act": one_of(ACTIVATIONS),
        "layer_norm_eps": _EPSILON,
        "do_lower_case": _BOOL,
    },
    "t5": {
        "num_heads": _HEADS,  # also known from shapes
        "relative_attention_max_distance": whole(2, 1_000_000),
        "feed_forward_proj": one_of(_FEED_FORWARD),
        "layer_norm_epsilon": _EPSILON,
    },
    "vae": {
        "scaling_factor": number(1e-4, 1e4),
        "shift_factor": number(-1e4, 1e4),
        "norm_num_groups": whole(1, 4096),
        "act_fn": one_of(ACTIVATIONS),
        "preview_rgb": Rule("rows of three numbers: R, G, B for each latent channel", _is_rgb),
    },
}
"""Section of ``hydit.config`` ("" for fields outside sections) -> field -> what it must be."""
SECTIONS = tuple(filter(None, RULES))


def check(section: str, values: Mapping[str, Any]) -> None:
    """Check the known fields of one section; others pass (:func:`unknown` names them).

    Raises :class:`ConfigError` that lists every fault.
    """
    rules = RULES[section]
    faults = [
        f"{_dotted(section, name)} is {_shown(values[name])}; expected {rule.words}"
        for name, rule in rules.items()
        if name in values and not rule.test(values[name])
    ]
    if faults:
        raise ConfigError("; ".join(faults))


def check_betas(start: float, end: float, steps: int) -> None:
    """Raise :class:`ConfigError` unless scaled-linear betas from start to end rise and leave some signal."""
    if start > end:
        raise ConfigError(f"diffusion.beta_start {start:g} is above diffusion.beta_end {end:g}")
    low, high = math.sqrt(start), math.sqrt(end)
    step = (high - low) / (steps - 1)
    signal = math.exp(math.fsum(math.log1p(-((low + i * step) ** 2)) for i in range(steps)))
    if signal < _LEAST_SIGNAL:
        raise ConfigError(
            f"diffusion: betas {start:g} to {end:g} over {steps:,} steps leave {signal:.1g} of the signal; "
            f"expected at least {_LEAST_SIGNAL:g}"
        )


def unknown(values: Mapping[str, Any]) -> list[str]:
    """The dotted names in a ``hydit.config`` that are unknown here: misspelt, or from a later version."""
    names = [name for name in values if name not in {*RULES[""], *SECTIONS, "format"}]
    for section in SECTIONS:
        inner = values.get(section)
        if isinstance(inner, Mapping):
            names += [_dotted(section, name) for name in inner if name not in RULES[section]]
    return names


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _shown(value: Any) -> str:
    shown = re.sub(r"\s+", " ", repr(value))
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


METADATA_KEY = "hydit.config"


METADATA_FORMAT = 1


NEGATIVE_PROMPT = (
    "错误的眼睛，糟糕的人脸，毁容，糟糕的艺术，变形，多余的肢体，模糊的颜色，模糊，重复，病态，残缺，"
)
"""Default negative prompt of Tencent/HunyuanDiT (``hydit/constants.py``)."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule (scaled linear betas) and what the model predicts; the defaults are v1.2's.

    Raises :class:`ConfigError` for values that break the rules of :mod:`.facts`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.018
    prediction: Literal["v", "epsilon", "sample"] = "v"

    def __post_init__(self) -> None:
        check("diffusion", vars(self))
        check_betas(self.beta_start, self.beta_end, self.num_train_timesteps)


@dataclass(frozen=True)
class SamplingDefaults:
    """The settings that a model's file recommends; the defaults are those of the published weights."""

    sampler: str = "ddpm"
    spacing: str = "leading"
    steps: int = 50
    cfg: float = 6.0
    guidance_rescale: float = 0.0
    width: int = 1024
    height: int = 1024
    negative: str = NEGATIVE_PROMPT


@dataclass(frozen=True)
class ModelInfo:
    """What a model's shapes do not tell, stored as JSON in its file's ``hydit.config`` metadata.

    ``version`` is "v1.0", "v1.1" or "v1.2"; ``variant`` is "", "ema", "module" or "distill"; ``bert``, ``t5``
    and ``vae`` hold what those parts' shapes do not tell (attention heads, maximum relative distance, norm
    groups, latent scale, preview colors); ``base`` names the weights that training started from;
    ``posterior`` is "sample" or "mode", the kind of the VAE's latents that the DiT was trained on, or "".
    ``folded_cfg`` is the guidance scale that a distillation to few steps folded in, 1 if it was none; 0 in
    files that are not distilled so.

    Raises :class:`ConfigError` for values that no model can have (:mod:`.facts`), so that any instance can be
    written.
    """

    version: str
    variant: str = ""
    pooler_heads: int = 8
    rope_base: int = 32
    diffusion: DiffusionConfig = DiffusionConfig()
    defaults: SamplingDefaults = SamplingDefaults()
    bert: dict[str, Any] = field(default_factory=dict)
    t5: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    posterior: Literal["", "sample", "mode"] = ""
    folded_cfg: float = 0.0

    def __post_init__(self) -> None:
        check("", vars(self))
        for section in ("bert", "t5", "vae"):
            check(section, getattr(self, section))
        check("defaults", vars(self.defaults))
        most = self.diffusion.num_train_timesteps - (self.defaults.spacing != "trailing")
        if self.defaults.steps > most:
            raise ConfigError(
                f"defaults.steps is {self.defaults.steps}; the schedule has room for {most} with "
                f"{self.defaults.spacing!r} spacing"
            )

    @classmethod
    def published(cls, version: str) -> ModelInfo:
        """The values of Tencent's published weights of ``version``.

        v1.2 was trained with ``beta_end`` 0.018, earlier versions with 0.03 (Tencent's training scripts).
        """
        if version not in VERSIONS:
            raise ConfigError(f"unknown HunyuanDiT version {version!r}; known are v1.0, v1.1 and v1.2")
        beta_end = 0.018 if version == "v1.2" else 0.03
        return cls(version=version, diffusion=DiffusionConfig(beta_end=beta_end))

    def to_json(self) -> str:
        """The text of the ``hydit.config`` metadata key."""
        return json.dumps({"format": METADATA_FORMAT, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, version: str) -> ModelInfo:
        """Read a safetensors file's metadata; ``version`` (from the shapes) is used if it names none.

        Absent values default to those published for the version. Unknown names, from a later release or
        misspelt, are ignored with a warning; a release that changes what a known name means raises the
        format number.

        Raises :class:`WeightsError` if the text is not a JSON object, is in a newer format than ours, or has
        an impossible value.
        """
        text = metadata.get(METADATA_KEY)
        if text is None:
            return cls.published(version)
        where = f"metadata {METADATA_KEY!r}"
        values = parse_json(text, where)
        if type(values.get("format")) is not int or values["format"] < 1:
            raise WeightsError(f"{where} is not an object with a format number")
        if values["format"] > METADATA_FORMAT:
            raise WeightsError(
                f"{where} has format {values['format']}; this version of hydit reads up to "
                f"{METADATA_FORMAT}: update hydit"
            )
        if names := unknown(values):
            shown = printable(", ".join(names[:8]))
            warnings.warn(f"{where}: ignored unknown names: {shown}", stacklevel=1)
        try:
            check("", values)
            return _merged(cls.published(values.get("version", version)), values)
        except ConfigError as error:
            raise WeightsError(f"{where}: {error}") from None


def _merged(start: ModelInfo, values: Mapping[str, Any]) -> ModelInfo:
    """``start`` with the fields that ``values`` names replaced."""
    changes: dict[str, Any] = {name: values[name] for name in RULES[""] if name in values}
    for section in SECTIONS:
        inner = values.get(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{section} is {inner!r}; expected an object")
        known = getattr(start, section)
        if isinstance(known, dict):
            changes[section] = inner
        else:
            names = {f.name for f in fields(known)}
            check(section, inner)
            changes[section] = replace(known, **{name: inner[name] for name in names & inner.keys()})
    return replace(start, **changes)
