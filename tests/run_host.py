"""Run tests/host and tests/browser with the Python of a ComfyUI; `make test-host` calls this.

    python tests/run_host.py [pytest arguments]

COMFYUI_PATH     the ComfyUI folder, else the one around this repository, else ~/comfy/ComfyUI
COMFYUI_PYTHON   its Python, else venv or .venv in it or beside it, else the Python that runs this
COMFYUI_BROWSER  the Chromium for tests/browser, else one on PATH

Packages that the tests need and that Python lacks go into .host-tests/ in this repository, in the versions of
constraints.txt and without dependencies: the user's ComfyUI environment is never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from find_host import HOST_MODULES, ROOT, find_host, find_python, host_version

#: Module: package. No torch, transformers and the like: those are the host's own.
NEEDED = {
    "pytest": "pytest",
    "iniconfig": "iniconfig",
    "pluggy": "pluggy",
    "packaging": "packaging",
    "pygments": "pygments",
    "requests": "requests",
    "charset_normalizer": "charset-normalizer",
    "certifi": "certifi",
    "idna": "idna",
    "urllib3": "urllib3",
    "websocket": "websocket-client",
    "playwright": "playwright",
    "greenlet": "greenlet",
    "diffusers": "diffusers",
    "importlib_metadata": "importlib-metadata",
    "zipp": "zipp",
    "regex": "regex",
    "filelock": "filelock",
    # What training takes.
    "peft": "peft",
    "accelerate": "accelerate",
    "psutil": "psutil",
}

ASK = """
import sys
sys.path.pop(0)  # the current folder: ours must not be taken for installed modules
import importlib.util as u, json
has = {name: u.find_spec(name) is not None for name in json.loads(sys.argv[1])}
print(json.dumps({"has": has, "version": list(sys.version_info[:2])}))
"""

#: At the end of the path: what the host has is never replaced by ours.
START = """
import sys
sys.path.append(sys.argv.pop(1))
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
#: The same for a function of ours.
CALL = """
import importlib, os, sys
sys.path += sys.argv.pop(1).split(os.pathsep)
module, function = sys.argv.pop(1).split(":")
getattr(importlib.import_module(module), function)(*sys.argv[1:])
"""


def ask(python: Path) -> tuple[dict[str, bool], str]:
    """Which modules that Python has, and its version as "py311"."""
    names = json.dumps([*NEEDED, *HOST_MODULES])
    told = subprocess.run([python, "-c", ASK, names], check=True, capture_output=True, text=True)
    answer = json.loads(told.stdout)
    return answer["has"], "py{}{}".format(*answer["version"])


def install(python: Path, side: Path, packages: list[str]) -> None:
    """Put packages into the side folder, unless it already holds just these from these constraints."""
    constraints = ROOT / "constraints.txt"
    wanted = hashlib.sha256(constraints.read_bytes() + repr(packages).encode()).hexdigest()
    stamp = side / ".wanted"
    if not packages or (stamp.is_file() and stamp.read_text() == wanted):
        return
    shutil.rmtree(side, ignore_errors=True)
    print(f"Installing into {side}: {' '.join(packages)}", flush=True)
    has_pip = subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0
    pip = [python, "-m", "pip"] if has_pip else [sys.executable, "-m", "pip", "--python", python]
    command = [*pip, "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", side]
    subprocess.run([*command, "-c", constraints, *packages], check=True)
    stamp.write_text(wanted)


class NoHost(Exception):
    """There is none, or not one that can be run."""


def ready() -> tuple[Path, Path, Path]:
    """The ComfyUI folder, its Python and the side folder with what that lacks. Raises NoHost."""
    comfy = find_host()
    if comfy is None:
        raise NoHost(
            "No ComfyUI found to test with. Set COMFYUI_PATH to its folder, or put this repository into its\n"
            "custom_nodes folder, or install it at ~/comfy/ComfyUI. See docs/testing.md."
        )
    python = find_python(comfy) or Path(sys.executable)
    has, tag = ask(python)
    lacking = [name for name in HOST_MODULES if not has[name]]
    if lacking:
        raise NoHost(
            f"{python} cannot run {comfy}: it has no {', '.join(lacking)}. Set COMFYUI_PYTHON to its Python."
        )
    side = ROOT / ".host-tests" / tag
    install(python, side, sorted(package for name, package in NEEDED.items() if not has[name]))
    return comfy, python, side


def call(function: str, *arguments: str) -> int:
    """Call a function, such as "module:name", of these helpers with ComfyUI's Python; returns the status.

    tests, tests/host, tests/browser and what that Python lacks are at the end of its path.
    """
    try:
        comfy, python, side = ready()
    except NoHost as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Using ComfyUI {host_version(comfy)} at {comfy}, Python {python}", flush=True)
    environment = {**os.environ, "COMFYUI_PATH": str(comfy), "OMP_NUM_THREADS": "1"}
    tests = ROOT / "tests"
    paths = os.pathsep.join(map(str, (tests, tests / "host", tests / "browser", side)))
    return subprocess.run([python, "-c", CALL, paths, function, *arguments], env=environment).returncode


def main(arguments: list[str]) -> int:
    try:
        comfy, python, side = ready()
    except NoHost as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Testing with ComfyUI {host_version(comfy)} at {comfy}, Python {python}", flush=True)
    environment = {**os.environ, "COMFYUI_PATH": str(comfy), "OMP_NUM_THREADS": "1"}
    if not any((ROOT / argument.split("::")[0]).exists() for argument in arguments):
        arguments = [*arguments, "tests/host", "tests/browser"]
    return subprocess.run([python, "-c", START, side, *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
