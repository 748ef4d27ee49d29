"""Drawing one shard after the other with a model that is loaded once."""

from __future__ import annotations

import copy
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ...errors import ConfigError, HyditError
from ...new_files import replacing, unfinished
from ...presets import check_settings
from .. import drawing
from .job import Job
from .rows import BadRow, Row, Shape
from .shards import note_skipped, write_tar

Progress = Callable[[int], object]
"""Is called with the number of pictures that were drawn since the last call."""


class Done(NamedTuple):
    """What became of a shard's rows. ``cut``: how many prompts were too long, and the place of the first."""

    path: str
    drawn: int
    skipped: int
    cut: int
    first_cut: str


class Drawer:
    """The model of a job.

    Raises :class:`HyditError` for files that cannot be read, and for rows that the model cannot draw.
    """

    def __init__(self, job: Job, *, quiet: bool = False) -> None:
        self.job = job
        args = copy.copy(job.args)
        args.batch = job.together  # what has to fit into memory
        files = drawing.open_files(args)
        model = drawing.load_model(args, files, quiet=quiet)
        self._drawing = drawing.Drawing(job.args, files, model, job.folder)
        if not quiet:
            for note in self._drawing.advice([]):
                print(f"warning: {note}", file=sys.stderr)
        for shape, where in job.first_shapes().items():
            try:
                self._shaped(shape)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        job.made_with(self._made_with())

    def _made_with(self) -> dict[str, Any]:
        from ...data.cache.fingerprints import module_hash

        facts = self._drawing.facts("", 0)
        del facts["prompt"], facts["seed"]
        pipe = self._drawing.pipe
        parts = {"dit": pipe.dit, "text": pipe.text, "vae": pipe.vae}
        return {**facts, **{f"{name}_sha256": module_hash(part) for name, part in parts.items()}}

    def _shaped(self, shape: Shape) -> drawing.Drawing:
        """The drawing of rows of a shape. Raises :class:`ConfigError` where the model cannot."""
        own, pipe = copy.copy(self._drawing), self._drawing.pipe
        given = {name: value for name, value in shape._asdict().items() if value is not None}
        if given:
            sampling = replace(own.run.sampling, **given)
            check_settings(sampling, pipe.vae.downscale, pipe.info)
            pipe.schedule.timesteps(sampling.spacing, sampling.steps)
            own.run = replace(own.run, sampling=sampling)
        return own

    # -- a shard -----------------------------------------------------------------------------------------

    def draw(self, shard: int, progress: Progress | None = None) -> Done:
        """Draw a shard into its file, which appears when it is whole.

        Raises :class:`HyditError` for a row that cannot be drawn, unless such are to be skipped.
        """
        job = self.job
        path, mark = job.path(shard), job.asked.mark(shard)
        rows = job.prompts.shard(shard)
        for left in unfinished(job.folder, path.name):  # of a process that was killed
            left.unlink(missing_ok=True)
        skipped: list[BadRow] = []
        cut: list[str] = []
        try:
            with replacing(path) as temporary:
                write_tar(temporary, mark, self._files(rows, skipped, cut, progress))
                if skipped:
                    note_skipped(path, mark, skipped)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
        return Done(str(path), len(rows) - len(skipped), len(skipped), len(cut), cut[0] if cut else "")

    def _files(
        self,
        rows: Sequence[Row | BadRow],
        skipped: list[BadRow],
        cut: list[str],
        progress: Progress | None,
    ) -> Iterator[tuple[str, bytes]]:
        """The files of a shard, in the order of its rows."""
        if bad := next((row for row in rows if isinstance(row, BadRow) and not self.job.skips), None):
            raise ConfigError(bad.reason)  # the file was changed meanwhile
        waiting: dict[int, list[tuple[str, bytes]] | BadRow] = {
            row.number: row for row in rows if isinstance(row, BadRow)
        }
        order = deque(row.number for row in rows)
        for batch in self._batches(rows):
            waiting |= self._drawn(batch, cut)
            if progress is not None:
                progress(len(batch))
            while order and order[0] in waiting:
                files = waiting.pop(order.popleft())
                if isinstance(files, BadRow):
                    skipped.append(files)
                else:
                    yield from files
        skipped += [row for row in waiting.values() if isinstance(row, BadRow)]
        skipped.sort(key=lambda row: row.number)

    def _batches(self, rows: Sequence[Row | BadRow]) -> list[list[Row]]:
        """Rows of one shape together, in batches that follow from the rows alone, by their first rows."""
        by_shape: dict[Shape, list[Row]] = {}
        for row in rows:
            if isinstance(row, Row):
                by_shape.setdefault(row.shape, []).append(row)
        size = self.job.together
        batches = [some[i : i + size] for some in by_shape.values() for i in range(0, len(some), size)]
        return sorted(batches, key=lambda batch: batch[0].number)

    def _drawn(self, batch: list[Row], cut: list[str]) -> dict[int, list[tuple[str, bytes]] | BadRow]:
        """The files of each row of a batch; of one that cannot be drawn together, one by one."""
        try:
            return dict(self._pictures(batch, cut))
        except HyditError as error:
            if len(batch) > 1:
                return {number: files for row in batch for number, files in self._drawn([row], cut).items()}
            reason = f"{batch[0].where}: {error}"
            if not self.job.skips:
                raise type(error)(reason) from error
            return {batch[0].number: BadRow(batch[0].number, reason)}
        except RuntimeError:  # a GPU's memory, above all
            print(f"while drawing {batch[0].where}, to {batch[-1].where}:", file=sys.stderr)
            raise

    def _pictures(
        self, batch: Sequence[Row], cut: list[str]
    ) -> Iterator[tuple[int, list[tuple[str, bytes]]]]:
        own = self._shaped(batch[0].shape)
        run, prompts = own.run, [row.prompt for row in batch]
        negatives = [run.sampling.negative if row.negative is None else row.negative for row in batch]
        seeds = [row.seed for row in batch]
        digits = max(9, len(str(self.job.rows - 1)))
        drawn = list(own.pictures(prompts, each=list(zip(seeds, negatives, strict=True))))
        reports = own.pipe.text.tokenize(prompts).reports
        cut += [row.where for row, report in zip(batch, reports, strict=True) if report.truncated]
        for row, negative, picture in zip(batch, negatives, drawn, strict=True):
            own.run = replace(run, sampling=replace(run.sampling, negative=negative))
            key = f"{row.number:0{digits}d}"
            facts = {"key": key, "row": row.number, **own.facts(row.prompt, row.seed)}
            yield (
                row.number,
                [
                    (f"{key}.png", own.png(picture)),
                    (f"{key}.json", json.dumps(facts, ensure_ascii=False).encode()),
                    (f"{key}.txt", row.prompt.encode()),
                ],
            )
