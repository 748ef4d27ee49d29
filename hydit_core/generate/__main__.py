"""``python -m hydit_core.generate``: pictures from prompts, as PNG files that remember their parameters."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..diffusion.forecast import tolerance_of
from ..errors import ConfigError, cli_main
from ..new_files import check_name, write_new
from ..pipeline import Picture
from ..presets import check_seed
from ..weights.output import check_free
from . import drawing
from . import image_prompts as image_cli
from . import like as like_cli
from . import memory as memory_cli
from .bulk import options as bulk_cli
from .options import parser, read_prompts

_FOREIGN = {".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code: 0, or 2 after an ``error: ...`` line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser()
    like_cli.add_argument(options)
    args = options.parse_args(argv)
    return cli_main(lambda: _run(args, argv))


def _run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    like = None if args.like is None else like_cli.Like(args.like)
    if like is not None:
        args = like.filled(args, argv)
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch}: use 1 or more")
    check_seed(args.seed, args.batch)
    drawing.check(args)
    bulk_cli.check(args)
    if args.plan:
        args.batch = args.together or args.batch
        files = drawing.open_files(args)
        print("\n".join(memory_cli.plan(args, files.memory)))
        return
    rank, world = _rank()
    if args.shard_size is not None:
        from .bulk.run import run

        run(args, argv, rank, world)
        return
    prompts = read_prompts(args)
    names = _output_names(args, len(prompts) * args.batch)
    mine = range(rank, len(prompts), world)  # of all prompts, what this process draws
    if not mine:
        return
    files = drawing.open_files(args)
    model = drawing.load_model(args, files, quiet=rank != 0)
    job = drawing.Drawing(args, files, model, names.folder)
    own = [prompts[index] for index in mine]
    # Printed once, for the prompts of all ranks
    if rank == 0:
        again = [] if like is None else like.notes(args, model.pipe.title)
        for note in [*again, *job.advice(prompts)]:
            print(f"warning: {note}", file=sys.stderr)

    # None: no bar where stderr is not a terminal.
    took: dict[int, tuple[int, int]] = {}  # by prompt: a batch shares its calls
    with tqdm(total=job.steps * len(own), unit="step", disable=None if rank == 0 else True) as bar:
        for picture in job.pictures(own, callback=lambda *_: bar.update()):
            index = mine[picture.prompt_index]
            path = names.path(index * args.batch + picture.seed - args.seed, index, picture)
            beside = {".txt": f"{picture.prompt}\n".encode()} if args.captions else {}
            overwrite = args.overwrite and names.stem is not None
            path = write_new(path, job.png(picture), beside, overwrite=overwrite)
            bar.clear()
            print(path, flush=True)
            took[index] = picture.real_calls, picture.calls
    if tolerance_of(args.forecast) > 0:
        real, calls = map(sum, zip(*took.values(), strict=True))
        print(f"forecast: {real} of {calls} calls of the network were real", file=sys.stderr)


def _rank() -> tuple[int, int]:
    """This process's number under torchrun, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class _Names:
    """Where pictures go: into a folder under names made from the prompts, or to one named file."""

    def __init__(self, folder: Path, stem: str | None, count: int):
        self.folder = folder
        self.stem = stem
        self.count = count

    def path(self, number: int, index: int, picture: Picture) -> Path:
        """The path of picture ``number`` of the run, for prompt ``index``, both counted from 0."""
        if self.stem is not None:
            return self._named(number)
        words = re.sub(r"\W+", "-", picture.prompt).strip("-")[:40].strip("-")
        return self.folder / f"{index + 1:03d}-{words}-{picture.seed}.png"

    def named(self) -> list[Path]:
        """The pictures whose names are known before drawing."""
        return [self._named(number) for number in range(self.count)] if self.stem is not None else []

    def _named(self, number: int) -> Path:
        return self.folder / (f"{self.stem}.png" if self.count == 1 else f"{self.stem}-{number + 1}.png")


def _nearest(folder: Path) -> Path:
    """The folder itself, or the one in which it is made when the first picture is written.

    Raises :class:`OSError` if it can never be made: its name is too long, or a file is in the way.
    """
    try:
        os.lstat(folder)
    except FileNotFoundError:
        if folder == folder.parent:
            raise
        there = _nearest(folder.parent)
        with contextlib.suppress(FileNotFoundError):
            os.lstat(there / folder.name)
        return there
    return folder


def _output_names(args: argparse.Namespace, count: int) -> _Names:
    """Check, before anything is loaded, that pictures can be written to ``--out``."""
    out = args.out
    suffix = out.suffix.lower()
    if suffix in _FOREIGN:
        raise ConfigError(f"--out {out}: pictures are written as PNG; end the name in .png, or name a folder")
    folder, stem = (out.parent, out.stem) if suffix == ".png" else (out, None)
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot write there: {error.strerror or error}") from error
    if stem is not None and os.path.isdir(out):
        raise ConfigError(f"--out {out}: is a folder")
    names = _Names(folder, stem, count)
    given = (args.init_image, args.inpaint, args.prompts, *args.control_image, *image_cli.inputs(args))
    inputs = [Path(path) for path in given if path is not None]
    for picture in names.named():
        for path in (picture, picture.with_suffix(".txt")) if args.captions else (picture,):
            check_name(path)
            check_free(path, inputs, overwrite=args.overwrite)
    return names


if __name__ == "__main__":
    raise SystemExit(main())
