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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run_host import ROOT, call

if TYPE_CHECKING:  # only ComfyUI's Python is sure to have it
    from PIL import Image

FOLDER = ROOT / "workflows"
SMALL, ACROSS = 160, 7


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the thumbnails of the shipped workflows.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--row", type=Path, metavar="FILE", help="write all of them, small, into one picture")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="instead of workflows/")
    args = parser.parse_args(arguments)
    known = sorted(path.stem for path in FOLDER.glob("*.json"))
    if unknown := [name for name in args.names if name not in known]:
        parser.error(f"no workflow {unknown[0]}; there are {', '.join(known)}")
    folder = str(args.out.resolve())
    if args.row:
        return call("draw_thumbnails:write_row", folder, str(args.row.resolve()))
    return call("draw_thumbnails:draw", folder, *(args.names or known))


def draw(folder: str, *names: str) -> None:
    """Within ComfyUI's Python: write the thumbnails of these workflows."""
    import in_process

    in_process.prepare()
    from training_graphs import ENVIRONMENT
    from workflow_files import api

    os.environ.update(ENVIRONMENT)  # of what trains
    host = in_process.start()
    (host.models_dir / "loras").mkdir()
    try:
        for name in names:
            path = Path(folder, f"{name}.jpg")
            thumbnail(host, name, api(name)).save(path, quality=90)
            print(path, flush=True)
    finally:
        host.close()


def thumbnail(host: Any, name: str, prompt: dict[str, Any]) -> Image.Image:
    from graphs import text_to_image
    from thumbnails import EXAMPLES, compose, shown, stand_in

    def drawn(graph: Any) -> dict[str, list[Image.Image]]:
        return shown(host, host.run(graph).check())

    prompt = stand_in(prompt)
    pictures = {}
    if name in EXAMPLES:
        text, seed = EXAMPLES[name]
        ((example,),) = drawn(text_to_image(text, seed=seed, steps=0, cfg=0)).values()
        example.save(host.input_dir / "example.png")
        pictures = {n: [example] for n, node in prompt.items() if node["class_type"] == "LoadImage"}
    return compose(name, prompt, {**pictures, **drawn(prompt)})


def write_row(folder: str, target: str) -> None:
    """Within ComfyUI's Python: all thumbnails of a folder, small, in rows."""
    from PIL import Image

    paths = sorted(Path(folder).glob("*.jpg"))
    step = SMALL + 8
    sheet = Image.new("RGB", (ACROSS * step, -(-len(paths) // ACROSS) * step), "#202020")
    for number, path in enumerate(paths):
        with Image.open(path) as picture:
            small = picture.resize((SMALL, SMALL), Image.Resampling.LANCZOS)
        sheet.paste(small, (4 + number % ACROSS * step, 4 + number // ACROSS * step))
    sheet.save(target)


if __name__ == "__main__":
    raise SystemExit(main())
