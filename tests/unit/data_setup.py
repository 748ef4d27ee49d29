"""Pictures of noise, and what the trainer finds in sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import TrainData, open_dataset


def paint(path: Path, number: int, size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def paint_folder(folder: Path) -> Path:
    """Twelve pictures of four sizes with captions, most of them in a folder of the folder."""
    for i in range(12):
        path = paint(folder / ("birds" if i % 3 else "") / f"{i:02}.png", i, (40 + 8 * (i % 4), 32))
        path.with_suffix(".txt").write_text(f"picture {i}\nin two lines\n", encoding="utf-8")
    return folder


def open_data(
    *sources: object, batch_size: int = 4, seed: int = 1, rank: int = 0, world: int = 1, **options: object
) -> TrainData:
    config = DataConfig(
        sources=[s if isinstance(s, dict) else {"path": s} for s in sources], **{"resolution": 32, **options}
    )
    return open_dataset(config, seed=seed, batch_size=batch_size, rank=rank, world_size=world)
