"""The library stands alone: no ComfyUI in it, and relative imports only (it is loaded under two names)."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from hydit_core.moved import MOVED, RE_EXPORTED

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


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("config", "DiTConfig DiffusionConfig ModelInfo SamplingDefaults DIT_G2_V12"),
        ("data", "DataConfig TrainData open_dataset open_latent_cache canny"),
        ("data.images", "load_picture probe_size to_tensor"),
        ("diffusion", "SAMPLERS Schedule Denoiser"),
        ("generate", "main"),
        ("lora.formats", "read write FORMATS"),
        ("model", "DiT ControlNet sdpa rope_table"),
        ("model.layer_weights", "LayerWeights"),
        ("png", "png_info read_parameters"),
        ("text", "TextEncoders Tokenizers load_text_encoders"),
        ("weights.dtypes", "DTYPES dtype_name"),
        ("weights.load", "open_model save_checkpoint"),
        ("weights.parts", "bundle model_info"),
    ],
)
def test_names_of_the_last_release_are_found_where_they_were(module: str, names: str) -> None:
    former = importlib.import_module(f"hydit_core.{module}")
    for name in names.split():
        with pytest.warns(DeprecationWarning, match=rf"{name} is in hydit_core\..* now"):
            assert getattr(former, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        former.nothing_of_the_kind  # noqa: B018


def test_every_former_name_has_a_home() -> None:
    for former, homes in MOVED.items():
        with pytest.raises(AttributeError):
            importlib.import_module(f"hydit_core.{former}").nothing  # noqa: B018
        assert all(importlib.import_module(f"hydit_core.{home}") for home in homes)
    for names in RE_EXPORTED.values():
        for home, text in names.items():
            assert all(hasattr(importlib.import_module(f"hydit_core.{home}"), name) for name in text.split())


def test_former_names_are_not_looked_for_where_a_module_is_asked_for() -> None:
    """`from package import module` first asks the package for that name."""
    code = (
        "import sys\nfrom hydit_core.model import config\nfrom hydit_core.data import section\n"
        "assert not {'hydit_core.model.dit', 'hydit_core.data.dataset'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], check=True, cwd=ROOT)
