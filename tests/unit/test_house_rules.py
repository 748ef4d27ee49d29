"""What keeps the library usable from every door: which module may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "hydit_core"
MODULES = sorted(LIBRARY.rglob("*.py"))

# Lower may not import higher. A module or package that is not named here fails the test: give it a place.
LAYERS = {
    "errors": 0,
    "config": 1,
    "presets": 2,
    "png": 2,
    "model": 2,
    "diffusion": 2,
    "weights": 3,
    "text": 3,
    "vae": 3,
    "lora": 3,
    "data": 4,
    "pipeline": 4,
    "generate": 5,
    "train": 5,
}

FOREIGN = ("hydit_core", "comfy", "comfy_api", "nodes", "folder_paths", "execution")


def imports(path: Path):
    """(level, module, names) of each import statement."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def own_part(path: Path) -> str:
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return parts[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports(path):
    depth = len(path.relative_to(LIBRARY).parts)
    for level, module, names in imports(path):
        where = f"{path.name}: from {'.' * level}{module} import {', '.join(names)}"
        top = module.split(".")[0]
        if level == 0:
            # ComfyUI loads the pack under another name; and the library knows nothing of ComfyUI.
            assert top not in FOREIGN, where
            continue
        assert not any(name.startswith("_") and not name.startswith("__") for name in names), where
        assert level <= depth, f"{where}: leaves the library"
        if level < depth or path == LIBRARY / "__init__.py":  # its own part; the public face
            continue
        target = top or names[0]
        assert LAYERS[target] <= LAYERS[own_part(path)], where


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_files_are_never_executed(path):
    """torch.load only with weights_only=True; no eval, exec or pickle.load."""
    source = path.read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler"), name
        if name == "torch.load":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            known = options.get("weights_only") == "True"
            # As `**options`: a dict that the same file writes out.
            assert known or (None in options and '"weights_only": True' in source), f"line {node.lineno}"
