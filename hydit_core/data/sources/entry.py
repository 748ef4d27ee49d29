"""The row that every source yields, and the place that its picture is read from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import DataError


@dataclass(frozen=True)
class PictureFile:
    """An encoded picture: a file, or with ``row`` >= 0 a cell of an Arrow or Parquet table."""

    path: Path
    row: int = -1
    column: str = ""

    def __str__(self) -> str:
        return str(self.path) if self.row < 0 else f"{self.path}, row {self.row}"

    def read(self) -> bytes:
        """The picture as it is stored. Raises :class:`DataError` naming it if it cannot be read."""
        if self.row >= 0:
            from .columnar import read_cell

            return read_cell(self.path, self.row, self.column)
        try:
            return self.path.read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"cannot read picture {self.path}: no such file") from error
        except (OSError, ValueError) as error:  # ValueError: a zero character in the name
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read picture {self.path}: {reason}") from error


@dataclass(frozen=True)
class Entry:
    """One picture and its captions, before the picture has been looked at.

    ``key`` names the picture within its source, the same wherever the source lies. Width and height
    are 0 unless the source itself tells them. ``hint`` says where a missing caption may be.
    ``extra`` are a control picture (``control``) and a mask (``mask``) that belong to it.
    A picture inside a table has the table's path, and its row and column there.
    """

    key: str
    path: Path
    captions: tuple[str, ...]
    width: int = 0
    height: int = 0
    extra: dict[str, PictureFile] = field(default_factory=dict)
    hint: str = ""
    row: int = -1
    column: str = ""

    @property
    def picture(self) -> PictureFile:
        return PictureFile(self.path, self.row, self.column)

    @property
    def complete(self) -> bool:
        """Whether no picture has to be opened: the size is told, and nothing lies beside it."""
        return bool(self.width and self.height and not self.extra)
