"""Good files of every kind that the project reads, and the command through which a user gives it each."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

from data_seeds import DataSeeds
from PIL import Image
from safetensors.torch import save_file
from seed import TRAINING, Seed
from tiny import TINY, randomize
from weight_seeds import WeightSeeds

from hydit_core.model.controlnet import ControlNet


class Seeds(WeightSeeds, DataSeeds):
    """Writes everything under ``root`` once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._weights()
        self._folders()
        self._adapters()
        self._image_prompts()
        self._pictures()
        self._tables()
        self._texts()
        self._training()

    def _texts(self) -> None:
        folder = self._folder("weights")
        save_file(randomize(ControlNet(TINY), 2).state_dict(), folder / "c.safetensors")
        Image.new("RGB", (64, 64), "gray").save(folder / "hint.png")
        (folder / "w.json").write_text(json.dumps([1.0]))
        (folder / "prompts.txt").write_text("a red apple\n红苹果\n", encoding="utf-8")
        control = (
            "--controlnet",
            "c.safetensors",
            "--control-image",
            "hint.png",
            "--control-weights",
            "w.json",
        )
        self._add(
            "draw with weights",
            folder,
            "w.json",
            "generate.__main__",
            *self._draw(*control),
            knowing=("json", "text"),
        )
        draw = [x for x in self._draw("--prompts", "prompts.txt") if x not in ("--prompt", "a red apple")]
        self._add("draw prompts", folder, "prompts.txt", "generate.__main__", *draw, knowing=("text",))
        folder = self._folder("settings")
        (folder / "data").mkdir()
        Image.new("RGB", (64, 64), "gray").save(folder / "data" / "a.png")
        (folder / "data" / "a.txt").write_text("a red apple")
        self._dry_run("train with settings", folder, "run.toml", "data", ("text",), weight=20)
        self._dry_run("train on captions", folder, "data/a.txt", "data", ("text",))

    def _training(self) -> None:
        """A run with a cache, interrupted; then its files are damaged and it is resumed."""
        folder = self._folder("resume")
        (folder / "data").mkdir()
        for i, colour in enumerate(("red", "green", "blue")):
            Image.new("RGB", (64, 64), colour).save(folder / "data" / f"{i}.png")
            (folder / "data" / f"{i}.txt").write_text("a red apple")
        settings = TRAINING.format(model=self.model, source="data", more="").replace(
            'dir = "cache"', 'dir = "cache"\nlatents = true'
        )
        (folder / "run.toml").write_text(settings)
        seed = Seed(
            "first run", folder, "run.toml", "train.__main__", ("run.toml", "--stop-after-micro", "1")
        )
        before = os.getcwd()
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                seed.command()()
        finally:
            os.chdir(before)
        for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "data"):
            name = str(file.relative_to(folder))
            knowing = {".json": ("json",), ".jsonl": ("json_line",), ".safetensors": ("header",)}.get(
                file.suffix
            )
            if knowing is None or "events" in name:
                continue
            command = ("report", "run") if file.name == "metrics.jsonl" else ("run.toml", "--resume", "run")
            what = "a cache's shard" if file.name.startswith("shard") else file.name
            weight = 12 if "report" in command else 1
            self._add(
                f"go on with {what}", folder, name, "train.__main__", *command, knowing=knowing, weight=weight
            )
