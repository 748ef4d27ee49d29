"""Check the pack with third-party validators, without a network once they are installed.

    python tests/validate.py [--keep FOLDER]

* comfy-import-guard: every name of ComfyUI's that the pack uses exists in the ComfyUI found.
* nodesafe: nothing in the pack looks like malware, except what EXPLAINED lists.
* comfy-lint: every prompt in tests/workflows_api fits the nodes of that ComfyUI with the pack in it.
* comfy-test lint: the page's extension stays in its namespace.

docs/testing.md lists each command for use by hand. tests/find_host.py finds the ComfyUI.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from find_host import ROOT, host_version
from run_host import NoHost, ready

TOOLS = ROOT / ".validators"
PROMPTS = ROOT / "tests" / "workflows_api"

#: Not loaded by ComfyUI; tests start processes, which nodesafe takes for an attack.
LEFT_OUT = ("tests", "benchmarks", "examples", "docs", ".ci", ".git")

#: nodesafe looks for words: it calls every pack malicious that says `model.eval()`. A finding whose title
#: and line match one of these is none; what is left fails.
EXPLAINED = [
    (r"pattern `eval\(`", r"\.eval\(\)"),  # a module's evaluation mode
    (r"pattern `compile\(`", r"\b(re|torch)\.compile\("),
    (r"pattern `ord\(`", r"\w(ord)\(|\bord\(character\)"),  # record(, word(; a character's code
    (r"pattern `globals\(\)\[`", r"globals\(\)\[name\] = value"),  # hydit_core's names, imported on demand
    (r"pattern `importlib.import_module`", r""),
    (r"Dynamic `getattr`", r""),  # settings by name
    (r"high-entropy literal", r""),  # docstrings and formulas
    (r"suspicious identifier '_\w*'", r""),
    (r"typosquat: `pyarrow`", r""),  # it is Apache Arrow's own package
    (r"typosquat: `torchao`", r""),  # it is PyTorch's own package
]

#: Where the files are that a prompt names, by the input that names them.
FILES = {
    "ckpt_name": "checkpoints",
    "model_name": "diffusion_models",
    "unet_name": "diffusion_models",
    "bert_name": "text_encoders",
    "mt5_name": "text_encoders",
    "clip_name": "text_encoders",
    "vae_name": "vae",
    "lora_name": "loras",
    "control_net_name": "controlnet",
    "image": None,  # input
}

#: Started with the host's Python: prints every node's description of a real server.
DESCRIBE = """
import json, sys
sys.path += sys.argv[1:4]
from comfy_server import ComfyServer
server = ComfyServer(name="validate", files=json.loads(sys.argv[5]))
try:
    open(sys.argv[4], "w").write(json.dumps(server.object_info()))
finally:
    server.close()
"""


def tools() -> Path:
    """The folder of the validators' commands, installed if they are not yet."""
    wanted = ROOT / "tests" / "validators.txt"
    stamp = TOOLS / ".wanted"
    bin_folder = TOOLS / ("Scripts" if os.name == "nt" else "bin")
    if not stamp.is_file() or stamp.read_text() != wanted.read_text():
        venv.create(TOOLS, with_pip=True, clear=True)
        pip = [bin_folder / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", wanted], check=True)
        stamp.write_text(wanted.read_text())
    return bin_folder


def copy_pack(target: Path) -> None:
    """The files of the repository that ComfyUI sees."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True,
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        if name and name.split("/")[0] not in LEFT_OUT and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def import_guard(commands: Path, comfy: Path, work: Path) -> bool:
    """The tool wants a git repository of ComfyUI and an installation with our pack alone."""
    history = work / "cache" / "ComfyUI"
    others = ("custom_nodes", "venv", ".venv", "models", "output", "tests", "tests-unit")
    for source in comfy.rglob("*.py"):
        inside = source.relative_to(comfy)
        if inside.parts[0] not in others:
            (history / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, history / inside)
    git = ["git", "-C", history, "-c", "user.name=validate", "-c", "user.email=validate@localhost"]
    for command in ("init --quiet", "add --all --force", "commit --quiet --message=found"):
        subprocess.run([*git, *command.split()], check=True)
    for name in ("main.py", "nodes.py"):
        shutil.copy2(comfy / name, work / name)
    guard = [commands / "comfy-import-guard", "--cache-dir", work / "cache", "--offline", "check"]
    check = ["--comfy-dir", work, "--target", "HEAD", "--no-update", "--strict", "--pack", "hydit"]
    return subprocess.run([*guard, *check]).returncode == 0


def nodesafe(commands: Path, pack: Path) -> bool:
    done = subprocess.run([commands / "nodesafe", "scan", pack, "--format", "json"], capture_output=True)
    findings = json.loads(done.stdout.decode("utf-8"))["findings"]
    left = [finding for finding in findings if not explained(finding)]
    print(f"{len(findings)} findings, {len(left)} of them not explained")
    for finding in left:
        print(f"  {finding['severity']}: {finding['title']} at {finding['file']}:{finding['line']}")
        print(f"    {finding['snippet']}")
    return not left


def explained(finding: dict[str, Any]) -> bool:
    line = finding["snippet"] or ""
    return any(re.search(title, finding["title"]) and re.search(code, line) for title, code in EXPLAINED)


def prompt_files(prompts: list[Path]) -> list[str]:
    """The model and picture files that prompts name, relative to the base directory."""
    named = set()
    for path in prompts:
        for node in json.loads(path.read_text(encoding="utf-8")).values():
            for name, value in node["inputs"].items():
                key = re.sub(r"\d+$", "", name)
                if key not in FILES or not isinstance(value, str) or value.startswith("[embedded]"):
                    continue
                folder = FILES[key]
                if value.endswith("/"):  # a folder, which is offered when it has weights
                    value += "model.safetensors"
                named.add(f"models/{folder}/{value}" if folder else f"input/{value}")
    return sorted(named)


def comfy_lint(commands: Path, python: Path, side: Path, work: Path) -> bool:
    prompts = sorted(PROMPTS.glob("*.json"))
    if not prompts:
        print(f"no prompts in {PROMPTS}")
        return False
    described = work / "object_info.json"
    tests = ROOT / "tests"
    files = json.dumps(prompt_files(prompts))
    subprocess.run([python, "-c", DESCRIBE, tests, tests / "host", side, described, files], check=True)
    lint = [commands / "comfy-lint", "--schema-cache", described, "--strict", "--color", "never", *prompts]
    return subprocess.run(lint).returncode == 0


def page_lint(commands: Path, pack: Path) -> bool:
    # Or it takes the display name, "HunyuanDiT (hydit)", for the namespace.
    config = '[test]\nname = "hydit"\n\n[test.javascript]\nnamespaces = ["hydit"]\n'
    (pack / "comfy-test.toml").write_text(config)
    lint = [commands / "comfy-test", "lint", "--check", "javascript", pack]
    return subprocess.run(lint).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    arguments = parser.parse_args()
    try:
        comfy, python, side = ready()
    except NoHost as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Validating against ComfyUI {host_version(comfy)} at {comfy}", flush=True)
    commands = tools()
    work = (arguments.keep or Path(tempfile.mkdtemp(prefix="hydit-validate-"))).resolve()
    pack = work / "custom_nodes" / "hydit"
    copy_pack(pack)
    checks = {
        "comfy-import-guard": lambda: import_guard(commands, comfy, work),
        "nodesafe": lambda: nodesafe(commands, pack),
        "comfy-lint": lambda: comfy_lint(commands, python, side, work),
        "comfy-test": lambda: page_lint(commands, pack),
    }
    passed = {}
    for name, check in checks.items():
        print(f"== {name}", flush=True)
        passed[name] = check()
    if not arguments.keep:
        shutil.rmtree(work, ignore_errors=True)
    print("\n".join(f"{name}: {'passed' if ok else 'FAILED'}" for name, ok in passed.items()))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
