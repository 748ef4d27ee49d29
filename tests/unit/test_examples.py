"""The shipped configurations: all valid, and the first training can be looked at without writing anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydit_core.train.__main__ import main
from hydit_core.train.config import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_is_valid(path: Path) -> None:
    assert load_config(path).run.steps > 0


def test_dry_run_of_the_first_training(capsys: pytest.CaptureFixture[str]) -> None:
    runs = EXAMPLES.parent / "runs"
    before = sorted([*EXAMPLES.rglob("*"), *runs.rglob("*")])
    assert main([str(EXAMPLES / "first" / "first.toml"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "pictures: 18",
        "captions: 36",
        "128x128: 18",
        "room for 24",
        "nothing has been written",
        "Memory",
    ):
        assert fact in shown
    assert sorted([*EXAMPLES.rglob("*"), *runs.rglob("*")]) == before
