"""A run while it goes on: its numbers, its losses as a curve, its newest sample pictures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import HyditError
from ..images import MAX_SIDE, load_picture
from ..untrusted import parse_json, read_json
from . import RECORDS
from . import checkpoint as checkpoints
from .report import curves
from .saving import CHECKPOINTS

_WIDTH = 640
_SPEED_OVER = 20
_SHARE = 0.05
"""Of the time, at most, that goes into drawing curves of long runs."""


class RunView:
    """A run's folder as it is now and becomes; nothing in it is believed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points: list[tuple[int, float]] = []
        """(step, seconds) of the records."""
        self.loss: float | None = None
        self._read = 0
        self._drawn: tuple[Any, ...] = ()
        self._next = 0.0

    def refresh(self) -> bool:
        """Read what was added; whether anything was."""
        path = self.folder / RECORDS
        try:
            size = path.stat().st_size
            if size < self._read:  # the run went back to a checkpoint
                self.points, self._read = [], 0
            with path.open("rb") as file:
                file.seek(self._read)
                added, end, _ = file.read(size - self._read).rpartition(b"\n")
        except OSError:
            return False
        self._read += len(added) + len(end)
        for line in added.splitlines():
            self._take(line)
        return bool(added)

    def _take(self, line: bytes) -> None:
        try:
            record = parse_json(line, RECORDS, error=HyditError)
        except HyditError:
            return
        step, seconds, loss = (record.get(name) for name in ("step", "seconds", "loss"))
        if _is_number(loss):
            self.loss = float(loss)
        if type(step) is int and 0 <= step < 1 << 53 and _is_number(seconds):
            self.points.append((step, float(seconds)))

    @property
    def step(self) -> int:
        return self.points[-1][0] if self.points else 0

    @property
    def seconds(self) -> float:
        return self.points[-1][1] if self.points else 0.0

    def seconds_left(self, steps: int) -> float | None:
        """How long the rest of ``steps`` takes at the present speed, if that is known."""
        if not self.points:
            return None
        (first, since), (last, until) = self.points[-_SPEED_OVER:][0], self.points[-1]
        return None if last <= first else max(0, steps - last) * max(0.0, until - since) / (last - first)

    def progress(self, steps: int | None, seconds: float = 0) -> str:
        """One line: how far it is, its loss, how long it will take, of so many steps or seconds."""
        told = [f"step {self.step}" + (f" of {steps}" if steps else "")]
        if self.loss is not None:
            told.append(f"loss {self.loss:.4f}")
        left = self.seconds_left(steps) if steps else max(0.0, seconds - self.seconds) if seconds else None
        if left:
            told.append(f"{duration(left)} left")
        return ", ".join(told)

    def sheets(self) -> list[Path]:
        """The sheets of sample pictures, the newest last."""
        found = (self.folder / "samples").glob("step_*.png")
        return sorted(path for path in found if path.stem.removeprefix("step_").isdecimal())

    def curve(self) -> Image.Image | None:
        """The losses so far."""
        try:
            return curves(self.folder)
        except HyditError:  # no losses yet
            return None

    def sheet(self) -> Image.Image | None:
        """The newest sheet that is complete."""
        for path in reversed(self.sheets()[-2:]):
            try:
                return load_picture(path)
            except HyditError:
                continue
        return None

    def preview(self) -> Image.Image | None:
        """Curve and newest samples in one picture, if there is something new to see since the last time."""
        now = time.monotonic()
        sheets = self.sheets()
        state = (self.step, sheets[-1:])
        if state == self._drawn or now < self._next:
            return None
        picture = stacked([self.curve(), self.sheet()])
        if picture is None:
            return None
        self._drawn = state
        self._next = time.monotonic() + max(1.0, (time.monotonic() - now) / _SHARE)
        return picture


def planned_steps(folder: Path) -> int | None:
    """How many steps a run is to have, as its newest checkpoint says; None as long as there is none."""
    for path in checkpoints.listing(folder / CHECKPOINTS):
        try:
            steps = read_json(path / "state.json")["config"]["run"]["steps"]
        except (HyditError, KeyError, TypeError):
            continue
        if type(steps) is int and 0 < steps < 1 << 53:
            return steps
    return None


def blank() -> Image.Image:
    """What stands for a picture that there is not."""
    return Image.new("RGB", (64, 64))


def stacked(pictures: list[Image.Image | None]) -> Image.Image | None:
    """Pictures of one width below each other; None where there is none."""
    there = [picture for picture in pictures if picture is not None]
    scaled = [
        picture.resize((_WIDTH, max(1, min(MAX_SIDE, round(picture.height * _WIDTH / picture.width)))))
        for picture in there
    ]
    if not scaled:
        return None
    sheet = Image.new("RGB", (_WIDTH, sum(picture.height for picture in scaled)), "white")
    top = 0
    for picture in scaled:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def duration(seconds: float) -> str:
    """12 s, 3 min, 2 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100
