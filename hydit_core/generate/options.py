"""The options of ``generate``, also for the commands that take them: :mod:`~.drawing` says what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..diffusion.samplers import SAMPLERS
from ..dtypes import COMPUTE, short_name
from ..errors import ConfigError, program
from ..facts import SPACINGS
from ..images import parse_size
from ..presets import PRESETS
from ..untrusted import read_text
from . import control as control_cli
from . import drawing, retouch
from . import image_prompts as image_cli
from . import lora as lora_cli
from . import memory as memory_cli
from .bulk import options as bulk_cli


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
    image_cli.add_arguments(parser)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="PATH",
        help="file or folder, or hub:ORG/NAME to download it; default: the model that comes with hydit",
    )
    model.add_argument("--text-encoders", metavar="PATH", help="file or folder, if not inside --model")
    model.add_argument(
        "--load-key",
        metavar="KEY",
        help="which weights of a torch file with several: ema, module, distill ...",
    )
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
    bulk_cli.add_arguments(parser)
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


def read_prompts(args: argparse.Namespace) -> list[str]:
    """``--prompt`` and the lines of ``--prompts``. Raises :class:`ConfigError` if there are none."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        lines = read_text(args.prompts, error=ConfigError).splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError("nothing to draw: give --prompt TEXT, or --prompts FILE with one prompt per line")
    for text in prompts:
        drawing.check_text(text)
    return prompts
