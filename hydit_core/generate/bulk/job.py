"""A command line for many pictures: its rows, what its folder was asked for, and which shards are missing."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ... import locks
from ...errors import ConfigError
from ...presets import check_seed
from .asked import Asked
from .options import TOGETHER
from .rows import Shape
from .shards import is_finished
from .table import Progress, Prompts

# What pictures follow from: values, and files, which may lie elsewhere the next time. Not the device, nor
# --offload, with which pictures are the same.
_VALUES = (
    "negative", "load_key", "dtype", "compile", "preset", "size", "steps", "cfg", "guidance_rescale",
    "sampler", "spacing", "forecast", "cfg_end", "seed", "lora_block_weights", "partial",
)  # fmt: skip
_PLACES = ("model", "text_encoders", "vae", "lora")


class Job:
    """The rows that a command line asks for, and how far its folder is.

    Going through the rows checks them, unless that has been done: the folder tells, or it is known.

    Raises:
        ConfigError: a row cannot be drawn, or the folder is another run's.
    """

    def __init__(
        self, args: argparse.Namespace, progress: Progress | None = None, *, checked: bool = False
    ) -> None:
        self.args = args
        self.folder = Path(args.out)
        self.together = args.together or TOGETHER
        self.skips = args.on_error == "skip"
        self.prompts = Prompts(args.prompts, args.shard_size, args.seed)
        prompts = {"sha256": self.prompts.digest()}
        shards = {
            "shard_size": args.shard_size,
            "together": self.together,
            "on_error": args.on_error or "stop",
        }
        options, places = (
            {name: _plain(getattr(args, name)) for name in names} for names in (_VALUES, _PLACES)
        )
        asked = Asked(prompts, shards, options, places)
        noted = asked.noted(self.folder)
        found = self.prompts.look(skip=self.skips, trusted=checked or noted is not None, progress=progress)
        check_seed(args.seed, found.rows)
        self.rows, self.shapes = found
        kept = noted if noted is not None and noted.places == places else asked
        self.asked = replace(kept, prompts={**prompts, "rows": found.rows})

    def made_with(self, facts: dict[str, Any]) -> None:
        """Tell what the options mean; notes it in the folder.

        Raises :class:`ConfigError` if shards of the folder were drawn otherwise.
        """
        self.asked = replace(self.asked, made_with=json.loads(json.dumps(facts)))  # as it is read again
        self.folder.mkdir(parents=True, exist_ok=True)
        self.asked.write(self.folder)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / self.asked.name(shard)

    def rows_of(self, shard: int) -> int:
        """How many rows a shard has."""
        return min(self.prompts.size, self.rows - shard * self.prompts.size)

    def missing(self, shards: Iterable[int]) -> list[int]:
        """Those of the shards that are not drawn yet.

        Raises :class:`ConfigError` for one that is another run's, or not whole.
        """
        if self.asked.made_with is None:
            return list(shards)  # not known yet what a finished one begins with
        return [shard for shard in shards if not is_finished(self.path(shard), self.asked.mark(shard))]

    def first_shapes(self) -> dict[Shape, str]:
        """Each shape that rows have, and where; empty where bad rows are left out, or were checked before."""
        return {} if self.skips else self.shapes


@contextmanager
def claimed(folder: Path, rank: int) -> Iterator[None]:
    """Be the only process of this rank that draws into ``folder``, which is made.

    Raises :class:`ConfigError` if another one does, or it cannot be written to.
    """
    file = locks.FILE if rank == 0 else f"{locks.FILE}-{rank}"
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locks.hold(folder, lambda name: _in_use(folder, name), file=file):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows removes no file that is open
                    (folder / file).unlink()
                    for place in made:
                        place.rmdir()  # those that hold nothing
    except OSError as error:
        if error.filename is None or not Path(os.fsdecode(error.filename)).is_relative_to(folder):
            raise
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error


def _in_use(folder: Path, name: str) -> str:
    return f"{folder}: another process draws there ({name}); wait until it ends or stop it"


def _plain(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
