"""What the files of several trainers mean alike."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...images import PICTURE_SUFFIXES
from .options import Options

PRECISION: Mapping[str, tuple[Any, str]] = {
    "bf16": ("bf16", ""),
    "bfloat16": ("bf16", ""),
    "fp16": ("bf16", "fp16 is not trained in here"),
    "float16": ("bf16", "fp16 is not trained in here"),
    **dict.fromkeys(("no", "tfloat32"), ("fp32", "")),
    "fp32": ("fp32", ""),
    "float": ("fp32", ""),
    "float32": ("fp32", ""),
}
DTYPES: Mapping[str, tuple[Any, str]] = {
    name: ("fp16" if name in ("fp16", "float16") else ours, "") for name, (ours, _) in PRECISION.items()
}
OPTIMIZERS: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(("adamw", "adam", "pagedadamw", "adamwadv"), ("adamw", "")),
    **dict.fromkeys(("adamw8bit", "adam8bit", "pagedadamw8bit"), ("adamw_8bit", "8-bit states by torchao")),
    **dict.fromkeys(("lion", "lion8bit", "pagedlion8bit"), ("lion", "states of 32 bits")),
    "adafactor": ("adafactor", "with a learning rate of its own: relative steps are off"),
    **dict.fromkeys(("came", "came8bit"), ("came", "")),
    "muon": ("muon", ""),
    **dict.fromkeys(("prodigy", "prodigyplusschedulefree", "prodigyadv"), ("prodigy", "")),
    **dict.fromkeys(
        ("dadaptation", "dadaptadam", "dadaptadampreprint", "dadaptlion"),
        ("prodigy", "it finds the learning rate too, as D-Adaptation's successor"),
    ),
    **dict.fromkeys(("adamwschedulefree", "schedulefreeadamw"), ("schedule_free", "")),
}
SCHEDULES: Mapping[str, tuple[Any, str]] = {
    **dict.fromkeys(("constant", "constantwithwarmup"), ("constant", "")),
    "cosine": ("cosine", ""),
    **dict.fromkeys(("cosinewithrestarts", "cosinewithhardrestarts"), ("cosine", "without restarts")),
    "linear": ("linear", ""),
    **dict.fromkeys(("polynomial", "rex"), ("linear", "the nearest shape")),
}
_MOST = 100_000


def count_pictures(folder: str, base: Path) -> int:
    """How many pictures lie in a folder; 0 if that cannot be told."""
    try:
        with os.scandir(base / folder) as entries:
            return sum(
                Path(entry.name).suffix.lower() in PICTURE_SUFFIXES
                for entry in itertools.islice(entries, _MOST)
            )
    except (OSError, ValueError):
        return 0


def put_steps(
    options: Options, name: str, epochs: float | None, sources: list[dict[str, Any]], base: Path
) -> float:
    """Steps of ``epochs``, by the number of pictures; returns those of one epoch, 0 if they are not known."""
    counts = [
        count_pictures(str(s["path"]), base) * s.get("repeats", 1)
        for s in sources
        if not s.get("prior") and not s.get("validation")
    ]
    batch = _chosen(options, "batch_size", 1) * _chosen(options, "grad_accumulation", 1)
    if not counts or not all(counts) or not isinstance(batch, int) or batch < 1:
        if epochs is not None and ("run", "steps") not in options.choices:
            options.note(name, "the pictures were not found, so that its steps are not known: set run.steps")
        return 0
    each = sum(counts) / batch
    if epochs is not None:
        options.put("run.steps", max(1, round(epochs * each)), f"{name} x {sum(counts)} pictures / {batch}")
    return each


def _chosen(options: Options, key: str, default: int) -> Any:
    choice = options.choices.get(("run", key))
    return default if choice is None else choice.value


def put_warmup(options: Options, name: str, value: float | None) -> None:
    """Warm-up steps, of which a number below 1 is a share of all."""
    if not value:
        return
    steps = _chosen(options, "steps", 0)
    if value >= 1:
        options.put("schedule.warmup_steps", round(value), name)
    elif steps:
        options.put("schedule.warmup_steps", round(value * steps), f"{name} x run.steps")
    else:
        options.note(name, "a share of the steps, which are not known: set schedule.warmup_steps")


def put_text_encoders(options: Options, trained: bool, rate: float | None, origin: str) -> None:
    """Adapters in BERT, with their own learning rate."""
    if not trained or rate == 0:
        return
    options.put("lora.train_bert", True, f"{origin}; mT5 stays as it is, lora.train_t5 = true trains it too")
    choice = options.choices.get(("optimizer", "lr"))
    if rate and choice is not None and choice.value and rate != choice.value:
        groups = [{"match": "bert.*", "lr_scale": round(rate / choice.value, 6)}]
        options.put("optimizer.groups", groups, f"{origin}: {rate:g}")


def without_lr_of_prodigy(options: Options) -> None:
    """What does not go together in our configuration is left out, with a note."""
    name = options.choices.get(("optimizer", "name"))
    if name is not None and name.value == "prodigy" and options.choices.pop(("optimizer", "groups"), None):
        options.notes.append("the text encoder's own learning rate: prodigy finds one for all")
    if name is not None and name.value == "schedule_free":
        dropped = options.choices.get(("schedule", "kind"))
        if dropped is not None and dropped.value != "constant":
            del options.choices["schedule", "kind"]
            options.notes.append(f"{dropped.reason}: schedule_free takes the place of a schedule")
