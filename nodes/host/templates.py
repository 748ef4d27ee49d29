"""The folder ``workflows`` in ComfyUI's template browser."""

from __future__ import annotations

from pathlib import Path

from server import PromptServer

PACK = Path(__file__).parents[2]


def serve_workflows() -> None:
    """Serve ``workflows`` where the page asks for this pack's templates.

    ComfyUI lists the templates of all folders with certain names, but serves only the first such folder:
    ``examples``, which holds trainings, would hide this one. The route that is added first answers.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None and (PACK / "workflows").is_dir():
        server.app.router.add_static(f"/api/workflow_templates/{PACK.name}", PACK / "workflows")
