"""What a run records and reports: metrics.jsonl, tensorboard, loss windows, captions' lengths, the curve."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import bert_vocab, spiece_model

from hydit_core.diffusion.losses import LossTerms
from hydit_core.errors import HyditError
from hydit_core.text.tokenizers import Tokenizers
from hydit_core.train.conditioning import caption_fits
from hydit_core.train.distributed import Processes
from hydit_core.train.draws import validation_draws
from hydit_core.train.memory import MemoryEstimate
from hydit_core.train.metrics import LossWindow, Metrics, read
from hydit_core.train.report import plot, table


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_is_on_the_disk_at_once_and_plain_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, start=0, total=9, resumed=False, tensorboard=False)
    metrics.record(1, {"loss": 0.5, "norm": math.nan, "best": math.inf, "keys": ["a"], "skipped": 2})
    expected = {"step": 1, "loss": 0.5, "norm": None, "best": None, "keys": ["a"], "skipped": 2}
    assert lines(tmp_path) == [expected]  # before anything is closed
    metrics.close()
    assert list(read(tmp_path / "metrics.jsonl")) == [expected]


def test_a_resumed_run_takes_back_what_it_repeats(tmp_path: Path) -> None:
    for start, resumed, left in ((0, False, []), (3, True, [1, 2, 3]), (2, True, [1, 2]), (0, False, [])):
        metrics = Metrics(tmp_path, start=start, total=9, resumed=resumed, tensorboard=False)
        assert [record["step"] for record in lines(tmp_path)] == left
        for step in range(start + 1, 6):
            metrics.record(step, {"loss": 1.0})
        metrics.close()


def test_numbers_go_to_tensorboard_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boards: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
            boards.append(self)

        def add_scalar(self, *values: object) -> None:
            self.scalars.append(values)

        def close(self) -> None:
            self.closed = True

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = Metrics(tmp_path, start=4, total=9)
    metrics.record(5, {"loss": 0.5, "keys": ["a"], "skipped": 2})
    metrics.close()
    (board,) = boards
    assert board.folder == str(tmp_path / "tensorboard") and board.purge_step == 5 and board.closed
    assert board.scalars == [("loss", 0.5, 5), ("skipped", 2, 5)]
    Metrics(tmp_path, start=4, total=9, tensorboard=False).close()
    assert len(boards) == 1


def window_of(*losses: list[float]) -> LossWindow:
    window = LossWindow(Processes(0, 1, torch.device("cpu")))
    for number, row in enumerate(losses):
        loss = torch.tensor(row)
        keys = [f"{number}{letter}" for letter in "abc"]
        window.add(LossTerms(loss, 2 * loss, 3 * loss), types.SimpleNamespace(keys=keys))  # type: ignore[arg-type]
    return window


def test_a_window_gives_means_and_forgets_them() -> None:
    window = window_of([1.0, 2.0, 3.0], [4.0, 5.0, 9.0], [7.0, 7.0, 7.0])
    assert window.step_loss(1) == 7.0 and window.step_loss(2) == 6.5
    window.forget(1)
    window.close_step(2.0, 0.125)
    window.close_step(math.inf, 0.25)
    window.close_step(3.0, 0.5)
    found = window.means()
    window.clear()
    assert found == {"loss": 4.0, "mse": 8.0, "vlb": 12.0, "grad_norm": 2.5, "lr": 0.5}
    window.add(LossTerms(*torch.ones(3, 1)), types.SimpleNamespace(keys=["x"]))  # type: ignore[arg-type]
    again = window.means()
    assert again["loss"] == 1.0 and math.isnan(again["grad_norm"])


def test_a_window_has_the_means_of_all_processes() -> None:
    """From before the update on, so that no process is asked again; earlier steps stay as they are."""

    class Two(Processes):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values.add_(torch.tensor([[10.0, 20.0, 30.0], [0.0, 2.0, 4.0]]))

    window = window_of([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0])
    window.processes = Two(0, 2, torch.device("cpu"))
    window.exchange(2)
    assert window.step_loss(2) == (6.0 + 2.0) / 2
    found = [window.means()[name] for name in ("loss", "mse", "vlb")]
    assert found == pytest.approx([(1 + 6 + 2) / 3, (2 + 12 + 5) / 3, (3 + 18 + 8) / 3], abs=1e-6)


def test_a_window_survives_a_checkpoint() -> None:
    window = window_of([1.0, math.nan, 3.0], [math.inf, 5.0, 9.0], [1.0, 1.0, 4.0])
    window.close_step(math.nan, 0.5)
    window.close_step(2.0, 0.5)
    state = json.loads(json.dumps(window.state(), allow_nan=False))
    restored = LossWindow(Processes(0, 1, torch.device("cpu")))
    restored.load(state, torch.device("cpu"))
    assert restored.state() == window.state() and "nan" in str(state)
    assert (found := restored.means())["grad_norm"] == 2.0 and found["lr"] == 0.5


def test_the_culprits_are_the_samples_whose_loss_is_not_finite_or_all() -> None:
    assert window_of([1.0, math.nan, 3.0], [1.0, 2.0, math.inf]).culprits() == ["0b", "1c"]
    window = window_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert window.culprits() == ["0a", "0b", "0c", "1a", "1b", "1c"]
    window.close_step(1.0, 1.0)
    assert window.culprits() == []


def test_captions_are_counted_for_each_encoder() -> None:
    tokenizers = Tokenizers(bert_vocab(), spiece_model(), text_len=6, t5_len=40)
    short, long, strange = "a red apple", "two small birds on the left", "a red zebra"
    bert, t5 = caption_fits([short, long, strange, long], tokenizers)
    assert (bert.encoder, bert.limit, t5.encoder, t5.limit) == ("BERT", 6, "mT5", 40)
    assert bert.captions == t5.captions == 4
    assert bert.longest == 8  # six words, begin and end
    assert (bert.cut, bert.example, t5.cut, t5.example) == (2, long, 0, "")
    assert bert.unknown == 1
    assert list(bert.lines()) == [
        "BERT: up to 8 tokens, room for 6",
        f"  2 of 4 captions are cut, for example: {long!r}",
        "  1 captions hold words that it does not know",
    ]


def test_validation_timesteps_are_mixed_by_a_stride_without_common_factor() -> None:
    """Two runs of different versions are compared by these losses: the stride stays what it is."""
    keys = [str(i) for i in range(10)]
    t = validation_draws(keys, range(10), 10, (1, 2, 2)).t
    assert t.tolist() == [50, 750, 450, 150, 850, 550, 250, 950, 650, 350]  # slots 0, 7, 14, 21 ... of 10


@pytest.mark.parametrize(
    ("size", "shown"),
    [(2**28, "0.25 GiB"), (2**28 - 1, "256.0 MiB"), (3 * 2**20, "3.0 MiB"), (2**31, "2.00 GiB")],
)
def test_memory_is_told_in_the_unit_that_fits(size: int, shown: str) -> None:
    found = MemoryEstimate(size, 0, 0, 0, 0, 0).lines()
    assert found == [
        f"  weights: {shown}",
        f"  together: {shown} (plus about 1 GB for libraries and buffers)",
    ]


# -- the report ----------------------------------------------------------------------------------------------

BLUE, ORANGE = (66, 120, 190), (214, 110, 50)


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def colored(path: Path, color: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Where the picture has this color, below the names of the curves."""
    with Image.open(path) as image:
        pixels = image.convert("RGB").load()
        return [(x, y) for y in range(28, image.height) for x in range(image.width) if pixels[x, y] == color]


def test_the_table_has_means_over_twelfths_of_the_run(tmp_path: Path) -> None:
    write_records(
        tmp_path,
        [{"step": step, "loss": float(step), "lr": 1e-3, "seconds": 30.0 * step} for step in range(1, 25)]
        + [{"step": 24, "skipped": 3}, {"step": 24, "val_loss": None}],
    )
    *rows, footer = table(tmp_path).splitlines()
    assert rows[0].split() == ["steps", "loss", "lr"] and len(rows) == 13
    assert [row.split() for row in rows[1:3]] == [["1-2", "1.5", "0.001"], ["3-4", "3.5", "0.001"]]
    assert rows[12].split() == ["23-24", "23.5", "0.001"]
    assert footer == "24 steps in 0.20 h, 3 skipped"


def test_the_curve_is_logarithmic_and_spans_the_picture(tmp_path: Path) -> None:
    """Three decades over a hundred steps: the middle of the curve is at the geometric mean."""
    records = [{"step": step, "val_loss": 10 ** (1 - 3 * step / 100)} for step in range(0, 101, 10)]
    write_records(tmp_path, [*records, {"step": 100, "loss": 1.0}])
    plot(tmp_path, tmp_path / "curve.png")
    points = colored(tmp_path / "curve.png", ORANGE)
    left, right = min(points), max(points)
    assert abs(left[0] - 70) <= 2 and abs(right[0] - 940) <= 2  # the margins
    assert left[1] < 40 and right[1] > 480  # falls from the top to the bottom
    middle = [y for x, y in points if abs(x - (left[0] + right[0]) // 2) <= 1]
    assert abs(sum(middle) / len(middle) - (left[1] + right[1]) / 2) <= 4


def test_the_training_loss_is_smoothed_over_a_fiftieth_of_the_records(tmp_path: Path) -> None:
    """Alternating losses: a window of two makes a straight line of them, after its first."""
    write_records(tmp_path, [{"step": step, "loss": 1.0 if step % 2 else 3.0} for step in range(1, 101)])
    plot(tmp_path, tmp_path / "curve.png")
    heights = [y for x, y in colored(tmp_path / "curve.png", BLUE) if x > 120]
    assert max(heights) - min(heights) <= 2
    write_records(tmp_path, [{"step": step, "loss": 1.0 if step % 2 else 3.0} for step in range(1, 51)])
    plot(tmp_path, tmp_path / "curve.png")
    heights = [y for x, y in colored(tmp_path / "curve.png", BLUE) if x > 120]
    assert max(heights) - min(heights) > 400  # fifty records: as they are


@pytest.mark.parametrize(
    "odd",
    [
        *('"seconds": "1"', '"skipped": []', '"lr": {}', '"loss": true', '"loss": "0.5"', '"loss": null'),
        *('"loss": 1e300', '"loss": -1e300', '"step": true', '"step": -3', '"step": "2"', '"step": null'),
        *('"step": 1e3', f'"step": {10**39}', '"seconds": 1e308'),
    ],
)
def test_odd_values_in_a_record_do_not_count(odd: str, tmp_path: Path) -> None:
    """Somebody edited the file, or another program wrote into it."""
    write_records(tmp_path, [{"step": 1, "loss": 2.0, "seconds": 36.0}])
    wanted = table(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        fields = {"step": "1", "loss": "2.0", "seconds": "36.0"} | {odd.split('"')[1]: odd.split(": ")[1]}
        file.write("{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}\n")
    assert table(tmp_path) == wanted


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    write_records(tmp_path, [{"step": 1, "loss": 2.0}])
    for name in ("missing/a.png", "a.nothing"):
        with pytest.raises(HyditError, match="cannot be written"):
            plot(tmp_path, tmp_path / name)
