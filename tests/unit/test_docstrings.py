"""References in docstrings and comments name files, classes and functions that exist."""

from __future__ import annotations

import ast
import builtins
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for room in ("hydit_core", "nodes") for path in sorted((ROOT / room).rglob("*.py"))]
REFERENCE = re.compile(r":(?:func|class|data|meth|mod|attr|exc):`~?([.\w]+)`")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _defined(body: list[ast.stmt], attributes: bool = False) -> dict[str, ast.stmt]:
    """What statements define by name; ``attributes``: what a class's methods give ``self``, too."""
    found: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found[statement.name] = statement
            if attributes and not isinstance(statement, ast.ClassDef):
                stores = [n for n in ast.walk(statement) if isinstance(n, ast.Attribute)]
                found |= {n.attr: statement for n in stores if isinstance(n.ctx, ast.Store)}
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            found |= dict.fromkeys(names, statement)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            found |= {(a.asname or a.name).split(".")[0]: statement for a in statement.names}
        elif isinstance(statement, (ast.If, ast.Try)):
            found |= _defined(statement.body, attributes)
    return found


def _file(folder: Path, names: list[str]) -> tuple[Path, list[str]] | None:
    """The module or package that the names lead to, and the names that are left of them."""
    for number, name in enumerate(names):
        if (folder / f"{name}.py").is_file():
            return folder / f"{name}.py", names[number + 1 :]
        if not (folder / name).is_dir():
            return (folder / "__init__.py", names[number:]) if (folder / "__init__.py").is_file() else None
        folder = folder / name
    return folder / "__init__.py", []


def _is_in(names: list[str], body: list[ast.stmt], in_class: bool = False) -> bool:
    if not names:
        return True
    found = _defined(body, attributes=in_class).get(names[0])
    if found is None or len(names) == 1:
        return found is not None
    # An imported name's own attributes belong to another file.
    return not isinstance(found, ast.ClassDef) or _is_in(names[1:], found.body, in_class=True)


def _resolves(path: Path, target: str) -> bool:
    names = target.lstrip(".").split(".")
    if dots := len(target) - len(target.lstrip(".")):
        folder = path.parents[dots - 1]
    elif names[0] in ("hydit_core", "nodes"):
        folder = ROOT
    else:
        return names[0] in _everywhere()
    file = _file(folder, names)
    return file is not None and _is_in(file[1], _tree(file[0]).body)


@cache
def _everywhere() -> set[str]:
    """All names in files and in their classes, imports included: what a bare name may mean."""
    found = set(dir(builtins))
    for path in FILES:
        body = _tree(path).body
        found |= _defined(body).keys()
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                found |= _defined(statement.body, attributes=True).keys()
    return found


def test_references_resolve():
    found = [
        (path, target)
        for path in FILES
        for target in REFERENCE.findall(re.sub(r"\n\s*", "", path.read_text("utf-8")))
    ]
    wrong = [f"{path.relative_to(ROOT)}: {target}" for path, target in found if not _resolves(path, target)]
    assert not wrong, "\n".join(wrong)
    assert sum(target.startswith(".") for _, target in found) > 30


@pytest.mark.parametrize(
    ("target", "right"),
    [
        (".facts.ModelInfo", True),
        (".config.ModelInfo", False),
        (".facts.ModelInfo.published", True),
        (".facts.ModelInfo.unpublished", False),
        (".weights.save.save_checkpoint", True),
        (".weights.save", True),
        (".weights.saver", False),
        (".vae.VAE.downscale", True),
        ("..nodes.host.dit.HostDiT", True),
        ("hydit_core.load", True),
        ("hydit_core.unload", False),
        ("hydit_core.dtypes.HOST", True),
        ("check_settings", True),
        ("check_nothing", False),
    ],
)
def test_a_stale_reference_is_found(target: str, right: bool):
    assert _resolves(ROOT / "hydit_core" / "pipeline.py", target) is right
