"""The row that every source yields, and the place that its picture is read from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import DataError

TAR = ":tar"
"""The column of a picture in a tar file; its row is the byte where its header begins."""
SHOWN = 5
"""How many files an error or a summary names."""


@dataclass(frozen=True)
class PictureFile:
    """An encoded picture: a file, or with ``row`` >= 0 a cell of an Arrow or Parquet table, or a part of a
    tar file.
    """

    path: Path
    row: int = -1
    column: str = ""

    def __str__(self) -> str:
        if self.row < 0:
            return str(self.path)
        return f"{self.path}, {'byte' if self.in_tar else 'row'} {self.row}"

    @property
    def in_tar(self) -> bool:
        """Whether it is a part of a tar file."""
        return self.column == TAR

    def read(self) -> bytes:
        """The picture as it is stored. Raises :class:`DataError` naming it if it cannot be read."""
        if self.row >= 0 and self.in_tar:
            from .tar_member import read_member

            return read_member(self.path, self.row)
        if self.row >= 0:
            from .arrow_table import read_cell

            return read_cell(self.path, self.row, self.column)
        try:
            return self.path.read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"cannot read picture {self.path}: no such file") from error
        except (OSError, ValueError) as error:  # ValueError: a zero character in the name
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read picture {self.path}: {reason}") from error


@dataclass
class Tally:
    """How many there are of something, and the first few by name."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:  # as Unicode, which names of files need not be
            self.shown.append(name.encode("utf-8", "backslashreplace").decode("utf-8"))

    def extend(self, other: Tally) -> None:
        self.count += other.count
        self.shown = [*self.shown, *other.shown][:SHOWN]

    def lines(self) -> list[str]:
        """The names, one a line, and how many more there are."""
        more = [f"  ... and {self.count - len(self.shown)} more"] if self.count > len(self.shown) else []
        return [*(f"  {name}" for name in self.shown), *more]


@dataclass
class PassedOver:
    """Files of a folder that a run does not use, though whoever put them there may expect it to."""

    unread: Tally = field(default_factory=Tally)
    """Pictures of formats that are not read, and others with a caption beside them."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Their suffixes."""
    alone: Tally = field(default_factory=Tally)
    """Captions without a picture."""
    tables: Tally = field(default_factory=Tally)
    """Tables, which may be what was meant."""

    def extend(self, other: PassedOver) -> None:
        self.unread.extend(other.unread)
        self.kinds.update(other.kinds)
        self.alone.extend(other.alone)
        self.tables.extend(other.tables)

    def hint(self) -> list[str]:
        """Where captions or pictures that are missed in a folder may be."""
        shown = ", ".join(self.tables.shown[:2])
        return [f"There is {shown}: if the captions are in it, give it as the path"] if shown else []

    def lines(self) -> list[str]:
        """The findings, one per line."""
        lines: list[str] = []
        if self.unread.count:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.kinds.most_common(SHOWN))
            more = ", ..." if len(self.kinds) > SHOWN else ""
            lines = [
                f"not read, of other formats: {self.unread.count} ({kinds}{more}); save them as PNG or JPEG",
                *self.unread.lines(),
            ]
        if self.alone.count:
            lines += [f"captions without a picture: {self.alone.count}", *self.alone.lines()]
        return lines


@dataclass(frozen=True)
class Entry:
    """One picture and its captions, before the picture has been looked at.

    ``key`` names the picture within its source, the same wherever the source lies. Width and height
    are 0 unless the source itself tells them. ``hint`` says where a missing caption may be.
    ``extra`` are a control picture (``control``), a mask (``mask``) and a prompt picture (``image_prompt``)
    that belong to it.
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
        """Whether the picture need not be opened: its size is given, and nothing lies beside it."""
        return bool(self.width and self.height and not self.extra)
