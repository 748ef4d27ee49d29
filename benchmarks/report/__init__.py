"""Shared by the benchmarks: a description of the machine, a call's memory, tables, document sections."""

from __future__ import annotations

import ctypes
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def machine() -> str:
    """One line: processor, memory, threads, operating system, Python and torch."""
    cpu = _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    flags = (_field("/proc/cpuinfo", "flags") or "").split()
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    memory = re.match(r"\d+", _field("/proc/meminfo", "MemTotal") or "")
    parts = [
        cpu + (f" ({', '.join(extensions)})" if extensions else ""),
        f"{int(memory[0]) / 2**20:.0f} GiB" if memory else "",
        f"{torch.get_num_threads()} threads",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    return ", ".join(part for part in parts if part)


def _field(path: str, name: str) -> str | None:
    try:
        match = re.search(rf"^{re.escape(name)}\s*:\s*(.*)$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1].strip() if match else None


def with_peak_memory(call: Callable[[], T]) -> tuple[T, float | None]:
    """The call's result, and by how many bytes this process's memory rose above its start during the call.

    This is the kernel's peak of resident memory (VmHWM), which a process can reset only on Linux; None
    elsewhere. Memory that the allocator keeps from earlier calls would hide what this one needs, so it is
    released first.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return call(), None
    before = _kibibytes("VmRSS")
    result = call()
    return result, 1024.0 * (_kibibytes("VmHWM") - before)


def _kibibytes(name: str) -> int:
    return int((_field("/proc/self/status", name) or "0").split()[0])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned for reading as text too."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def publish(document: Path | None, script: str, title: str, text: str) -> None:
    """Print what ``benchmarks/SCRIPT.py`` found; make it the script's section of ``document``, if given."""
    print(f"\n{text}")
    if document is not None:
        command = f"`python benchmarks/{script}.py {shlex.join(sys.argv[1:])}`"
        write_section(document, script, f"## {title}\n\nMeasured by {command}.\n\n{text}")


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what is between ``<!-- NAME -->`` and ``<!-- /NAME -->`` in a document, or append it."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{start}\n{text.strip()}\n{end}"
    document = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    if start in document and end in document:
        before, rest = document.split(start, 1)
        document = before + section + rest.split(end, 1)[1]
    else:
        document = f"{document.rstrip()}\n\n{section}\n"
    path.write_text(document, encoding="utf-8")
