"""`generate --shard-size N --engine ray`: the same files as without Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydit_core import ray_cluster
from hydit_core.errors import ConfigError
from hydit_core.generate.__main__ import main
from hydit_core.generate.bulk import on_ray


@pytest.fixture
def words(tiny_model_file, tmp_path, monkeypatch):
    """The command line for 5 prompts, 2 a shard, without --out."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a\nb\nc\nd\ne\n")
    given = ["--model", tiny_model_file, "--device", "cpu", "--steps", 1, "--prompts", "p.txt"]
    return [*map(str, given), "--shard-size", "2"]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def test_without_ray_one_line_names_the_extra(words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*words, "--engine", "ray"]) == 2
    assert capsys.readouterr().err == "error: --engine ray needs Ray: pip install 'hydit[scale]'\n"
    assert not Path("outputs").exists()


def test_ray_starts_the_processes_itself(words, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*words, "--engine", "ray"]) == 2
    assert "error: --engine ray needs no torchrun" in capsys.readouterr().err


def test_a_worker_draws_what_the_command_alone_draws(words, tmp_path):
    """What a worker is given and gives back are texts and numbers, errors too."""
    assert main([*words, "--out", "alone"]) == 0
    worker = on_ray.Worker(str(tmp_path), [*words, "--out", "shared", "--engine", "ray"], [])
    done = [worker.draw(shard) for shard in (2, 0, 1, 1)]
    assert json.loads(json.dumps(done)) == [
        [f"shared/00000{shard}.tar", drawn, 0, 0, ""] for shard, drawn in ((2, 1), (0, 2), (1, 2), (1, 2))
    ]
    assert contents("shared") == contents("alone")
    Path("shared/000001.tar").write_bytes(b"mine" * 1000)
    kind, text = worker.draw(1)
    assert kind == "ConfigError" and text.startswith("shared/000001.tar is no tar file of pictures")
    bad = on_ray.Worker(
        str(tmp_path), [*words, "--out", "bad"], [((None, None, 5000, None), "p.csv, line 3")]
    )
    assert bad.draw(0) == ("ConfigError", "p.csv, line 3: 5000 steps with 'linspace' spacing: use 1 to 999")


@pytest.mark.parametrize("kind", [Exception, ConnectionError, RuntimeError])
def test_a_cluster_that_does_not_start_is_one_line(monkeypatch, kind):
    """On a busy machine Ray gives up with an Exception of no class of its own."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    begun = []

    def init(**how):
        begun.append("init")
        raise kind("The current node timed out\nduring startup.")

    with pytest.raises(
        ConfigError, match=r"cannot connect to Ray \(The current node timed out during startup"
    ):
        ray_cluster.connect(SimpleNamespace(init=init, shutdown=lambda: begun.append("shutdown")))
    assert begun == ["init", "shutdown"] * 3  # nothing of a start that failed is left
