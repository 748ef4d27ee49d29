"""A file to be damaged, and what reads it then; and the writing of such files."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from tiny import write_tiny_model

from hydit_core.data.sources import arrow_table, table_check
from hydit_core.errors import cli_main
from hydit_core.train.config import load_config
from hydit_core.train.launch import open_data

TRAINING = """
[model]
init_from = "{model}"
[data]
resolution = 64
on_unreadable = "skip"
sources = [{{ path = "{source}"{more} }}]
[data.cache]
dir = "cache"
[run]
output_dir = "run"
steps = 2
batch_size = 1
device = "cpu"
[optimizer]
lr = 1e-4
betas = [0.9, 0.99]
[schedule]
warmup_steps = 1
[checkpoint]
every = 1
[model.info]
version = "v1.2"
[model.info.defaults]
steps = 2
"""


@dataclass(frozen=True)
class Seed:
    """``file`` of the folder ``folder`` is damaged; ``arguments`` then run in a copy of that folder."""

    name: str
    folder: Path
    file: str
    door: str  # a module of hydit_core with a main(argv), or `data`: read_data
    arguments: tuple[str, ...]
    knowing: tuple[str, ...] = ()  # the mutations that know this format
    weight: float = 1  # how often, relative to the others

    def prepare(self, into: Path, content: bytes | None = None) -> None:
        """A copy of the folder with ``content`` in place of the file; unchanged files are linked."""
        shutil.copytree(self.folder, into, copy_function=os.link, dirs_exist_ok=True)
        if content is not None:
            (into / self.file).unlink()
            (into / self.file).write_bytes(content)

    def command(self) -> Callable[[], int]:
        main = read_data if self.door == "data" else importlib.import_module(f"hydit_core.{self.door}").main
        arguments = list(self.arguments)
        return lambda: main(arguments)


def read_data(arguments: list[str]) -> int:
    """Gather the data of a configuration and load a batch: the trainer's reading without its model.

    Tables are checked in a fork of this warm process, which starts sooner than the interpreter that the other
    commands start for it.
    """
    arrow_table.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=ForkedTableCheck, PIPE=None, DEVNULL=None
    )

    def read() -> None:
        config = load_config(Path(arguments[0]))
        data = open_data(config)
        print("\n".join(data.summary().lines()))
        data.batch(0)

    return cli_main(read)


class ForkedTableCheck:
    """The part of ``subprocess.Popen`` that check_tables uses, around table_check.main in a forked child."""

    def __init__(self, command: list[str], **_: object) -> None:
        assert command[-1] == table_check.__file__
        asked, ask = os.pipe()
        answers, answer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(ask)
                os.close(answers)
                sys.stdin, sys.stdout = os.fdopen(asked), os.fdopen(answer, "w")
                used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                table_check._MEMORY += used
                table_check.main()
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answer)
        self.stdin, self.stdout = os.fdopen(ask, "w"), os.fdopen(answers)

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)

    def __enter__(self) -> ForkedTableCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        os.waitpid(self._pid, 0)


class SeedWriter:
    """Puts seeds into folders of ``root``, beside a model to read them with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.model = write_tiny_model(root / "tiny.safetensors")
        self.all: list[Seed] = []

    def _folder(self, name: str) -> Path:
        folder = self.root / name
        folder.mkdir()
        return folder

    def _add(
        self, name: str, folder: Path, file: str, module: str, *arguments: str, **options: object
    ) -> None:
        self.all.append(Seed(name, folder, file, module, arguments, **options))  # type: ignore[arg-type]

    def _draw(self, *arguments: str, model: str | None = None) -> tuple[str, ...]:
        settings = (
            "--steps",
            "1",
            "--size",
            "64x64",
            "--device",
            "cpu",
            "--out",
            "out",
            "--prompt",
            "a red apple",
        )
        return ("--model", model or str(self.model), *settings, *arguments)

    def _dry_run(
        self,
        name: str,
        folder: Path,
        file: str,
        source: str,
        knowing: tuple[str, ...],
        more: str = "",
        weight: float = 12,
    ) -> None:
        settings = TRAINING.format(model=self.model, source=source, more=more)
        (folder / "run.toml").write_text(settings)
        dry = ("run.toml", "--dry-run")
        self._add(name, folder, file, "train.__main__", *dry, knowing=knowing, weight=0.5)
        self._add(f"{name}, data alone", folder, file, "data", "run.toml", knowing=knowing, weight=weight)
