"""What lies in a folder of pictures, as far as it decides how they are trained."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.config import DataConfig
from ...data.gathering import Findings
from ...data.prepared import FEW, gather_few
from ...errors import ConfigError, DataError
from .wish import Wish

_GENERIC = re.compile(
    r"(my|the|new|pictures?|pics?|images?|imgs?|photos?|data(set)?s?|train(ing)?|input|folder|samples?|files?|"
    r"downloads?|untitled|图片|照片|素材|训练|数据集?|[\W\d_])*",
    re.IGNORECASE,
)
"""Names of folders that say nothing of what the pictures show."""
_REPEATS = re.compile(r"\d+_(?=\D)")
"""What kohya's scripts want folders to begin with."""


@dataclass(frozen=True)
class Survey:
    """The pictures of a folder.

    Attributes:
        sizes: (n, 2) width and height of each that can be read.
        captions: their captions, each once.
        caption_lines: whether every line of a caption's file is a caption of its own.
        uncaptioned: how many have no caption of their own.
        uncaptioned_shown: the first of those, by name.
        without_trigger: how many captions do not hold the trigger.
        unreadable, unreadable_shown: the same of those that cannot be read.
    """

    sizes: np.ndarray
    captions: Sequence[str]
    caption_lines: bool
    uncaptioned: int
    uncaptioned_shown: Sequence[str]
    without_trigger: int
    unreadable: int
    unreadable_shown: Sequence[str]
    findings: Findings

    def __len__(self) -> int:
        return len(self.sizes)


def survey(wish: Wish) -> Survey:
    """Look at every picture's header and caption.

    Raises :class:`DataError` where there is nothing to learn from, or captions that are no text.
    """
    folder = wish.pictures
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}: give the folder that the pictures are in")
    config = DataConfig.model_validate(
        {
            "sources": [{"path": folder.resolve(), "kind": "folder", "caption_lines": True}],
            "allow_missing_captions": True,
            "on_unreadable": "skip",
        }
    )
    try:
        found = gather_few(config)
    except DataError as error:
        if str(error).startswith("no usable picture"):
            raise DataError(f"{folder}: none of its pictures can be read") from error
        raise
    if found is None:
        raise ConfigError(
            f"{folder} holds more than {FEW:,} pictures: that is no matter of quick; write a configuration "
            "(docs/training.md, Large data)"
        )
    manifest, findings = found
    texts = [record.captions for record in manifest if any(record.captions)]
    # One text of several paragraphs is no list of captions; where every file has several lines, they are.
    lines = bool(texts) and all(len(captions) > 1 for captions in texts)
    each = (text for captions in texts for text in (captions if lines else [" ".join(captions)]))
    captions = list(dict.fromkeys(each))
    trigger = wish.trigger.casefold()
    missing, unreadable = findings.missing_captions, findings.unreadable
    return Survey(
        np.stack([manifest.widths, manifest.heights], 1),
        captions,
        lines,
        missing.count,
        missing.shown,
        sum(trigger not in text.casefold() for text in captions),
        unreadable.count,
        unreadable.shown,
        findings,
    )


def common_caption(wish: Wish) -> str:
    """The caption of pictures that have none: the trigger and the folder's name, if that says something.

    Raises :class:`ConfigError` if neither does.
    """
    name = _REPEATS.sub("", wish.pictures.resolve().name, count=1)
    name = " ".join(re.split(r"[\s_]+", unicodedata.normalize("NFC", name))).strip(" -.")
    if _GENERIC.fullmatch(name) or not name.isprintable():
        name = ""
    if wish.trigger and wish.trigger.casefold() in name.casefold():
        words = name
    else:
        words = f"{wish.trigger} {name}".strip()
    if not words:
        raise ConfigError(
            f"{wish.pictures}: pictures without captions, and the folder's name does not say what they "
            'show: give --trigger "a word", or put a .txt of the same name beside each picture'
        )
    ending = " style"
    return words + ending if wish.kind == "style" and not words.casefold().endswith(ending) else words


def mixed_shapes(sizes: np.ndarray) -> bool:
    """Whether a square would cut off more than a twentieth of a side of some picture."""
    ratios = sizes[:, 0] / sizes[:, 1]
    return bool((np.maximum(ratios, 1 / ratios) > 1.05).any())


def folder_words(path: Path) -> str:
    """The folder's name as a file name: letters, digits and hyphens."""
    words = re.sub(r"[^\w-]+", "-", unicodedata.normalize("NFC", path.resolve().name)).strip("-_")
    return words[:60] or "lora"
