"""What a comparison leaves: ``compare.json``, ``index.html`` with its further pages, ``sheet.png``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..version import VERSION
from . import blind
from .figures import Result, summary
from .page import write_pages
from .sheet import write_sheet
from .similarity import flip_library
from .store import write_text

FORMAT = 1
JSON, PAGE, SHEET = "compare.json", "index.html", "sheet.png"
_COLUMNS = ("psnr", "psnr_of_mean_mse", "ssim", "haarpsi", "flip")


def check(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds a finished report, before anything is drawn.

    Raises :class:`ConfigError`.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"-o {out}: is a file; name a folder")
    if not overwrite and (
        found := [name for name in (JSON, PAGE, SHEET, blind.SHEET, blind.KEY) if (out / name).exists()]
    ):
        raise ConfigError(
            f"{out / found[0]} exists; choose another -o, or replace the report with --overwrite (pictures "
            "that were drawn with the same settings are kept)"
        )


def write(out: Path, results: Sequence[Result], reference: str, pages_of: int) -> list[Path]:
    """Write everything; returns the files."""
    found = content(results, reference)
    write_text(out / JSON, json.dumps(found, ensure_ascii=False, indent=1))
    pages = write_pages(out / PAGE, results, found, pages_of)
    write_sheet(out / SHEET, results)
    return [out / JSON, *pages, out / SHEET]


def content(results: Sequence[Result], reference: str) -> dict[str, Any]:
    """The JSON report: what was compared, each side's figures, and each pair's."""
    sides = {
        result.name: {"given": result.text, **result.settings, "figures": summary(result)}
        for result in results
    }
    pairs = [
        {
            "side": result.name,
            "picture": pair.name,
            "prompt": pair.prompt,
            "seed": pair.seed,
            "size": list(pair.size),
            "mse": pair.mse,
            **pair.figures,
        }
        for result in results
        for pair in result.pairs
    ]
    return {
        "format": FORMAT,
        "hydit": VERSION,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "reference": reference,
        "flip": flip_library() is not None,
        "sides": sides,
        "pairs": pairs,
    }


def table(results: Sequence[Result], reference: str) -> str:
    """The sides' figures for a terminal."""
    rows = [["side", "calls", "passes", "s/picture", *_COLUMNS, "right", "text"]]
    for result in results:
        found = summary(result)
        row = [f"{result.name}{' (reference)' if result.name == reference else ''}"]
        row += [
            _number(found.get(name), digits) for name, digits in (("calls", 1), ("passes", 1), ("seconds", 3))
        ]
        for name in _COLUMNS:
            one, digits = found.get(name), 1 if name.startswith("psnr") else 4
            values = [] if one is None else [_number(one[part], digits) for part in ("mean", "worst")]
            row.append(" / ".join(values) or "-")
        row.append(f"{found['right']} of {found['judged']}" if "judged" in found else "-")
        row.append(_number(found.get("text_accuracy"), 3))
        rows.append(row)
    keep = [i for i in range(len(rows[0])) if i == 0 or any(row[i] != "-" for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in keep}
    lines = ["  ".join(row[i].ljust(widths[i]) for i in keep).rstrip() for row in rows]
    return "\n".join([*lines, "of each measure: mean / mean of the worst 5 %; seconds: median"])


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
