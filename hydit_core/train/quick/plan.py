"""The plan of a run: its whole configuration, made from a folder of pictures. Nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...data.buckets import bucket_sizes
from ...embedded import embedded_model
from ...errors import printable
from ...model.dit import DiT
from ...untrusted import parse_toml
from ...weights.bundle import bundle
from ...weights.load import load_dit
from ..adapters import find_targets, parameter_shapes
from ..config import TrainConfig, checked
from ..distributed import find_device
from ..memory import estimate, largest
from ..objectives.lora import LoraObjective
from . import choices
from .choices import FILE, Base, Choice, Fit
from .document import document
from .fitting import fit, memory_of
from .survey import Survey, survey
from .wish import Wish

ASKED = "asked: "


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Attributes:
        folder: the run's; the configuration belongs there as ``quick.toml``, and its paths begin there.
        toml: the configuration with the reasons as comments.
        config: the same, checked.
        choices: the same, key by key.
        notes: what the person should know of the pictures before they are trained.
    """

    folder: Path
    toml: str
    config: TrainConfig
    choices: Sequence[Choice]
    notes: Sequence[str]

    @property
    def path(self) -> Path:
        """Where the configuration belongs."""
        return self.folder / FILE


def plan(wish: Wish) -> Plan:
    """Choose everything.

    Raises :class:`HyditError` for pictures or a model from which nothing can be learned.
    """
    device = find_device(wish.device)
    found = survey(wish)
    path = wish.model or embedded_model()
    path = path.resolve() if path.exists() else path  # a name on the hub is no path
    opened = bundle(path, only=("dit",), kinds=("dit",))
    dit, info = load_dit(opened, **LoraObjective.base_options())
    base = Base(path, dit.config, info)
    first = [
        *choices.model_choices(base),
        *choices.data_choices(wish, found, base),
        *choices.training_choices(wish, found, base),
    ]
    batch, free = choices.batch_size(len(found)), memory_of(device)
    step, fits = fit(batch, device, free, partial(_bytes_of, wish, found, dit, first))
    chosen = [
        *first,
        *choices.run_choices(wish, found, step),
        *choices.sample_choices(wish, found, base),
    ]
    head = [
        "Chosen by `python -m hydit_core.train quick` for these pictures. To change something, change it",
        f"here, and train it: python -m hydit_core.train {FILE} --resume auto",
        ASKED + wish.to_json(),
    ]
    text = document(head, chosen)
    config = _checked(text, wish.folder)
    notes = list(_notes(wish, found, base))
    if not fits:
        notes.append(f"a step {step.reason}; it may end with too little memory")
    return Plan(wish.folder, text, config, chosen, notes)


def _checked(text: str, folder: Path) -> TrainConfig:
    return checked(parse_toml(text, FILE), folder / FILE)


def _bytes_of(wish: Wish, found: Survey, dit: DiT, first: list[Choice], way: dict[str, Any]) -> int:
    """What a step takes when it is made in one of :func:`.fitting.candidates`'s ways."""
    step = Fit(way["batch"], 1, way["precision"], way["checkpointing"], way.get("base_precision"), "")
    text = document([], [*first, *choices.run_choices(wish, found, step)])
    config = _checked(text, wish.folder)
    trained = parameter_shapes(find_targets({"dit": dit}, config.lora), config.lora)
    size = largest(bucket_sizes(config.data))
    frozen = LoraObjective.frozen_bytes(config, dit)
    return estimate(config, trained, set(), frozen, dit.config, size).total


def _notes(wish: Wish, found: Survey, base: Base) -> Sequence[str]:
    notes = list(found.findings.passed_over.lines())
    count = len(found)
    if count == 1:
        notes.append("one picture only: the LoRA will draw this very picture; five or more are better")
    if found.uncaptioned and found.captions:
        names = ", ".join(Path(name).name for name in found.uncaptioned_shown)
        notes.append(
            f"{found.uncaptioned} of {count} pictures have no caption, while others have one: {names}"
            + (", ..." if found.uncaptioned > len(found.uncaptioned_shown) else "")
        )
    if found.unreadable:
        notes += [
            f"{found.unreadable} pictures cannot be read and are left out:",
            *(f"  {line}" for line in found.unreadable_shown),
        ]
    if not wish.trigger and not found.captions:
        notes.append("no trigger: the LoRA changes what the folder's name means to the model")
    small = int((found.sizes.min(1) < base.side / 2).sum())
    if small:
        notes.append(f"{small} pictures are less than half as large as they are trained ({base.side})")
    return [printable(note) for note in notes]
