"""The configuration of a training from a graph: what is chosen for the user, and what the user may type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...hydit_core.errors import ConfigError
from ...hydit_core.untrusted import parse_toml

# What a graph may set of a configuration. Nothing here names a place, a device, a program or a pattern.
_ALLOWED = {
    table: keys.split()
    for table, keys in {
        "run": "steps batch_size grad_accumulation clip_norm precision gradient_checkpointing seed threads "
        "max_bad_steps",
        "optimizer": "name lr betas eps weight_decay args muon_lr muon_momentum",
        "lora": "rank alpha dropout rslora dora targets train_bert train_t5 base_precision",
        "data": "resolution buckets crop flip min_side alpha_color on_unreadable validation posterior "
        "allow_missing_captions empty_caption",
        "objective": "timesteps weighting snr_gamma vlb noise_offset dropout_bert dropout_t5 dropout_joint",
        "schedule": "kind warmup_steps decay_start min_lr",
        "ema": "enabled decay warmup power",
        "validation": "every patience min_epochs",
        "samples": "every prompts seed negative steps cfg guidance_rescale sampler spacing width height",
        "checkpoint": "every keep_last keep_every keep_best export_dtype",
        "metrics": "every",
    }.items()
}
_LONGEST = 20_000
_STEPS = {"subject": 600, "style": 1000, "concept": 1000}
Tables = dict[str, Any]


class Wish(NamedTuple):
    """What the widgets of HyDiTTrainLoRA say."""

    base: Path
    dataset: Path
    trigger: str
    kind: str
    steps: int
    """0: as many as seem right."""
    settings: Tables
    """Of :func:`user_settings`."""


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


def chosen(wish: Wish, folder: Path) -> Tables:
    """The configuration of a training, with what the user typed."""
    from ...hydit_core.weights.bundle import bundle

    defaults = bundle(wish.base, only=("dit",), kinds=("dit",)).info.defaults
    captions = [wish.trigger] if wish.trigger else []
    source = {"path": str(wish.dataset), "kind": "folder", **({"caption": wish.trigger} if captions else {})}
    steps = wish.settings.get("run", {}).get("steps") or wish.steps or _STEPS[wish.kind]
    often = max(1, steps // 5) if isinstance(steps, int) else 1
    mine = {
        "model": {"init_from": str(wish.base)},
        "data": {
            "sources": [source],
            "resolution": max(64, min(defaults.width, defaults.height)),
            "on_unreadable": "skip",
            "cache": {"latents": True, "text": True, "dir": str(folder / "cache")},
        },
        "objective": {"kind": "lora", "timesteps": "stratified", "dropout_joint": 0.1},
        "lora": {"rank": 16, "targets": "attention+mlp", "trigger": wish.trigger},
        "optimizer": {"lr": 1e-3},
        "run": {"output_dir": str(folder), "steps": steps, "batch_size": 4},
        "ema": {"decay": 0.98},
        "samples": {"every": often if captions else 0, "prompts": captions},
        "checkpoint": {"every": often},
        "metrics": {"every": max(1, often // 40)},
    }
    return over(mine, wish.settings)


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
