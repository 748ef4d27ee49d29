"""What a folder of shards was asked for, in its ``bulk.json``: all that its bytes follow from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...new_files import replacing, unfinished
from ...untrusted import read_json
from ...version import VERSION
from .shards import shard_name

FILE = "bulk.json"
_TRIES = 100
"""More than processes start at the same moment."""
FORMAT = 1
_HASHES = {
    "sha256": "the hash of the prompts' file",
    "dit_sha256": "the hash of the DiT's weights",
    "text_sha256": "the hash of the text encoders' weights",
    "vae_sha256": "the hash of the VAE's weights",
}
_TOLD_ONLY = ("format", "hydit", "places")


@dataclass(frozen=True)
class Asked:
    """What pictures of a folder follow from.

    ``prompts``, ``shards`` and ``options`` are known before a model is loaded: the file of prompts by its
    hash, how it is divided, and what the command line says. ``made_with`` is what that means: settings and
    model. ``places`` are the options that name files, which may lie elsewhere the next time.
    """

    prompts: dict[str, Any]
    shards: dict[str, Any]
    options: dict[str, Any]
    places: dict[str, Any]
    made_with: dict[str, Any] | None = None

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-int(self.prompts["rows"]) // int(self.shards["shard_size"]))

    def name(self, shard: int) -> str:
        """The file name of a shard."""
        return shard_name(shard, self.count)

    def mark(self, shard: int) -> str:
        """What a shard's file begins with."""
        told = {name: value for name, value in self._told().items() if name not in _TOLD_ONLY}
        text = json.dumps(told, sort_keys=True)
        return f"hydit {shard} {hashlib.sha256(text.encode()).hexdigest()}"

    def _told(self) -> dict[str, Any]:
        return {"format": FORMAT, "hydit": VERSION, **vars(self)}

    def write(self, folder: Path) -> None:
        """Note it in ``folder``, unless it is there.

        Processes that start at the same time write the same. Raises :class:`ConfigError` if something else
        is there.
        """
        path = folder / FILE
        if self.noted(folder) is not None:
            return
        text = json.dumps(self._told(), indent=1, ensure_ascii=False) + "\n"
        for left in unfinished(folder, FILE):  # once: others that start now have theirs taken away once each
            left.unlink(missing_ok=True)
        for _ in range(_TRIES):
            try:
                with replacing(path) as temporary:
                    temporary.write_text(text, "utf-8")
                return
            except FileNotFoundError as error:  # another process has taken it for a killed one's
                failed = error
                if self.noted(folder) is not None:
                    return
        raise failed

    def noted(self, folder: Path) -> Asked | None:
        """What ``folder`` holds, if anything, as far as it goes on with this.

        Raises :class:`ConfigError` if it is for other prompts, settings or weights.
        """
        path = folder / FILE
        if not path.exists():
            return None
        told = read_json(path, error=ConfigError)
        for part in ("prompts", "shards", "options", *(["made_with"] if self.made_with else [])):
            self._compare(path, told.get(part), getattr(self, part))
        parts = {field.name: told.get(field.name) for field in fields(Asked)}
        if told.get("format") != FORMAT or not all(isinstance(part, dict) for part in parts.values()):
            raise ConfigError(f"{path} is not of this version; name another folder")
        return Asked(**parts)

    @staticmethod
    def _compare(path: Path, there: Any, asked: dict[str, Any]) -> None:
        there = there if isinstance(there, dict) else {}
        for name in sorted({*there, *asked} - {"rows"}):  # which the hash tells
            if there.get(name) != asked.get(name):
                was, now = _shown(there.get(name)), _shown(asked.get(name))
                raise ConfigError(
                    f"{path.parent} holds pictures of another run: {_HASHES.get(name, name)} is {was} there, "
                    f"{now} now; give the same options to go on with it, or name another folder"
                )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if value is not None else "not given"
    return text if len(text) <= 60 else f"{text[:57]}..."
