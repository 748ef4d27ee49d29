"""benchmarks/forecast.py draws several pictures at once, each as if it were alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hydit_core.presets import RunSettings

ROOT = Path(__file__).resolve().parents[2]


def test_a_batch_gives_each_picture_its_own_forecasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "forecast", raising=False)
    import forecast

    prompts = ["a red apple", "一只狗"]
    bench = forecast.Bench(tmp_path, prompts, first_seed=3)
    drawn = bench.draw(16, forecast=0.05)
    assert max(drawn.calls) < 16
    run = RunSettings(bench.pipe.settings(steps=16), forecast=0.05)
    for row, prompt in enumerate(prompts):
        (alone,) = bench.pipe.pictures([prompt], run, seed=3 + row)
        assert drawn.calls[row] == alone.real_calls
        torch.testing.assert_close(drawn.pixels[row], alone.pixels, rtol=0, atol=1e-4)
