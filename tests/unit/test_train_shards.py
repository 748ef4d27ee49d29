"""Checkpoints in parts: what their files hold, byte for byte."""

from __future__ import annotations

from pathlib import Path

import torch

from hydit_core.train.distributed import Processes
from hydit_core.train.parallel import shards

ONE = Processes(0, 1, torch.device("cpu"))


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    """After a resume, an optimizer lists its states in another order."""
    values = {name: torch.randn(3, 2) for name in ("b", "a", "c")}
    told = []
    for number, names in enumerate((("b", "a", "c"), ("c", "b", "a"))):
        tensors = {"weights": {name: values[name] for name in names}}
        told.append(shards.write(tmp_path / str(number), shards.parts_of(tensors, ONE), ONE, number))
    assert told[0] == told[1] and len(told[0]) == 1
    found = shards.read(tmp_path / "1")["weights"]
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name]) for name in values)
    stored = shards.Stored(tmp_path / "0")
    assert "weights/a" in stored and torch.equal(stored.get("weights/a"), values["a"])
