"""``generate --like PICTURE``: settings come out of a picture, files and newer editions are told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hydit_core.generate.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
THEN = ROOT / "tests/data/written_2026-11-22/drawn/embedded.png"


def facts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Image.open(path).info["hydit"])
    return found


def changed(path: Path, out: Path, **values: Any) -> Path:
    """A copy whose facts say something else; None takes one away."""
    told = {**facts(path), **values}
    info = PngInfo()
    info.add_itxt("hydit", json.dumps({key: value for key, value in told.items() if value is not None}))
    Image.open(path).save(out, pnginfo=info)
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With nothing at its default."""
    path = tmp_path_factory.mktemp("like") / "picture.png"
    given = "--steps 3 --cfg 1.7 --guidance-rescale 0.2 --sampler euler --spacing trailing --seed 11"
    words = [
        "--prompt",
        "-a red apple",
        "--negative",
        "cat",
        "--size",
        "64x96",
        "--forecast",
        "0.01",
        "--cfg-end",
        "0.7",
    ]
    assert main([*words, *given.split(), "--device", "cpu", "--dtype", "bf16", "--out", str(path)]) == 0
    return path


def test_it_is_the_same_picture(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again.png"
    assert main(["--like", str(drawn), "--device", "cpu", "--out", str(again)]) == 0
    assert facts(again) == facts(drawn)
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(drawn)))
    assert "was drawn with" not in capsys.readouterr().err


def test_what_is_typed_comes_first(drawn: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.png"
    typed = ["--prompt", "a cat", "--seed", "0", "--steps", "2"]  # 0 is the seed's default, but was said
    assert main(["--like", str(drawn), *typed, "--device", "cpu", "--out", str(again)]) == 0
    told = facts(again)
    assert told == {**facts(drawn), "prompt": "a cat", "seed": 0, "steps": 2}


def test_it_says_that_another_edition_drew_it(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The title is the model's own; the first edition's pictures told none."""
    title = facts(drawn)["title"]
    assert title == "hydit icons 128, second edition"
    assert "title" not in facts(THEN)
    assert main(["--like", str(THEN), "--device", "cpu", "--out", str(tmp_path / "a.png")]) == 0
    said = capsys.readouterr().err
    assert f"{THEN} was drawn with hydit icons 128, first edition; the model is {title} now" in said
    later = changed(drawn, tmp_path / "later.png", title="hydit icons 128, third edition")
    assert main(["--like", str(later), "--device", "cpu", "--out", str(tmp_path / "b.png")]) == 0
    assert (
        f"was drawn with hydit icons 128, third edition; the model is {title} now" in capsys.readouterr().err
    )


def test_it_names_what_it_cannot_know(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = changed(drawn, tmp_path / "more.png", loras=[{"lora": "a.safetensors"}], init_image="b.png")
    assert main(["--like", str(more), "--device", "cpu", "--out", str(tmp_path / "c.png")]) == 0
    assert (
        "with more than settings: give --init-image, --lora for the same picture" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"model": "other.safetensors"},
            "drawn with other.safetensors, which is not the model that comes with",
        ),
        ({"steps": "many"}, "its settings are impossible: argument --steps: invalid int value: 'many'"),
        ({"sampler": "best"}, "its settings are impossible: argument --sampler: invalid choice: 'best'"),
        ({"width": 10**9}, "its settings say 1000000000x96, but the picture is 64x96"),
        ({"height": "high"}, "its settings are impossible"),
        ({"steps": 10**9}, "1000000000 steps"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_what_a_picture_says_is_not_believed(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], said: str
) -> None:
    strange = changed(drawn, tmp_path / "strange.png", **values)
    assert main(["--like", str(strange), "--device", "cpu", "--out", str(tmp_path / "d.png")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "d.png").exists()


def test_it_is_not_for_tables(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--like", str(drawn), "--shard-size", "4"]) == 2
    assert "--like: not with --shard-size" in capsys.readouterr().err
