"""The configuration of a training from a graph: what is chosen for the user, and what the user may type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...hydit_core.errors import ConfigError
from ...hydit_core.untrusted import parse_toml

if TYPE_CHECKING:  # it brings the trainer
    from ...hydit_core.train.quick.wish import Wish

# What a graph may set of a configuration. Nothing here names a place, a device, a program or a pattern.
_ALLOWED = {
    table: keys.split()
    for table, keys in {
        "run": "steps batch_size grad_accumulation clip_norm precision gradient_checkpointing seed threads "
        "max_bad_steps",
        "optimizer": "name lr betas eps weight_decay args muon_lr muon_momentum loraplus_lr_ratio",
        "lora": "kind rank alpha dropout rank_dropout factor decompose_both full_matrix rslora dora targets "
        "train_bert train_t5 base_precision",
        "data": "resolution buckets crop flip min_side alpha_color on_unreadable validation posterior "
        "allow_missing_captions empty_caption prior",
        "objective": "timesteps weighting snr_gamma vlb noise_offset dropout_bert dropout_t5 dropout_joint",
        "schedule": "kind warmup_steps decay_start min_lr",
        "ema": "enabled decay warmup power",
        "validation": "every patience min_epochs draws prior",
        "samples": "every prompts seed negative steps cfg guidance_rescale sampler spacing width height",
        "checkpoint": "every keep_last keep_every keep_best export_dtype",
        "metrics": "every",
    }.items()
}
_LONGEST = 20_000
_RECORDS = 200
"""So many points has the curve of a run."""
Tables = dict[str, Any]


def user_settings(text: str) -> Tables:
    """The TOML that a user typed, with allowed keys only.

    Raises:
        ConfigError: it is no TOML, or asks for something that a graph may not decide.
    """
    if not isinstance(text, str) or len(text) > _LONGEST:
        raise ConfigError(
            f"settings: write at most {_LONGEST} characters of TOML, such as [lora] and rank = 8"
        )
    settings = parse_toml(text, "settings")
    for table, values in settings.items():
        if table not in _ALLOWED:
            raise ConfigError(f"settings: {table} cannot be set in a graph; use {', '.join(_ALLOWED)}")
        if not isinstance(values, dict):
            raise ConfigError(f"settings: {table} is a table: write [{table}] above its keys")
        for key in values:
            if key not in _ALLOWED[table]:
                allowed = ", ".join(_ALLOWED[table])
                raise ConfigError(f"settings: {table}.{key} cannot be set in a graph; of {table}: {allowed}")
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError):
        raise ConfigError("settings: dates, nan and inf are of no use here") from None
    if isinstance(settings.get("lora", {}).get("targets", ""), list):
        raise ConfigError("settings: lora.targets takes a name in a graph, not patterns; such as 'attention'")
    return settings


def configuration(wish: Wish, settings: Tables) -> tuple[str, list[str]]:
    """A training's TOML, and what there is to know of the pictures.

    Args:
        settings: of :func:`user_settings`; they go before what is chosen.

    Raises:
        HyditError: nothing can be learned from the pictures, or for the model.
    """
    from ...hydit_core.train.quick.plan import plan

    steps = settings.get("run", {}).get("steps")
    if type(steps) is int and steps > 0:
        wish = replace(wish, steps=steps)  # samples, validation and more are spread over the steps
    made = plan(wish)
    more = over({"metrics": {"every": max(1, made.config.run.steps // _RECORDS)}}, settings)
    if not settings:
        return made.toml + "\n".join(toml(more)) + "\n", list(made.notes)
    return "\n".join(toml(over(parse_toml(made.toml, "the plan"), more))) + "\n", list(made.notes)


def toml(tables: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The lines of a TOML file with these tables."""
    for key, value in tables.items():
        if not isinstance(value, dict) and not _is_tables(value):
            # JSON's texts, numbers and lists are TOML's, but for a control character that TOML wants escaped.
            text = json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
            yield f"{json.dumps(key, ensure_ascii=False)} = {text}"
    for key, value in tables.items():
        name = f"{prefix}{json.dumps(key, ensure_ascii=False)}"
        if isinstance(value, dict):
            yield f"\n[{name}]"
            yield from toml(value, f"{name}.")
        elif _is_tables(value):
            for table in value:
                yield f"\n[[{name}]]"
                yield from toml(table, f"{name}.")


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


def over(tables: Mapping[str, Any], others: Mapping[str, Any]) -> Tables:
    """``tables`` with the values of ``others``, table by table."""
    merged = dict(tables)
    for key, value in others.items():
        before = merged.get(key)
        merged[key] = over(before, value) if isinstance(value, dict) and isinstance(before, dict) else value
    return merged
