"""Find the ComfyUI to test with. Uses only the standard library, as it runs before anything is installed.

    python tests/find_host.py          prints the folder; exit status 1 if there is none

The order is: COMFYUI_PATH, the ComfyUI whose custom_nodes folder holds this repository, ~/comfy/ComfyUI.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What ComfyUI itself cannot start without and a Python that is not its own rarely has.
HOST_MODULES = ("torch", "aiohttp", "comfyui_frontend_package")


def is_host(folder: Path) -> bool:
    """Whether `folder` is a ComfyUI checkout."""
    return all((folder / name).is_file() for name in ("main.py", "nodes.py", "folder_paths.py"))


def find_host() -> Path | None:
    """The ComfyUI folder, or None. A COMFYUI_PATH that is none raises SystemExit: it was meant."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        folder = Path(given).expanduser().resolve()
        if not is_host(folder):
            raise SystemExit(f"COMFYUI_PATH is {given}: no ComfyUI there (main.py, nodes.py)")
        return folder
    # Not resolved: a symlink in custom_nodes counts by the folder that it is reached through.
    here = Path(os.environ.get("PWD", ROOT))
    for root in (here, ROOT):
        if root.parent.name == "custom_nodes" and is_host(root.parent.parent):
            return root.parent.parent.resolve()
    folder = Path.home() / "comfy" / "ComfyUI"
    return folder.resolve() if is_host(folder) else None


def host_version(folder: Path) -> str:
    """What the checkout calls itself, such as "0.3.64", or "unknown"."""
    try:
        text = (folder / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    match = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return match[1] if match else "unknown"


def find_python(folder: Path) -> Path | None:
    """The Python of that ComfyUI: COMFYUI_PYTHON, else a venv in it or beside it, else None."""
    given = os.environ.get("COMFYUI_PYTHON")
    if given:
        return Path(given)
    for base in (folder, folder.parent):
        for name in ("venv", ".venv"):
            for path in (base / name / "bin" / "python", base / name / "Scripts" / "python.exe"):
                if path.is_file():
                    return path
    portable = folder.parent / "python_embeded" / "python.exe"
    return portable if portable.is_file() else None


def side_folder() -> Path:
    """Where `make test-host` puts what the tests need and this Python lacks."""
    major, minor = sys.version_info[:2]
    return ROOT / ".host-tests" / f"py{major}{minor}"


def artifacts() -> Path:
    """Where logs and screenshots are kept: HYDIT_SCREENSHOTS, else tests/artifacts."""
    folder = Path(os.environ.get("HYDIT_SCREENSHOTS") or ROOT / "tests" / "artifacts")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def why_not() -> str:
    """Why the tests inside ComfyUI cannot run in this process, or "" when they can."""
    folder = find_host()
    if folder is None:
        return "no ComfyUI found (COMFYUI_PATH, custom_nodes, ~/comfy/ComfyUI)"
    missing = [name for name in HOST_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        return f"this Python is not that of {folder} (no {missing[0]}): use `make test-host`"
    return ""


if __name__ == "__main__":
    found = find_host()
    if found is None:
        raise SystemExit(1)
    print(found)
