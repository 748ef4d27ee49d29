"""``hydit`` and ``python -m hydit_core``: one command in front of all others."""

from __future__ import annotations

import platform
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata

from .version import VERSION

#: The folder of this package that is run, and what it does.
COMMANDS = {
    "generate": "draw pictures from prompts",
    "train": "train all weights, a ControlNet, a LoRA or an IP-Adapter",
    "weights": "inspect and convert weights",
    "lora": "inspect, convert, merge, combine and extract LoRAs",
    "compare": "settings, files or folders of pictures side by side, with figures",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands with the arguments after its name. Returns, or exits with, its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0 if given else 2
    if given[0] == "--version":
        print(_versions())
        return 0
    if given[0] not in COMMANDS:
        print(f"error: hydit has no command {given[0]!r}, only: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[1:] = given[1:]
    try:
        runpy.run_module(f"{__package__}.{given[0]}", run_name="__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", __package__):
            raise
        extra = given[0] if given[0] in ("train", "compare") else "headless"
        print(
            f"error: hydit {given[0]} needs the package {error.name}, which is not installed. "
            f'In hydit\'s folder: pip install -e ".[{extra}]" -c constraints.txt',
            file=sys.stderr,
        )
        return 2
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hydit COMMAND ...",
            "",
            "HunyuanDiT, text to picture in Chinese and English.",
            "",
            *lines,
            "",
            "hydit COMMAND --help says more; hydit --version prints what a bug report needs.",
        ]
    )


def _versions() -> str:
    """The versions of hydit and of what it uses, from their metadata: importing torch takes seconds."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "diffusers", "peft"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return f"hydit {VERSION}\n{', '.join(found)}, {platform.platform()}"


if __name__ == "__main__":
    sys.exit(main())
