"""How much of the text that pictures should show can be read in them, by OCR."""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Reader = Callable[[Path], str]
QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|「([^」]+)」|『([^』]+)』|《([^》]+)》')
MISSING = "rapidocr is not installed, so --ocr is left out; pip install 'hydit[ocr]' brings it"


def reader() -> Reader | None:
    """What reads a picture's text, line by line from the top; None where RapidOCR is not installed.

    Its models are in its wheel: nothing is downloaded.
    """
    try:
        from rapidocr import RapidOCR
    except ImportError:
        return None
    engine: Any = RapidOCR(params={"Global.log_level": "critical"})

    def read(path: Path) -> str:
        from ..images import load_picture

        return "".join(engine(np.asarray(load_picture(path))[:, :, ::-1]).txts or ())

    return read


def expected(prompt: str, given: str) -> str:
    """The text that a picture should show: ``given``, or what stands in quotation marks in its prompt."""
    return given or "".join("".join(groups) for groups in QUOTED.findall(prompt))


def accuracy(wanted: str, read: str) -> float:
    """Character accuracy: 1 minus the edits that make one text of the other, by the length of ``wanted``.

    At least 0. White space does not count, nor the widths that East Asian characters come in.
    """
    a, b = (re.sub(r"\s+", "", unicodedata.normalize("NFKC", text)) for text in (wanted, read))
    return max(0.0, 1 - _edits(a, b) / max(1, len(a)))


def _edits(a: str, b: str) -> int:
    """Insertions, deletions and replacements (Levenshtein 1965)."""
    row = list(range(len(b) + 1))
    for i, one in enumerate(a, 1):
        above, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (one != other)))
    return row[-1]


def mean_accuracy(read: Reader, given: str, pictures: Sequence[tuple[str, Path]]) -> tuple[float | None, int]:
    """The mean of all ``(prompt, picture)`` with a text to show (None if there are none), and how many."""
    wanted = [(text, path) for prompt, path in pictures if (text := expected(prompt, given))]
    found = [accuracy(text, read(path)) for text, path in wanted]
    return (statistics.fmean(found) if found else None), len(found)
