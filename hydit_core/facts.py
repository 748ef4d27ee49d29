"""What a model's file may say of itself: each value's kind and range, checked when written and when read.

:class:`~.config.ModelInfo` and :class:`~.config.DiffusionConfig` check themselves with these tables, so that
a file, a training's ``[model.info]``, a config.json and a node all meet the same ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from .errors import ConfigError

VERSIONS = ("v1.0", "v1.1", "v1.2")
PREDICTIONS = ("v", "epsilon", "sample")
SAMPLER_NAMES = ("ddpm", "ddim", "dpmpp_2m", "euler")
SPACINGS = ("leading", "linspace", "trailing")
ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu",
    "swish", "mish", "tanh",
)  # fmt: skip
_FEED_FORWARD = tuple(f"{gated}{name}" for gated in ("", "gated-") for name in ACTIVATIONS)
_LEAST_SIGNAL = 1e-20


class Rule(NamedTuple):
    """What a value must be: in words, and as a test."""

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
        "num_heads": _HEADS,  # shapes tell it too
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
"""Section of ``hydit.config`` ("" for what stands in none) -> field -> what it must be."""
SECTIONS = tuple(filter(None, RULES))


def check(section: str, values: Mapping[str, Any]) -> None:
    """Check the fields that are known of one section; others pass (:func:`unknown` names them).

    Raises :class:`ConfigError` with every fault found.
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
    """Raise :class:`ConfigError` unless scaled-linear betas between these rise and leave some signal."""
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
    """The dotted names in a ``hydit.config`` that mean nothing here: misspelt, or of a later version."""
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
