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
<<<<<<< HEAD
from . import control as control_cli
from . import drawing, retouch
from . import lora as lora_cli
=======
from . import drawing
>>>>>>> c79f365 (Give generate's options a module of their own, and the pages of hydit compare one head)
from . import memory as memory_cli
from .options import parser, read_prompts

_FOREIGN = {".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code: 0, or 2 after an ``error: ...`` line on stderr."""
    args = parser().parse_args(argv)
    return cli_main(lambda: _run(args))


<<<<<<< HEAD
def parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """All options; :mod:`~.drawing` says what they mean."""
    parser = kind(
        prog=program("generate"),
        description="Draw pictures from prompts. Defaults are those that the model's file recommends.",
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("--prompt", action="extend", nargs="+", default=[], metavar="TEXT", help="one or more")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="text file, UTF-8, one prompt per line")
    what.add_argument(
        "--negative",
        metavar="TEXT",
        help="what to steer away from; `tencent`: Tencent's own text",
    )
    what.add_argument("--init-image", type=Path, metavar="FILE", help="start from this picture")
    what.add_argument(
        "--strength",
        type=float,
        default=None,
        help="how far to depart from the picture that it starts from: above 0, up to 1 (default: 0.6; with "
        f"--inpaint 1, with --upscale {retouch.STRENGTH})",
    )
    retouch.add_arguments(parser)
    lora_cli.add_arguments(parser)
    control_cli.add_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH", help="file or folder; default: the model that comes with hydit"
    )
    model.add_argument("--text-encoders", metavar="PATH", help="file or folder, if not inside --model")
    model.add_argument("--vae", metavar="PATH", help="file or folder, if not inside --model")
    model.add_argument(
        "--dtype",
        type=short_name,
        default="auto",
        choices=COMPUTE,
        help="to compute in (default: %(default)s)",
    )
    model.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    memory_cli.add_arguments(model)
    model.add_argument(
        "--compile",
        action="store_true",
        help="let torch compile the blocks: the first step takes a minute or so, the others are faster",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--preset", choices=PRESETS, help="the settings published for a release")
    how.add_argument("--size", type=size, metavar="WxH", help="pixels, multiples of 8")
    how.add_argument("--steps", type=int)
    how.add_argument("--cfg", type=float, help="guidance scale, 1 (off) and up")
    how.add_argument("--guidance-rescale", type=float, help="0 (off) to 1")
    how.add_argument("--sampler", choices=SAMPLERS)
    how.add_argument("--spacing", choices=SPACINGS, help="of the timesteps; default: the sampler's own")
    how.add_argument(
        "--forecast",
        default="off",
        metavar="off|safe|fast|TOLERANCE",
        help="replace calls of the network by forecasts; docs/fast.md says what that costs (default: off)",
    )
    how.add_argument(
        "--cfg-end",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="guide only this share of the steps, from the first on, up to 1 (default: 1)",
    )
    how.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt (default: 0)")
    how.add_argument(
        "--batch", type=int, default=1, help="pictures per prompt, with consecutive seeds (default: 1)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs"), help="folder, or a .png (default: outputs)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the .png that --out names, and its .txt"
    )
    parser.add_argument(
        "--captions",
        action="store_true",
        help="also write each picture's prompt beside it, as .txt, for training on the pictures",
    )
    return parser


def size(text: str) -> tuple[int, int]:
    """An option's WxH."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


=======
>>>>>>> c79f365 (Give generate's options a module of their own, and the pages of hydit compare one head)
def _run(args: argparse.Namespace) -> None:
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch}: use 1 or more")
    check_seed(args.seed, args.batch)
    drawing.check(args)
    if args.plan:
        files = drawing.open_files(args)
        print("\n".join(memory_cli.plan(args, (files.init, files.controlnets))))
        return
    prompts = read_prompts(args)
    names = _output_names(args, len(prompts) * args.batch)
    rank, mine = _share(len(prompts))
    if not mine:
        return
    files = drawing.open_files(args)
    model = drawing.load_model(args, files, quiet=rank != 0)
    job = drawing.Drawing(args, files, model, names.folder)
    own = [prompts[index] for index in mine]
    # Printed once, for the prompts of all ranks
    for note in job.advice(prompts) if rank == 0 else []:
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


def _share(count: int) -> tuple[int, list[int]]:
    """This process's rank, and which of ``count`` prompts it draws under torchrun."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return rank, list(range(rank, count, world))


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
    given = (args.init_image, args.inpaint, args.prompts, *args.control_image)
    inputs = [Path(path) for path in given if path is not None]
    for picture in names.named():
        for path in (picture, picture.with_suffix(".txt")) if args.captions else (picture,):
            check_name(path)
            check_free(path, inputs, overwrite=args.overwrite)
    return names


if __name__ == "__main__":
    raise SystemExit(main())
