"""What someone asks for, and nothing else is needed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ...errors import ConfigError, printable

KINDS = ("subject", "style", "concept")
_LONGEST_TRIGGER = 100


@dataclass(frozen=True)
class Wish:
    """A LoRA that someone wants.

    Attributes:
        pictures: a folder.
        trigger: a word that the model does not know, to call the LoRA up; empty: the captions do that.
        model: what it is for, a file, folder or name on the hub; None: the embedded model.
        kind: what the pictures have in common, one of :data:`KINDS`.
        out: the run's folder; None: ``runs/`` and the name of ``pictures``.
        steps, minutes: the most that it may take; None: as many steps as the pictures are worth.
        device: auto, cpu or cuda.

    Raises :class:`ConfigError` for what nobody can mean.
    """

    pictures: Path
    trigger: str = ""
    model: Path | None = None
    kind: str = "subject"
    out: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind {self.kind!r}: use one of {', '.join(KINDS)}")
        object.__setattr__(self, "trigger", self.trigger.strip())
        if self.trigger != printable(self.trigger):
            raise ConfigError(f"trigger {self.trigger!r}: it holds characters that nobody sees or types")
        if len(self.trigger) > _LONGEST_TRIGGER:
            raise ConfigError(
                f"trigger of {len(self.trigger)} characters: use a word or two, at most {_LONGEST_TRIGGER}"
            )
        for name, value in (("steps", self.steps), ("minutes", self.minutes)):
            if value is not None and not 0 < value <= 1e7:
                raise ConfigError(f"{name} {value:g}: use a number above 0")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return (self.out or Path("runs") / (self.pictures.resolve().name or "pictures")).resolve()

    def to_json(self) -> str:
        """What was asked, whole, on one line; without the run's folder, in which this is kept."""
        told = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        told.pop("out", None)
        for name in ("pictures", "model"):
            if name in told:
                told[name] = str(told[name].resolve() if told[name].exists() else told[name])
        return json.dumps(told, ensure_ascii=True, sort_keys=True)
