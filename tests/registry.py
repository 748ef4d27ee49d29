"""Pack, inspect and publish what the ComfyUI registry gets, with comfy-cli in its own environment.

    python tests/registry.py [--out FILE.zip]     comfy node pack and validate; no network
    python tests/registry.py --publish vX.Y.Z     comfy node publish; the token is in COMFY_REGISTRY_TOKEN

Works in a copy of the files that git tracks, whose pyproject.toml also says what only the registry may read.
CONTRIBUTING.md describes how a version is released.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "https://github.com/OWNER/"

#: What ComfyUI must find in the archive, and what it must not.
NEEDED = (
    "__init__.py",
    "pyproject.toml",
    "requirements.txt",
    "LICENSE",
    "NOTICE",
    "hydit_core/assets/hydit-icons-128.safetensors",
    "locales/zh/nodeDefs.json",
    "nodes/__init__.py",
    "subgraphs/Text to Image (HunyuanDiT) · 文生图.json",
    "web/docs/HyDiTKSampler/en.md",
    "workflows/hydit_text_to_image_embedded.json",
)
UNWANTED = ("tests/", "docs/", "examples/", "benchmarks/", ".github/", ".ci/")


def description(pyproject: str) -> str:
    """``pyproject.toml`` as the registry gets it: with the page's range and the icon's address."""
    frontend = _value(pyproject, "comfyui-frontend")
    icon = _value(pyproject, "Icon")
    repository = _value(pyproject, "Repository").removesuffix("/")
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")
    changes = {
        "dependencies = []": f'dependencies = ["comfyui-frontend-package{frontend}"]',
        f'Icon = "{icon}"': f'Icon = "{raw}/v{version(pyproject)}/{icon}"',
    }
    for old, new in changes.items():
        if pyproject.count(f"\n{old}\n") != 1:
            raise SystemExit(f"pyproject.toml: expected one line {old}")
        pyproject = pyproject.replace(f"\n{old}\n", f"\n{new}\n")
    return pyproject


def version(pyproject: str) -> str:
    return _value(pyproject, "version")


def _value(pyproject: str, key: str) -> str:
    found = re.findall(rf'^{re.escape(key)} = "([^"]*)"$', pyproject, re.MULTILINE)
    if len(found) != 1:
        raise SystemExit(f'pyproject.toml: expected one line {key} = "...", found {len(found)}')
    return found[0]


def changes_of(changelog: str, number: str) -> str:
    """The section of one version, or ""."""
    found = re.search(rf"^## \[?{re.escape(number)}\]?(?=\s).*\n((?:(?!## ).*\n?)*)", changelog, re.MULTILINE)
    return found[1].strip() if found else ""


def copy_tracked(target: Path) -> None:
    """A repository of its own with the files that git tracks here, as they are now, and the description."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    file = target / "pyproject.toml"
    file.write_text(description(file.read_text("utf-8")), "utf-8")
    for command in (["init", "--quiet"], ["add", "--all", "--force"]):
        subprocess.run(["git", "-C", target, *command], check=True)


def comfy(folder: Path, *command: str) -> str:
    """Run comfy-cli there, with settings of its own and without telemetry; returns what it printed."""
    program = Path(sys.executable).with_name("comfy.exe" if os.name == "nt" else "comfy")
    with tempfile.TemporaryDirectory() as home:
        settings = {"HOME": home, "USERPROFILE": home, "DO_NOT_TRACK": "1", "PYTHONUTF8": "1"}
        # It asks git for the files' names, and leaves out those that git puts in quotes: the Chinese ones.
        settings |= {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "core.quotePath",
            "GIT_CONFIG_VALUE_0": "false",
        }
        done = subprocess.run(
            [program, "--skip-prompt", "node", *command],
            cwd=folder, env={**os.environ, **settings}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            encoding="utf-8",
        )  # fmt: skip
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"error: comfy node {command[0]} ended with exit code {done.returncode}")
    return done.stdout


def faults(names: list[str]) -> list[str]:
    """What is wrong with an archive of these files."""
    missing = [f"{name} is missing" for name in NEEDED if name not in names]
    unwanted = [folder for folder in UNWANTED if any(name.startswith(folder) for name in names)]
    return missing + [f"{folder} does not belong in it: see .comfyignore" for folder in unwanted]


def check(archive: Path, work: Path) -> list[str]:
    """Unpack the archive, have it validated, and tell what is wrong."""
    from comfy_cli.registry.config_parser import extract_node_configuration

    unpacked = work / "unpacked"
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        opened.extractall(unpacked)
    told = comfy(unpacked, "validate")
    read = extract_node_configuration(str(unpacked / "pyproject.toml"))
    if read is None:
        return ["comfy-cli cannot read pyproject.toml"]
    project = read.project
    wrong = faults(names)
    if "warning" in told.lower():
        wrong.append("comfy node validate warns, see above")
    if project.dependencies:
        wrong.append(f"dependencies: {', '.join(project.dependencies)}")
    for name in ("version", "supported_comfyui_version", "supported_comfyui_frontend_version"):
        if not getattr(project, name):
            wrong.append(f"comfy-cli reads no {name}")
    print(f"{project.name} {project.version}: {len(names)} files, {archive.stat().st_size / 1e6:.1f} MB,")
    print(f"dependencies {project.dependencies}, ComfyUI {project.supported_comfyui_version},", end=" ")
    print(f"page {project.supported_comfyui_frontend_version}, repository {project.urls.repository}")
    return wrong


def unready(tag: str, pyproject: str, changelog: str) -> list[str]:
    """Why this version cannot be published under this tag."""
    number = version(pyproject)
    wrong = []
    if tag != f"v{number}":
        wrong.append(f"the tag is {tag}, but pyproject.toml says version {number}: expected v{number}")
    if not changes_of(changelog, number):
        wrong.append(f"CHANGELOG.md says nothing of {number}")
    if _value(pyproject, "Repository").startswith(PLACEHOLDER):
        wrong.append("Repository in pyproject.toml is still the placeholder: give the repository's address")
    if not os.environ.get("COMFY_REGISTRY_TOKEN"):
        wrong.append("COMFY_REGISTRY_TOKEN is not set")
    return wrong


def publish(work: Path, changelog: str) -> None:
    notes = work / "changes.md"
    notes.write_text(changelog, "utf-8")
    token = os.environ["COMFY_REGISTRY_TOKEN"]
    told = comfy(work / "pack", "publish", "--token", token, "--changelog-file", str(notes))
    if "Upload successful" not in told:  # its exit code is 0 all the same
        raise SystemExit("error: the registry has not taken the archive, see above")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep the archive under this name")
    parser.add_argument("--publish", metavar="TAG", help="vX.Y.Z: publish that version")
    arguments = parser.parse_args()
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    wrong = unready(arguments.publish, pyproject, changelog) if arguments.publish else []
    if not wrong:
        with tempfile.TemporaryDirectory(prefix="hydit-registry-") as folder:
            work = Path(folder)
            copy_tracked(work / "pack")
            comfy(work / "pack", "pack")
            archive = work / "pack" / "node.zip"
            wrong = check(archive, work)
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(archive, arguments.out)
            archive.unlink()
            if arguments.publish and not wrong:
                publish(work, changes_of(changelog, version(pyproject)))
    for fault in wrong:
        print(f"error: {fault}", file=sys.stderr)
    return 2 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
