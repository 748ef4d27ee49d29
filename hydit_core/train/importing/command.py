"""Reads a file of another trainer, and writes a configuration that this one takes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ...errors import ConfigError, program
from ...new_files import write_new
from ...untrusted import read_json, read_toml
from ..config import TrainConfig
from ..quick.choices import Choice
from ..quick.document import document
from . import aitoolkit, kohya, onetrainer
from .common import without_lr_of_prodigy
from .options import Options, shown

_NEEDED: dict[tuple[str, str], tuple[Any, str]] = {
    ("model", "init_from"): ("MODEL", "the file does not say: a HunyuanDiT, file or folder"),
    ("data", "sources"): ([{"path": "PICTURES"}], "the file does not say: the folder with the pictures"),
    ("run", "output_dir"): ("runs/imported", "the file does not say"),
    ("run", "steps"): (1000, "the file does not say how many; 1000 is a guess"),
    ("run", "batch_size"): (1, "the default of the others"),
}
_ORDER = ("model", "data", "data.buckets", "data.cache", "objective", "lora", "optimizer", "schedule", "ema")


class Imported(NamedTuple):
    """A configuration as TOML, and what of the file has no place in it."""

    toml: str
    notes: list[str]


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=program("train import"),
        description="Make a configuration out of the settings of another trainer: kohya's sd-scripts (TOML), "
        "its GUI (JSON), OneTrainer (JSON), ai-toolkit (YAML). What has no counterpart is named.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="CONFIG.toml",
        help="write it there; default: print it. Nothing is replaced",
    )
    options = parser.parse_args(arguments)
    if options.out is not None and os.path.lexists(options.out):
        raise ConfigError(f"{options.out} exists; choose another name")
    found = convert(options.file)
    if options.out is None:
        print(found.toml, end="")
        return 0
    path = write_new(options.out, found.toml.encode("utf-8"))
    for note in found.notes:
        print(f"note: {note}")
    print(f"written to {path}")
    return 0


def convert(path: Path) -> Imported:
    """The settings of a file as a configuration of ours that holds no wrong value.

    Paths stay as they are written. Raises :class:`ConfigError` for a file of no trainer that is known here.
    """
    trainer, values, read = _recognized(path)
    try:
        options = read(values, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    options.put("objective.kind", "lora", "what it trains")
    if options.choices["objective", "kind"].value != "lora":
        options.choices = {key: c for key, c in options.choices.items() if key[0] != "lora"}
    options.put("ema.enabled", False, f"{trainer} keeps no average unless asked to")
    without_lr_of_prodigy(options)
    for key, (value, why) in _NEEDED.items():
        options.choices.setdefault(key, Choice(*key, value, why))
    _without_faults(options)
    head = [
        f"Made of {path.name}, a file of {trainer}, by {program('train import')}; comments say what of.",
        "model.init_from has to be a HunyuanDiT: a LoRA fits the model that it was trained for.",
        f"Look it over, then: {program('train')} CONFIG.toml --dry-run",
    ]
    if options.notes:
        head += ["", "Without a counterpart:", *(f"  {note}" for note in options.notes)]
    ordered = sorted(options.choices.values(), key=lambda choice: _place(choice.table))
    return Imported(document(head, ordered), options.notes)


def _place(table: str) -> int:
    return _ORDER.index(table) if table in _ORDER else len(_ORDER)


def _recognized(path: Path) -> tuple[str, dict[str, Any], Callable[[dict[str, Any], Path], Options]]:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        values = aitoolkit.parse(path)
    elif suffix == ".json":
        values = read_json(path, error=ConfigError)
    elif suffix == ".toml":
        values = kohya.flat(read_toml(path, error=ConfigError))
    else:
        raise ConfigError(f"{path}: expected settings as .toml, .json or .yaml")
    if aitoolkit.is_job(values):
        return "ai-toolkit", values, aitoolkit.read
    if suffix == ".json" and len(values.keys() & {*onetrainer.MARKS}) > 1:
        return "OneTrainer", values, onetrainer.read
    if values.keys() & {*kohya.MARKS} or kohya.is_dataset(values):
        return "kohya's sd-scripts", values, kohya.read
    raise ConfigError(
        f"{path}: no settings of kohya's sd-scripts, of its GUI, of OneTrainer or of ai-toolkit; it begins "
        f"with {shown(next(iter(values), 'nothing'))}"
    )


def _without_faults(options: Options) -> None:
    """Take out what our configuration does not accept, with a note each; what it needs stays there."""
    for _ in range(len(options.choices) + 1):
        raw: dict[str, Any] = {}
        for (table, key), choice in options.choices.items():
            inner = raw
            for part in table.split("."):
                inner = inner.setdefault(part, {})
            inner[key] = choice.value
        try:
            TrainConfig.model_validate(raw, context={"base": Path()})
        except ValidationError as error:
            fault = error.errors()[0]
            _take_out(
                options, [str(part) for part in fault["loc"]], fault["msg"].removeprefix("Value error, ")
            )
        else:
            return


def _take_out(options: Options, place: list[str], message: str) -> None:
    key = next(
        (
            k
            for k in options.choices
            if place[: len(f"{k[0]}.{k[1]}".split("."))] == f"{k[0]}.{k[1]}".split(".")
        ),
        None,
    )
    if key is None:  # two keys that do not go together: the message names one
        key = next((k for k in options.choices if f"{k[0]}.{k[1]}" in message and k not in _NEEDED), None)
    if key is None:
        inside = [k for k in options.choices if k not in _NEEDED and k[0] == ".".join(place)]
        key = inside[-1] if inside else next(k for k in reversed(options.choices) if k not in _NEEDED)
    choice = options.choices.pop(key)
    options.notes.append(f"{choice.reason}: {'.'.join(key)} = {shown(choice.value)} is left out: {message}")
    if key in _NEEDED:
        options.choices[key] = Choice(*key, *_NEEDED[key])
