"""The list of all pictures and captions of a run, in columns."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from ..errors import DataError
from ..images import Size, load_picture, same_shape
from .columns import StringColumn
from .order import hash_int
from .remote import place
from .sources import Entry, PictureFile


@dataclass(frozen=True)
class Record:
    """One picture: ``key`` is its name for people and logs, stable when the data move."""

    key: str
    picture: PictureFile
    captions: tuple[str, ...]
    width: int
    height: int
    extra: dict[str, PictureFile]


@dataclass(frozen=True)
class Look:
    """What a picture's header and its file say: (width, height) as shown, bytes, time of change.

    The last two are 0 where the file was not looked at.
    """

    size: Size
    bytes: int = 0
    changed: int = 0


class Texts(Protocol):
    """A column of texts."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...

    def lengths(self) -> np.ndarray:
        """Length of every text in bytes of UTF-8, (n,) int64."""


class Numbers(Protocol):
    """A column of integers, of which numpy makes an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> int: ...


class Manifest:
    """All records of a run, in columns; indexing makes a :class:`Record`."""

    keys: Texts
    captions: Texts
    """Of all rows, one after the other."""
    _paths: Texts
    _extras: Texts
    """Of each row, what :func:`extra_text` makes of what lies beside its picture."""
    _caption_ends: Numbers
    """Where each row's captions begin; the last item is where they end."""
    _rows: Numbers
    _widths: Numbers
    _heights: Numbers
    _sources: Numbers
    _columns: dict[int, str]
    """Of sources with pictures in tables, in which column."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Record:
        return Record(
            key=self.keys[index],
            picture=self.picture(index),
            captions=tuple(self.caption(index, i) for i in range(self.caption_count(index))),
            width=self._widths[index],
            height=self._heights[index],
            extra=self.extra(index),
        )

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def picture(self, index: int) -> PictureFile:
        """Where the encoded picture is."""
        row = self._rows[index]
        column = self._columns.get(self._sources[index], "") if row >= 0 else ""
        return PictureFile(place(self._paths[index]), row, column)

    def file_end(self, index: int, end: int) -> int:
        """Where the rows end, at the latest at ``end``, whose pictures are in the same file as ``index``'s.

        Files are looked for by leaps, so those of one file have to follow each other.
        """
        path, reach = self._paths[index], 1
        while index + reach < end and self._paths[index + reach] == path:
            index, reach = index + reach, 2 * reach
        rest = range(index + 1, min(index + reach, end))
        return rest.start + bisect_left(rest, True, key=lambda row: self._paths[row] != path)

    def extra(self, index: int) -> dict[str, PictureFile]:
        """What lies beside the picture: ``control``, ``mask``, ``image_prompt``."""
        beside = json.loads(self._extras[index] or "{}")
        return {kind: PictureFile(place(path), row, column) for kind, (path, row, column) in beside.items()}

    def size(self, index: int) -> Size:
        """(width, height) in pixels, as the picture is shown; as its row gives it, if it does."""
        return self._widths[index], self._heights[index]

    def source(self, index: int) -> int:
        """Which of the configured sources a row came from."""
        return int(self._sources[index])

    def load(self, index: int, alpha_color: str) -> tuple[Image.Image, bytes]:
        """The decoded picture, and its file's content.

        Raises :class:`DataError` if it cannot be read, or has another shape than it was chosen by: what a
        row tells of its width and height is believed until then.
        """
        file, told = self.picture(index), self.size(index)
        content = file.read()
        picture = load_picture(content, alpha_color, name=str(file))
        if not same_shape(picture.size, told):
            raise DataError(
                f"{file} is {picture.width}x{picture.height} as it is shown, but was expected to be "
                f"{told[0]}x{told[1]}: correct the width and height in its row, or leave them out (or has it "
                "changed since?)"
            )
        return picture, content

    def caption_count(self, index: int) -> int:
        return self._caption_ends[index + 1] - self._caption_ends[index]

    def caption(self, index: int, which: int) -> str:
        return self.captions[self._caption_ends[index] + which]

    @property
    def widths(self) -> np.ndarray:
        return np.array(self._widths, dtype=np.int64)

    @property
    def heights(self) -> np.ndarray:
        return np.array(self._heights, dtype=np.int64)

    @property
    def sources(self) -> np.ndarray:
        """Index of each row's source in the configuration, (n,)."""
        return np.array(self._sources, dtype=np.int64)


def extra_text(entry: Entry) -> str:
    """Where an entry's control picture and mask are, as a text; empty without any."""
    beside = {kind: (str(file.path), file.row, file.column) for kind, file in entry.extra.items()}
    return json.dumps(beside) if beside else ""


class GatheredManifest(Manifest):
    """Records that this process keeps; :meth:`append` adds one."""

    keys: StringColumn
    captions: StringColumn
    _paths: StringColumn
    _extras: StringColumn
    _caption_ends: array[int]
    _rows: array[int]
    _widths: array[int]
    _heights: array[int]
    _sources: array[int]

    def __init__(self) -> None:
        self.keys, self.captions = StringColumn(), StringColumn()
        self._paths, self._extras = StringColumn(), StringColumn()
        self._caption_ends, self._rows = array("q", [0]), array("q")
        self._widths, self._heights, self._sources = array("i"), array("i"), array("i")
        self._columns = {}

    def append(self, entry: Entry, key: str, look: Look, source: int) -> None:
        """Add a row; ``source`` is the index of the configured source it came from."""
        self.keys.append(key)
        self._paths.append(str(entry.path))
        self._extras.append(extra_text(entry))
        for caption in entry.captions:
            self.captions.append(caption)
        self._caption_ends.append(len(self.captions))
        self._widths.append(look.size[0])
        self._heights.append(look.size[1])
        self._sources.append(source)
        self._rows.append(entry.row)
        if entry.column:
            self._columns[source] = entry.column


def validation_rows(
    manifest: Manifest, validation: int | float, eligible: np.ndarray | None = None
) -> np.ndarray:
    """Rows held out for validation, of those that are ``eligible`` (n,), by default all: (n,) booleans.

    They depend on the pictures' names alone. With a fraction, adding pictures moves none of the
    others; with a count, the pictures with the lowest hashes are taken. Rows of one picture stay together.
    """
    if not validation:
        return np.zeros(len(manifest), dtype=bool)
    names = _strings(manifest.keys)
    hashes = np.array([hash_int("validation", key) for key in names], dtype=np.uint64)
    considered = np.ones(len(hashes), dtype=bool) if eligible is None else eligible
    if isinstance(validation, float):
        held_out = considered & (hashes < np.uint64(int(validation * 2**64)))
    else:
        distinct = np.unique(hashes[considered])
        if validation >= len(distinct):
            raise DataError(f"validation = {validation}, but there are {len(distinct)} pictures in all")
        held_out = considered & (hashes < distinct[validation])
    if held_out.sum() == considered.sum():
        raise DataError(
            f"validation = {validation} holds out all {considered.sum()} pictures, none is left to train"
        )
    return held_out


def _strings(column: Texts) -> Iterator[str]:
    return (column[i] for i in range(len(column)))
