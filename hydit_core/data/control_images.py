"""Control pictures: edges, depth or ready-made ones, for a picture that was already cropped and flipped."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConfigError, DataError
from ..images import Geometry, Size, canny, check_shape, load_control, load_picture, opencv
from ..quiet import quiet_imports
from .cache.fingerprints import file_hash
from .config import ControlConfig
from .manifest import Manifest
from .sources import PictureFile


def require_maker(config: ControlConfig) -> None:
    """Raise :class:`ConfigError` when what makes these control pictures is not there."""
    if config.kind == "canny":
        opencv()
    if config.model is not None and not config.model.is_dir():
        raise ConfigError(f"data.control.model: {config.model} is no folder of a depth-estimation model")


class ControlImages:
    """Makes the control pictures of a run, as configured. Can be pickled to worker processes."""

    def __init__(self, config: ControlConfig, *, alpha_color: str = "white") -> None:
        self.config = config
        self.alpha_color = alpha_color

    @property
    def from_files(self) -> bool:
        """Whether control pictures are read; else they are made from the pictures themselves."""
        return self.config.kind == "files"

    def file(self, manifest: Manifest, row: int) -> PictureFile:
        """The file that the control picture of a row depends on."""
        if not self.from_files:
            return manifest.picture(row)
        return manifest.extra(row)["control"]

    @cached_property
    def recipe(self) -> str:
        """Part of the key of cached control latents: everything but the file and its crop."""
        config = self.config
        if config.kind == "canny":
            return f"canny 1: {config.low} {config.high}"
        if config.kind == "depth":
            assert config.model is not None
            return f"depth 1: {_folder_hash(config.model)}"
        return "files 2: on black"

    def make(self, picture: Image.Image, geometry: Geometry, file: PictureFile) -> Image.Image:
        """The RGB control picture, of the size of ``picture``, which ``geometry`` has been applied to.

        Raises :class:`DataError` naming ``file`` if it is a control picture that cannot be read.
        """
        config = self.config
        if config.kind == "canny":
            return canny(picture, (config.low, config.high))
        if config.kind == "depth":
            return self._depth(picture)["depth"].convert("RGB").resize(picture.size)
        control = load_control(file.read(), name=str(file))
        check_shape(f"control picture {file}", control.size, geometry.original)
        return geometry.apply(control)

    def from_file(self, path: Path, size: Size) -> Image.Image:
        """The control picture of ``size`` for one picture file; the file itself if such are read."""
        picture = load_control(path) if self.from_files else load_picture(path, self.alpha_color)
        geometry = Geometry.cover(picture.size, size)
        return self.make(geometry.apply(picture), geometry, PictureFile(path))

    @cached_property
    def _depth(self) -> Any:
        with quiet_imports():
            from transformers import pipeline

        folder = self.config.model
        assert folder is not None
        try:
            return pipeline("depth-estimation", model=str(folder), device="cpu")
        except Exception as error:  # transformers raises what its many parts raise
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"cannot load the depth model {folder}: {reason}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "alpha_color": self.alpha_color}


def _folder_hash(folder: Path) -> str:
    """Of the weights and settings of a model's folder."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
        if not any(path.name == "config.json" for path in files):
            raise DataError(f"{folder} holds no config.json: give the folder of a depth-estimation model")
        return file_hash("".join(file_hash(path.read_bytes()) for path in files).encode())
    except OSError as error:
        raise DataError(f"cannot read the depth model {folder}: {error.strerror}") from error
