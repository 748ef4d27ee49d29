"""``python -m hydit_core.train quick PICTURES``: plan, dry run, training, and what to do with the result."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from pathlib import Path

from ...embedded import embedded_model
from ...errors import ConfigError, HyditError, program
from ...new_files import write_new
from ...untrusted import read_text
from ..config import TrainConfig, load_config
from ..dryrun import describe
from ..launch import held_run, train
from ..objectives.lora import LoraObjective
from ..saving import BEST
from ..stopping import tell
from .choices import FILE
from .plan import ASKED, plan
from .survey import folder_words
from .wish import KINDS, Wish


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=program("train quick"),
        description="Train a LoRA from a folder of pictures. Every number is chosen, and written down with "
        "its reason in RUN/quick.toml. The same command goes on with a run that was interrupted.",
    )
    made.add_argument(
        "pictures", type=Path, metavar="PICTURES", help="a folder, with captions in .txt or not"
    )
    made.add_argument("--trigger", default="", metavar="WORD", help="a word that is to call the LoRA up")
    made.add_argument(
        "--model", type=Path, metavar="MODEL", help="what it is for (default: the embedded one)"
    )
    made.add_argument("--kind", choices=KINDS, default="subject", help="what the pictures have in common")
    made.add_argument("--out", type=Path, metavar="RUN", help="the run's folder (default: runs/NAME)")
    budget = made.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=_count, metavar="N", help="at most so many steps")
    budget.add_argument("--minutes", type=_amount, metavar="N", help="at most so long")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--dry-run", action="store_true", help="show what was chosen; write nothing")
    return made


def _count(text: str) -> int:
    value = int(text)
    if not 0 < value <= 10**7:
        raise argparse.ArgumentTypeError("use a whole number from 1")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e7 or not math.isfinite(value):
        raise argparse.ArgumentTypeError("use a number above 0")
    return value


def main(arguments: list[str]) -> bool:
    """Run the command; True when the training reached its end."""
    options = vars(parser().parse_args(arguments))
    dry_run = options.pop("dry_run")
    wish = Wish(**options)
    config = _going_on(wish)
    if config is None:
        config = _begin(wish, dry_run)
    if dry_run:
        return True
    finished = train(config, resume="auto")
    if finished:
        for line in conclusion(wish, config):
            print(line)
    return finished


def _going_on(wish: Wish) -> TrainConfig | None:
    """The configuration of the run that the folder holds, if the same was asked for; None if it holds none.

    Raises :class:`ConfigError` for another run.
    """
    path = wish.folder / FILE
    if not path.exists():
        if held := held_run(wish.folder):
            raise ConfigError(f"{wish.folder} holds another run ({held}): choose another --out")
        return None
    before, now = asked(path), json.loads(wish.to_json())
    if other := [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]:
        told = ", ".join(f"{name} was {before.get(name, 'not given')}" for name in other)
        raise ConfigError(
            f"{path} was chosen for something else ({told}): ask for the same to go on, choose another "
            f"--out, or change that file and train it: {program('train')} {shlex.quote(str(path))} "
            "--resume auto"
        )
    tell(f"{path} is there already: going on with it")
    return load_config(path)


def asked(path: Path) -> dict[str, object]:
    """What was asked for when a ``quick.toml`` was chosen; empty if it does not say so."""
    marks = [
        line for line in read_text(path, error=ConfigError).splitlines() if line.startswith("# " + ASKED)
    ]
    try:
        found = json.loads(marks[0].removeprefix("# " + ASKED)) if marks and len(marks[0]) < 20_000 else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _begin(wish: Wish, dry_run: bool) -> TrainConfig:
    """Choose, show, and write the configuration down."""
    made = plan(wish)
    for note in made.notes:
        tell(note if note.startswith(" ") else f"note: {note}")
    print(made.toml)
    for line in describe(made.config):
        print(line)
    if not dry_run:
        write_new(made.path, made.toml.encode("utf-8"))
        print(f"written to {made.path}", flush=True)
    return made.config


def result(folder: Path) -> Path:
    """The file of a finished run that is to be used: the best, if there is one, else the newest.

    Raises :class:`HyditError` if there is none.
    """
    names = (BEST, LoraObjective.export_name)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise HyditError(f"{folder}: no LoRA there yet")
    return found


def conclusion(wish: Wish, config: TrainConfig) -> list[str]:
    """Where the LoRA is, and how to draw with it."""
    path = result(config.run.output_dir)
    prompt = config.samples.prompts[0] if config.samples.prompts else wish.trigger
    model = config.model.init_from
    own = [] if model is None or model == embedded_model() else ["--model", shlex.quote(str(model))]
    draw = [program("generate"), *own, "--lora", shlex.quote(str(path)), "--prompt", shlex.quote(prompt)]
    return [
        f"the LoRA: {path}",
        f"  draw with it:   {' '.join(draw)}",
        f"  in ComfyUI:     copy it to models/loras/{folder_words(wish.pictures)}.safetensors",
        f"  how it went:    {program('train')} report {shlex.quote(str(config.run.output_dir))}",
    ]
