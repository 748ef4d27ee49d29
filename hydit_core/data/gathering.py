"""Gathering the pictures and captions of a run from its sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..errors import DataError
from ..images import Size, check_shape, probe_size
from .config import DataConfig, SourceConfig
from .manifest import GatheredManifest, Look, Manifest
from .remote import RemotePath
from .sources import Entry, PassedOver, PictureFile, Tally, base_of, read_part, read_source, source_kind

BESIDE = {"control": "control picture", "mask": "mask"}
"""What errors call the pictures that lie beside a picture and have its shape."""
THREADS = 8
"""That look at pictures: what they wait for is the disk."""
_TOGETHER = 1024


@dataclass
class Findings:
    """What gathering met besides pictures: a count, and the first few names, of each."""

    missing_captions: Tally = field(default_factory=Tally)
    unreadable: Tally = field(default_factory=Tally)
    passed_over: PassedOver = field(default_factory=PassedOver)
    too_small: int = 0
    masks: int = 0
    """Also of pictures that are left out."""
    image_prompts: int = 0
    """Pictures with a prompt picture of their own, also those that are left out."""

    @staticmethod
    def together(parts: Iterable[Findings]) -> Findings:
        """Of several sources, in their order."""
        total = Findings()
        for part in parts:
            total.missing_captions.extend(part.missing_captions)
            total.unreadable.extend(part.unreadable)
            total.passed_over.extend(part.passed_over)
            total.too_small += part.too_small
            total.masks += part.masks
            total.image_prompts += part.image_prompts
        return total

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        kindless = replace(self.passed_over, kinds=Counter())  # of which asdict would count the items
        told = asdict(replace(self, passed_over=kindless))
        told["passed_over"]["kinds"] = dict(self.passed_over.kinds)
        return told

    @staticmethod
    def from_dict(told: dict[str, Any]) -> Findings:
        """From :meth:`to_dict`. Raises what Python does for anything else."""
        passed = told["passed_over"]
        tallies = {name: Tally(**passed[name]) for name in ("unread", "alone", "tables")}
        return Findings(
            Tally(**told["missing_captions"]),
            Tally(**told["unreadable"]),
            PassedOver(kinds=Counter(passed["kinds"]), **tallies),
            int(told["too_small"]),
            int(told["masks"]),
            int(told["image_prompts"]),
        )


class RowSink(Protocol):
    """Takes the rows that are found."""

    def append(self, entry: Entry, key: str, look: Look, source: int) -> None: ...

    def __len__(self) -> int: ...


Known = Callable[[Path, int, int], "Size | None"]
"""The size of a picture that was looked at before, by (path, bytes, time of change)."""


def gather(config: DataConfig) -> tuple[Manifest, Findings]:
    """Read all sources and look at every picture's header. Writes nothing.

    Raises as :func:`gather_into`.
    """
    manifest = GatheredManifest()
    return manifest, Findings.together(gather_into(config, manifest))


def gather_into(config: DataConfig, rows: RowSink, known: Known | None = None) -> list[Findings]:
    """Read all sources, look at every picture's header, and append what is found to ``rows``.

    A row that gives its picture's width and height is believed, and its picture is not opened; nor is one
    whose size is ``known``. Raises :class:`DataError` for missing captions, unless they are allowed, and for
    pictures that are missing or unreadable, unless those are to be skipped; the first few are named.

    Returns:
        what each source holds beside its rows.
    """
    parts = [gather_source(config, number, rows, known) for number in range(len(config.sources))]
    require_usable(config, parts, len(rows))
    return parts


def require_usable(config: DataConfig, parts: list[Findings], rows: int) -> None:
    """Raise :class:`DataError` if ``rows`` are none, or if what was found of the sources is not allowed."""
    findings = Findings.together(parts)
    _raise_findings(config, findings)
    if config.mask is not None and config.mask.kind == "files" and not findings.masks:
        raise DataError(
            "data.mask.kind = 'files', but no picture has a mask: put them into a folder `mask` in the "
            "pictures' folder, under the same names, or name mask_dir or mask_field"
        )
    if config.image_prompt.kind == "files" and not findings.image_prompts:
        raise DataError(
            "data.image_prompt.kind = 'files', but no picture has a prompt picture: put them into a folder "
            "`image_prompt` in the pictures' folder, under the same names, or name image_prompt_dir or "
            "image_prompt_field"
        )
    if rows == 0:
        raise DataError("no usable picture is left: " + ", ".join(str(s.path) for s in config.sources))


def gather_source(config: DataConfig, number: int, rows: RowSink, known: Known | None = None) -> Findings:
    """As :func:`gather_into`, of one source alone; missing captions and unreadable pictures are only told."""
    part, findings = SourcePart(config, number), Findings()
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        for chunk in chunks(read_source(part.source, findings.passed_over)):
            part.look_at(chunk, rows, findings, known, pool)
    part.require_beside(findings)
    return findings


class SourcePart:
    """How a run reads one of its sources, the whole or a part of it: the same in every process.

    Attributes:
        source: with the places of what lies beside its pictures.

    Raises :class:`DataError` if a place that it needs is not there.
    """

    def __init__(self, config: DataConfig, number: int) -> None:
        self.config, self.number = config, number
        source = config.sources[number]
        self._name = source_name(source)
        if config.control is not None and config.control.kind == "files":
            source = _with_control(source)
        if config.mask is not None and config.mask.kind == "files":
            source = _with_mask(source)
        if config.image_prompt.kind == "files":
            source = _with_image_prompts(source)
        self.source = source

    def listed(self, table: Path | None, passed_over: PassedOver) -> Iterator[list[Entry]]:
        """The entries of one of its tables, or of its folder, not looked at yet; many at a time."""
        return chunks(read_part(self.source, table, passed_over))

    def look_at(
        self, chunk: list[Entry], rows: RowSink, findings: Findings, known: Known | None, pool: Executor
    ) -> None:
        """Look at the pictures of entries, in the threads of ``pool``; append those that can be used."""
        looks = pool.map(partial(_look, known=known), [entry for entry in chunk if not entry.complete])
        for entry in chunk:
            found = Look((entry.width, entry.height)) if entry.complete else next(looks)
            _add(rows, findings, self.config, entry, f"{self._name}/{entry.key}", found, self.number)

    def require_beside(self, findings: Findings) -> None:
        """Raise :class:`DataError` if a column that the source names was empty in all of its rows."""
        source = self.source
        if source.mask_field and not findings.masks:
            raise DataError(f"data source {source.path}: no row has a mask in {source.mask_field!r}")
        if source.image_prompt_field and not findings.image_prompts:
            raise DataError(
                f"data source {source.path}: no row has a prompt picture in {source.image_prompt_field!r}"
            )


def _with_control(source: SourceConfig) -> SourceConfig:
    """The source with a place for control pictures; DataError where it can have none."""
    if source_kind(source) == "folder":
        place = source.control_dir or source.path / "control"
        if not place.is_dir():
            raise DataError(
                f"data source {source.path}: no folder {place} with control pictures; name it by "
                "control_dir, or make them from the pictures with data.control.kind = 'canny'"
            )
        return source.model_copy(update={"control_dir": place})
    if source.control_field is None:
        raise DataError(
            f"data source {source.path}: data.control.kind = 'files' needs control_field, the column with "
            "the paths of the control pictures"
        )
    return source


def _with_mask(source: SourceConfig) -> SourceConfig:
    """The source with its place for masks, if it has one; DataError if it names one that is not there."""
    if source_kind(source) != "folder":
        return source
    place = source.mask_dir or source.path / "mask"
    if source.mask_dir is not None and not place.is_dir():
        raise DataError(f"data source {source.path}: its mask_dir {place} is no folder")
    return source.model_copy(update={"mask_dir": place}) if place.is_dir() else source


def _with_image_prompts(source: SourceConfig) -> SourceConfig:
    """The source with its place for prompt pictures, if it has one; DataError if it names one in vain."""
    if source_kind(source) != "folder":
        return source
    place = source.image_prompt_dir or source.path / "image_prompt"
    if source.image_prompt_dir is not None and not place.is_dir():
        raise DataError(f"data source {source.path}: its image_prompt_dir {place} is no folder")
    return source.model_copy(update={"image_prompt_dir": place}) if place.is_dir() else source


def source_name(source: SourceConfig) -> str:
    """What a source's keys begin with: its folder's or file's own name, not where that lies."""
    path = source.path
    if not path.exists():  # a pattern
        path = base_of(source)
    return path.resolve().stem if path.is_file() else path.resolve().name


def chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries by the thousand."""
    iterator = iter(entries)
    while chunk := list(islice(iterator, _TOGETHER)):
        yield chunk


def _look(entry: Entry, known: Known | None = None) -> Look | DataError:
    """What a picture's header says, where its row does not tell its size; or why it cannot be read."""
    try:
        look = Look((entry.width, entry.height)) if entry.width and entry.height else _header(entry, known)
        for kind, beside in entry.extra.items():
            found = _file_size(beside)
            if kind in BESIDE:
                check_shape(f"{BESIDE[kind]} {beside}", found, look.size)
        return look
    except DataError as error:
        return error


def _header(entry: Entry, known: Known | None) -> Look:
    if entry.row >= 0:
        return Look(_file_size(entry.picture))
    try:
        status = entry.path.stat()
        told = status.st_size, status.st_mtime_ns
    except (OSError, ValueError):  # reading it says what is wrong
        told = 0, 0
    size = known(entry.path, *told) if known is not None and any(told) else None
    return Look(size or _file_size(entry.picture), *told)


def _file_size(file: PictureFile) -> Size:
    if file.row < 0 and not isinstance(file.path, RemotePath):
        return probe_size(file.path)
    return probe_size(file.read(), name=str(file))


def _add(
    rows: RowSink,
    findings: Findings,
    config: DataConfig,
    entry: Entry,
    key: str,
    look: Look | DataError,
    source: int,
) -> None:
    own, trigger = config.sources[source].caption, config.sources[source].trigger
    if not entry.captions and own is not None:
        entry = replace(entry, captions=(own,))
    if trigger:
        entry = replace(entry, captions=tuple(_with(trigger, caption) for caption in entry.captions))
    if not entry.captions:
        findings.missing_captions.add(f"{entry.picture}" + (f" ({entry.hint})" if entry.hint else ""))
        entry = replace(entry, captions=(config.empty_caption,))
    findings.masks += "mask" in entry.extra
    findings.image_prompts += "image_prompt" in entry.extra
    if isinstance(look, DataError):
        findings.unreadable.add(str(look))
    elif min(look.size) < config.min_side:
        findings.too_small += 1
    else:
        rows.append(entry, key, look, source)


def _with(trigger: str, caption: str) -> str:
    return caption if trigger.casefold() in caption.casefold() else f"{trigger}, {caption}"


def _raise_findings(config: DataConfig, findings: Findings) -> None:
    missing, unreadable = findings.missing_captions, findings.unreadable
    if missing.count and not config.allow_missing_captions:
        raise DataError(
            f"pictures without a caption: {missing.count}",
            *missing.lines(),
            *findings.passed_over.hint(),
            "Give each a caption, or its source one for all (caption = ...), or set "
            "data.allow_missing_captions = true to train them with data.empty_caption",
        )
    if unreadable.count and config.on_unreadable == "error":
        raise DataError(
            f"pictures that cannot be read: {unreadable.count}",
            *unreadable.lines(),
            "Repair or remove them, or set data.on_unreadable = 'skip' to leave them out",
        )
