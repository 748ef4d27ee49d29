"""The first pictures of the READMEs, `docs/images/comfyui_*.jpg`: the first workflow in ComfyUI's page.

    python tests/draw_page.py            both languages
    python tests/draw_page.py zh         only this one

Opens it from the template browser, as a newcomer does, and runs it. Needs what `tests/browser` needs.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from run_host import ROOT, call

FOLDER = ROOT / "docs" / "images"
LANGUAGES = ("en", "zh")
WORKFLOW = "hydit_text_to_image_embedded"
SIZE = (1280, 800)


def main(arguments: Sequence[str]) -> int:
    if set(arguments) - set(LANGUAGES):
        print(__doc__, file=sys.stderr)
        return 2
    return call("draw_page:draw", *(arguments or LANGUAGES))


def draw(*languages: str) -> None:
    """Within ComfyUI's Python: write the pictures."""
    from comfy_page import FLAGS, ComfyPage, find_browser
    from comfy_server import ComfyServer
    from PIL import Image
    from playwright.sync_api import sync_playwright
    from workflow_files import read

    nodes = len(read(ROOT / "workflows" / f"{WORKFLOW}.json")["nodes"])
    server = ComfyServer(name="page")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
            for language in languages:
                page = ComfyPage(browser, server, nodes2=False, locale=language)
                page.open_template(WORKFLOW, nodes)
                # What is in the cache runs without previews.
                server.post("/free", {"free_memory": True}).raise_for_status()
                page.queue().check()
                page.page.wait_for_timeout(3000)
                page.settle()
                shot = Image.open(io.BytesIO(page.page.screenshot())).convert("RGB")
                path = FOLDER / f"comfyui_{language}.jpg"
                shot.resize(SIZE, Image.Resampling.LANCZOS).save(path, quality=90)
                print(path, flush=True)
                page.close()
            browser.close()
    finally:
        server.close()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
