"""Control pictures by a depth-estimation model: what their cache key depends on, and folders without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydit_core.data.config import ControlConfig
from hydit_core.data.control_images import ControlImages, require_maker
from hydit_core.errors import ConfigError, DataError


def images(folder: Path) -> ControlImages:
    return ControlImages(ControlConfig(kind="depth", model=folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "dpt"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("about it")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        ("config.json", True),
        ("model.safetensors", True),
        ("preprocessor_config.json", True),
        ("pytorch_model.bin", True),
        ("README.md", False),
    ],
)
def test_the_recipe_changes_with_what_the_model_is_made_of(folder: Path, file: str, matters: bool) -> None:
    before = images(folder).recipe
    assert before.startswith("depth 1: ") and images(folder).recipe == before
    (folder / file).write_text("{}")
    assert (images(folder).recipe != before) == matters


def test_a_folder_without_a_configuration_is_told(folder: Path) -> None:
    (folder / "config.json").rename(folder / "configuration.json")
    with pytest.raises(
        DataError, match=r"holds no config\.json: give the folder of a depth-estimation model"
    ):
        images(folder).recipe  # noqa: B018


def test_a_folder_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the depth model .*gone: No such file"):
        images(folder / "gone").recipe  # noqa: B018
    with pytest.raises(ConfigError, match=r"data\.control\.model: .*gone is no folder of a depth-estimation"):
        require_maker(ControlConfig(kind="depth", model=folder / "gone"))
    require_maker(ControlConfig(kind="depth", model=folder))


def test_a_folder_that_holds_no_such_model_is_told_when_it_is_used(folder: Path) -> None:
    with pytest.raises(DataError, match=f"cannot load the depth model {folder}: "):
        images(folder)._depth  # noqa: B018
