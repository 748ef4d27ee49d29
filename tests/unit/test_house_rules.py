"""Which module may import which, and that no file's content is ever executed."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import draw_house
import imports

LIBRARY = Path(__file__).resolve().parents[2] / "hydit_core"

# Lower may not import higher, nor a neighbor on the same floor. A room that is not named here fails the test.
FLOORS = (
    {"errors", "finite", "moved", "quiet", "version"},
    {
        "devices",
        "dtypes",
        "embedded",
        "images",
        "locks",
        "new_files",
        "pages",
        "ray_cluster",
        "tiles",
        "untrusted",
    },
    {"facts", "layer_weights", "model", "offload"},
    {"diffusion", "weights"},
    {"control", "image_prompts", "inpaint", "lora", "pictures", "plan", "presets", "text", "vae"},
    {"data", "pipeline"},
    {"loading"},
    {"__main__", "generate", "train"},
    {"compare"},
)


def modules():
    for path in sorted(LIBRARY.rglob("*.py")):
        source = path.read_text("utf-8")
        yield path.relative_to(LIBRARY), source, list(ast.walk(ast.parse(source)))


def test_imports_go_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"{user} -> {used}"
        for user, used in sorted(imports.arrows())
        if imports.room(user) != imports.room(used) and floor[imports.room(used)] >= floor[imports.room(user)]
    ]
    assert not wrong
    assert len(imports.between_rooms()) > 50
    assert max(imports.floors().values()) <= len(FLOORS) == 9


def test_there_is_no_circle():
    """Not between rooms, nor between files, imports in functions and for types included."""
    assert not imports.circle(imports.between_rooms())
    assert not imports.circle(imports.arrows())


def test_the_picture_of_the_house_is_current():
    assert draw_house.PICTURE.read_text("utf-8") == draw_house.svg(), "run python tests/draw_house.py"


def test_an_arrow_that_follows_from_others_is_not_drawn():
    pairs = {imports.Arrow(*pair) for pair in ("ab", "bc", "ac", "cd", "ad", "ae")}
    assert draw_house.needed(pairs) == {imports.Arrow(*pair) for pair in ("ab", "bc", "cd", "ae")}


def test_a_circle_would_be_found():
    pairs = [imports.Arrow(*pair) for pair in ("ab", "bc", "cd", "db", "ad", "ef")]
    assert imports.circle(pairs) == ["b", "c", "d"]
    assert not imports.circle(pair for pair in pairs if pair != ("d", "b"))


def test_files_are_never_executed():
    """No eval, no exec, and no unpickling but by the reader that imports nothing."""
    readers = []
    for path, source, nodes in modules():
        for node in nodes:
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                forbidden = ("eval", "exec", "torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler")
                assert name not in forbidden, f"{path}, line {node.lineno}: {name}"
            if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
                defined = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                assert {"find_class", "persistent_load"} <= defined and "import_module" not in source
                readers.append(path)
    assert readers == [Path("weights/pickle_reader.py")]


NODES = LIBRARY.parent / "nodes"
# What node files may import by name. ComfyUI's own modules are for nodes/host.
NODES_MAY = {"comfy_api", "torch", *sys.stdlib_module_names}
HOST_MAY = NODES_MAY | {"comfy", "folder_paths", "latent_preview", "server", "safetensors"}


def _imports(path: Path):
    """(dots, module, names) of every import; an import by name has no dots."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def test_nodes_reach_comfyui_through_host_and_the_library_by_relative_imports():
    """nodes -> nodes/host -> hydit_core. The pack has no name that an absolute import could use."""
    seen = 0
    for path in sorted(NODES.rglob("*.py")):
        inner = path.parent != NODES
        for dots, module, names in _imports(path):
            where = f"{path.relative_to(NODES)}: {'.' * dots}{module} {names}"
            first = module.split(".")[0]
            if not dots:
                assert first in (HOST_MAY if inner else NODES_MAY), where
                assert inner or first != "comfy_api" or module == "comfy_api.latest", where
                continue
            # As many dots as folders up to the pack's own: the library; fewer: the files beside.
            library = dots == len(path.relative_to(NODES.parent).parts)
            assert first == "hydit_core" if library else dots == 1, where
            assert not any(name.startswith("_") for name in names), where
            seen += 1
    assert seen > 30


def test_the_pack_has_no_old_style_door():
    """NODE_CLASS_MAPPINGS would make ComfyUI ignore comfy_entrypoint."""
    tree = ast.parse((NODES.parent / "__init__.py").read_text("utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "WEB_DIRECTORY" in names and "NODE_CLASS_MAPPINGS" not in names
    assert {(dots, module) for dots, module, _ in _imports(NODES.parent / "__init__.py")} == {
        (0, "__future__"),
        (0, "importlib.util"),
        (1, "nodes"),
    }


def test_what_comfyui_reads_of_pyproject_is_there():
    content = (LIBRARY.parent / "pyproject.toml").read_text("utf-8")
    icon = re.search(r'^Icon = "(.+)"$', content, re.M)
    assert icon and (LIBRARY.parent / icon[1]).is_file()
    assert re.search(r'^requires-comfyui = ">=0\.3\.64"$', content, re.M)
    assert re.search(r'^PublisherId = "hydit"$', content, re.M)
    # Whatever stands in requirements.txt is installed into ComfyUI's own Python.
    lines = (LIBRARY.parent / "requirements.txt").read_text("utf-8").splitlines()
    assert all(line.startswith("#") for line in lines)
