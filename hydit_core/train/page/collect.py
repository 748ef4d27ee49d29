"""What the page of a run shows, read from its folder, which is believed in nothing."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from ...errors import HyditError
from ...images import MAX_SIDE
from ...pages.render import data_url
from ...untrusted import read_json
from .. import RECORDS, metrics
from .. import checkpoint as checkpoints
from ..config import TrainConfig
from ..saving import CHECKPOINTS
from ..usage import NOTABLE_WAIT

SERIES = (
    *("loss", "val_loss", "val_loss_ema", "val_prior_loss", "val_prior_loss_ema", "lr", "lr_b", "grad_norm"),
    *("data_share", "save_stall", "rss_mib", "device_peak_mib"),
)
MOST_POINTS = 1500
"""A curve is shown by so many points; a point stands for the records of equally many steps."""
MOST_SHEETS = 24
_SHEET_SIDE = 1280
_SHEETS = "step_*.png"
_LARGEST = 1e100
_LONGEST = 300
_BAND = re.compile(r"val_mse_t(\d{1,9})_\d{1,9}(_ema)?")
_MOST_BANDS = 16


def collect(folder: Path) -> dict[str, Any]:
    """A run as JSON: its state, curves, sample sheets, configuration and how to go on.

    Raises :class:`HyditError` if the folder holds no records.
    """
    path = folder / RECORDS
    records = list(metrics.read(path)) if path.is_file() else []
    if not any("loss" in record for record in records):
        raise HyditError(f"{path}: no losses recorded there; give the output_dir of a run")
    state = _newest_state(folder)
    written = state.get("config")
    config = written if isinstance(written, dict) else {}
    step = max(record["step"] for record in records)
    total = _number(_inside(config, "run", "steps"))
    seconds = max((r["seconds"] for r in records if _number(r.get("seconds")) is not None), default=None)
    curves = {name: _curve(records, name) for name in (*SERIES, *_bands(records))}
    curves["speed"] = _thinned(_speeds(records))
    return {
        "name": folder.resolve().name[:_LONGEST],
        "step": step,
        "total": total,
        "seconds": _number(seconds),
        "skipped": max((_number(r.get("skipped")) or 0 for r in records), default=0),
        "curves": {name: curve for name, curve in curves.items() if curve["step"]},
        "best": _best(state, records),
        "sheets": _sheets(folder / "samples"),
        "config": _told(config),
        "warnings": _warnings(state, records),
        "command": _command(folder, step, total),
    }


def _number(value: Any) -> float | None:
    """A finite number of a size that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and abs(value) < _LARGEST else None


def _inside(table: Any, *keys: str) -> Any:
    for key in keys:
        table = table.get(key) if isinstance(table, dict) else None
    return table


def _curve(records: Sequence[dict[str, Any]], name: str) -> dict[str, list[float]]:
    points = ((record["step"], _number(record.get(name))) for record in records)
    return _thinned([(step, value) for step, value in points if value is not None])


def _bands(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the losses by timestep, of the averaged weights where there are any, from little noise on."""
    found = {name: match for record in records for name in record if (match := _BAND.fullmatch(name))}
    averaged = any(match[2] for match in found.values())
    names = [name for name, match in found.items() if bool(match[2]) == averaged]
    return sorted(names, key=lambda name: int(found[name][1]))[:_MOST_BANDS]


def _speeds(records: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Seconds a step from one record to the next."""
    found: list[tuple[int, float]] = []
    before: tuple[int, float] | None = None
    for record in records:
        seconds = _number(record.get("seconds"))
        if seconds is None:
            continue
        if before is not None and record["step"] > before[0] and seconds >= before[1]:
            found.append((record["step"], (seconds - before[1]) / (record["step"] - before[0])))
        before = record["step"], seconds
    return found


def _thinned(points: Sequence[tuple[int, float]]) -> dict[str, list[float]]:
    """Means, least and largest values of at most :data:`MOST_POINTS` stretches."""
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    curve: dict[str, list[float]] = {"step": [], "mean": [], "low": [], "high": []}
    for start in range(0, len(points), size):
        part = points[start : start + size]
        values = [value for _, value in part]
        curve["step"].append(part[-1][0])
        curve["mean"].append(sum(values) / len(values))
        curve["low"].append(min(values))
        curve["high"].append(max(values))
    return curve


def _best(state: dict[str, Any], records: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """Step and loss of the best validation: the run's own choice, else the lowest that was recorded."""
    kept = _inside(state, "progress", "best")
    step, loss = _number(_inside(kept, "step")), _number(_inside(kept, "val_loss"))
    if step is not None and loss is not None:
        return {"step": step, "loss": loss}
    found = [
        (loss, record["step"])
        for record in records
        if record["step"]
        and (loss := _number(record.get("val_loss_ema", record.get("val_loss")))) is not None
    ]
    return {"step": min(found)[1], "loss": min(found)[0]} if found else None


def _newest_state(folder: Path) -> dict[str, Any]:
    """What state.json of the newest checkpoint that can be read says."""
    for path in checkpoints.listing(folder / CHECKPOINTS):
        try:
            return read_json(path / "state.json")
        except HyditError:
            continue
    return {}


def _sheets(folder: Path) -> list[dict[str, Any]]:
    """Sample sheets, the first, the last and as many between as a page carries."""
    paths = sorted(path for path in folder.glob(_SHEETS) if path.stem.removeprefix("step_").isdecimal())
    if len(paths) > MOST_SHEETS:
        last = len(paths) - 1
        paths = [paths[round(i * last / (MOST_SHEETS - 1))] for i in range(MOST_SHEETS)]
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                if max(image.size) > MAX_SIDE:
                    continue
                url = data_url(image.convert("RGB"), _SHEET_SIDE)
                size = image.size
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # it is being written
        found.append({"step": int(path.stem.removeprefix("step_")), "url": url, "size": size})
    return found


def _told(written: dict[str, Any]) -> list[dict[str, Any]]:
    """Every key of the configuration with its value, and whether it differs from the default."""
    try:
        config = TrainConfig.model_validate(written, context={"base": Path()})
    except (ValidationError, TypeError):
        return [{"key": key, "value": value, "own": True} for key, value in _flat(written)]
    own = dict(_flat(config.model_dump(mode="json", exclude_defaults=True)))
    return [
        {"key": key, "value": value, "own": key in own}
        for key, value in _flat(config.model_dump(mode="json"))
    ]


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in table.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found.append((f"{prefix}{key}"[:_LONGEST], text[:_LONGEST]))
    return found


def _warnings(state: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the page should say first, as a word of words.json and its numbers."""
    found: list[dict[str, Any]] = []
    trouble = _inside(state, "progress", "health", "trouble")
    if isinstance(trouble, str) and trouble:
        found.append({"say": "trouble", "what": trouble[:_LONGEST]})
    skipped = max((_number(r.get("skipped")) or 0 for r in records), default=0)
    if skipped:
        found.append({"say": "skipped", "what": f"{skipped:g}"})
    unreadable = max((_number(r.get("unreadable")) or 0 for r in records), default=0)
    if unreadable:
        found.append({"say": "unreadable", "what": f"{unreadable:g}"})
    shares = [share for r in records if (share := _number(r.get("data_share"))) is not None]
    if shares and shares[-1] >= NOTABLE_WAIT:
        found.append({"say": "waits", "what": f"{min(shares[-1], 1):.0%}"})
    return found


def _command(folder: Path, step: int, total: float | None) -> str:
    if total is not None and step >= total:
        return f"python -m hydit_core.train CONFIG.toml --resume {shlex.quote(str(folder))} --set run.steps=N"
    return f"python -m hydit_core.train CONFIG.toml --resume {shlex.quote(str(folder))}"
