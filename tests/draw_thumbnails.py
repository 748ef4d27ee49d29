"""The thumbnails of the shipped workflows, `workflows/*.jpg`: each is what its workflow draws.

    python tests/draw_thumbnails.py                  all of them
    python tests/draw_thumbnails.py NAME ...         only these
    python tests/draw_thumbnails.py --row FILE.png   only a look: all that there are, small, as in a browser

Runs the API copies of `tests/workflows_api` in the ComfyUI that `make test-host` finds, with its Python.
Where a workflow needs published weights, the embedded model draws in their place, see `thumbnails.stand_in`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "workflows"
DRAWING = "HYDIT_DRAWING_THUMBNAILS"
SMALL = 160
"""Side of a thumbnail in the template browser, about."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--row", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="instead of workflows/")
    args = parser.parse_args(arguments)
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no workflow {unknown[0]}; there are {', '.join(known)}")
    if args.row:
        write_row(args.out, args.row)
        return 0
    if DRAWING not in os.environ:
        return _in_comfyui(arguments)
    draw(args.names or known, args.out.resolve())
    return 0


def _in_comfyui(arguments: Sequence[str]) -> int:
    """The same once more, with ComfyUI's Python and what it lacks."""
    from run_host import NoHost, ready

    try:
        comfy, python, _ = ready()
    except NoHost as error:
        print(error, file=sys.stderr)
        return 2
    environment = {**os.environ, DRAWING: "1", "COMFYUI_PATH": str(comfy), "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, __file__, *arguments], env=environment).returncode


def draw(names: Sequence[str], folder: Path) -> None:
    sys.path += [str(HERE), str(HERE / "host")]
    import in_process

    in_process.prepare()
    from workflow_files import api

    host = in_process.start()
    try:
        for name in names:
            path = folder / f"{name}.jpg"
            thumbnail(host, name, api(name)).save(path, quality=90)
            print(path, flush=True)
    finally:
        host.close()


def thumbnail(host: Any, name: str, prompt: dict[str, Any]) -> Any:
    from thumbnails import EXAMPLES, compose, stand_in

    prompt = stand_in(prompt)
    examples = {}
    if name in EXAMPLES:
        text, seed = EXAMPLES[name]
        example = drawn(host, _words_alone(text, seed))["7"][0]
        example.save(host.input_dir / "example.png")
        examples = {n: [example] for n, node in prompt.items() if node["class_type"] == "LoadImage"}
    return compose(name, prompt, {**examples, **drawn(host, prompt)})


def _words_alone(text: str, seed: int) -> Any:
    from graphs import text_to_image

    return text_to_image(text, seed=seed, steps=0, cfg=0)


def drawn(host: Any, prompt: Any) -> dict[str, list[Any]]:
    """Run it; the pictures of each node that shows some."""
    from PIL import Image

    found: dict[str, list[Any]] = {}
    for number, output in host.run(prompt).check().outputs.items():
        if "hydit_train" in output:  # what a node shows of a data set
            continue
        for image in output.get("images", []):
            with Image.open(host.base / image["type"] / image["subfolder"] / image["filename"]) as opened:
                found.setdefault(number, []).append(opened.convert("RGB"))
    return found


def write_row(folder: Path, target: Path) -> None:
    from PIL import Image

    paths = sorted(folder.glob("*.jpg"))
    sheet = Image.new("RGB", (7 * (SMALL + 8), -(-len(paths) // 7) * (SMALL + 8)), "#202020")
    for number, path in enumerate(paths):
        with Image.open(path) as picture:
            small = picture.resize((SMALL, SMALL), Image.Resampling.LANCZOS)
        sheet.paste(small, (4 + number % 7 * (SMALL + 8), 4 + number // 7 * (SMALL + 8)))
    sheet.save(target)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
