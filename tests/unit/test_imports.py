"""The library stands alone: no ComfyUI in it, and relative imports only (it is loaded under two names)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "hydit_core"
FOREIGN = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "hydit_core"}


def _absolute_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_the_library_imports_neither_the_host_nor_itself_by_name():
    files = list(LIBRARY.rglob("*.py"))
    assert len(files) > 5
    wrong = {
        str(path.relative_to(ROOT)): found for path in files if (found := _absolute_imports(path) & FOREIGN)
    }
    assert not wrong


def test_no_module_reaches_for_a_siblings_private_name():
    wrong = []
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                wrong += [f"{path.relative_to(ROOT)}: {a.name}" for a in node.names if a.name.startswith("_")]
    assert not wrong


def test_importing_the_library_and_the_model_loads_no_heavy_library():
    code = (
        "import sys, hydit_core, hydit_core.model, hydit_core.model.config\n"
        "heavy = {'transformers', 'diffusers', 'peft', 'cv2', 'pyarrow', 'PIL', 'comfy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
