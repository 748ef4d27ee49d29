"""A run's losses, from its metrics.jsonl: a table for the terminal and a curve as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..errors import HyditError
from . import RECORDS, metrics

_COLUMNS = ("loss", "mse", "vlb", "val_loss", "val_loss_ema", "grad_norm", "lr")
_CURVES = {"loss": (66, 120, 190), "val_loss": (214, 110, 50), "val_loss_ema": (60, 150, 90)}
_ROWS = 12
_LARGEST = 1e100
_SIZE = (960, 540)
_MARGIN = (70, 30, 20, 50)  # left, top, right, bottom

Points = list[tuple[int, float]]


def is_picture(path: Path) -> bool:
    """Whether a file of that name is a picture, by how it ends."""
    return path.suffix.lower() in Image.registered_extensions()


def table(run: Path) -> str:
    """Losses of a run as lines of text.

    Raises :class:`HyditError` if the folder holds no records.
    """
    series = _series(run)
    last = max(step for points in series.values() for step, _ in points)
    skipped, seconds = (max((v for _, v in series[name]), default=0.0) for name in ("skipped", "seconds"))
    shown = {name: series[name] for name in _COLUMNS}
    footer = f"{last} steps in {seconds / 3600:.2f} h, {skipped:.0f} skipped"
    return "\n".join([*_table(shown, last), footer])


def plot(run: Path, picture: Path) -> None:
    """Write the losses of a run as curves.

    Raises :class:`HyditError` if the folder holds no records, or the picture cannot be written.
    """
    drawn = curves(run)
    try:
        drawn.save(picture)
    except (OSError, ValueError) as error:
        raise HyditError(f"{picture}: cannot be written: {error}") from error


def curves(run: Path) -> Image.Image:
    """The losses of a run as curves.

    Raises :class:`HyditError` if the folder holds no records.
    """
    series = _series(run)
    return _plot({name: series[name] for name in _CURVES if series[name]}, run.name)


def _series(run: Path) -> dict[str, Points]:
    path = run / RECORDS
    records = list(metrics.read(path)) if path.exists() else []
    series = {name: _points(records, name) for name in (*_COLUMNS, "skipped", "seconds")}
    if not series["loss"]:
        raise HyditError(f"{path}: no losses recorded there; give the output_dir of a run")
    return series


def _points(records: Sequence[dict[str, Any]], name: str) -> Points:
    """(step, value) of every record that has a number of that name, of a size that can be summed."""
    found = ((r["step"], r.get(name)) for r in records)
    numbers = ((step, v) for step, v in found if isinstance(v, (int, float)) and not isinstance(v, bool))
    return [(step, float(v)) for step, v in numbers if abs(v) < _LARGEST]


def _table(series: dict[str, Points], last: int) -> list[str]:
    """Means over equal parts of the run; a column that was never recorded is left out."""
    names = [name for name in _COLUMNS if series[name]]
    lines = ["".join(["steps".rjust(17), *(name.rjust(14) for name in names)])]
    rows = min(_ROWS, max(1, last))
    for row in range(rows):
        start, end = row * last // rows, (row + 1) * last // rows
        cells = [f"{start + 1}-{end}".rjust(17)]
        for name in names:
            values = [v for step, v in series[name] if start < step <= end]
            text = f"{sum(values) / len(values):.5g}" if values else "-"
            cells.append(text.rjust(14))
        lines.append("".join(cells))
    return lines


def _plot(curves: dict[str, Points], title: str) -> Image.Image:
    """Curves over steps, losses on a logarithmic axis; the training loss is smoothed."""
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    smooth = {name: _smoothed(points) if name == "loss" else points for name, points in curves.items()}
    every = [v for points in smooth.values() for _, v in points if v > 0]
    low, high = math.log(min(every, default=0.1)), math.log(max(every, default=1.0))
    low, high = low - 0.02, high + 0.02
    end = max(step for points in smooth.values() for step, _ in points) or 1
    left, top, right, bottom = _MARGIN
    width, height = _SIZE[0] - left - right, _SIZE[1] - top - bottom

    def place(step: float, log_value: float) -> tuple[float, float]:
        return left + width * step / end, top + height * (high - log_value) / (high - low)

    for i in range(6):
        level = low + (high - low) * i / 5
        x, y = place(0, level)
        draw.line([(x, y), (left + width, y)], fill=(225, 225, 225))
        draw.text((8, y - 8), f"{math.exp(level):.4g}", fill="black", font=font)
        x, y = place(end * i / 5, low)
        draw.text((x - 12, y + 8), f"{round(end * i / 5)}", fill="black", font=font)
    for number, (name, points) in enumerate(smooth.items()):
        line = [place(step, math.log(v)) for step, v in points if v > 0]
        if len(line) > 1:
            draw.line(line, fill=_CURVES[name], width=2)
        draw.text((left + 130 * number + 10, 8), name, fill=_CURVES[name], font=font)
    draw.text((_SIZE[0] - 20 - 8 * len(title), 8), title, fill="gray", font=font)
    draw.text((left + width // 2 - 20, _SIZE[1] - 22), "steps", fill="black", font=font)
    return image


def _smoothed(points: Points) -> Points:
    """Running means over a fiftieth of the records."""
    window = max(1, len(points) // 50)
    result: Points = []
    total = 0.0
    for index, (step, value) in enumerate(points):
        total += value - (points[index - window][1] if index >= window else 0.0)
        result.append((step, total / min(index + 1, window)))
    return result
