"""Pictures that the base draws before it is trained, so that it forgets less, or to see what it forgets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..data.config import SourceConfig
from ..data.order import hash_int
from ..loading import load
from ..new_files import write_new
from .config import TrainConfig
from .distributed import Processes, find_device

_OTHERS = 1_000_000
"""Seeds of pictures that are trained begin here."""


def with_prior_pictures(config: TrainConfig, processes: Processes) -> TrainConfig:
    """``config`` with more sources: what ``data.prior.prompts`` and, held out, ``validation.prior`` ask for.

    The first process draws those that are not there yet, into the run's folder; all processes must see it.
    """
    sources = list(config.data.sources)
    for prompts, held_out in ((config.data.prior.prompts, False), (config.validation.prior, True)):
        if prompts:
            folder = _folder(config, prompts, held_out)
            first = 0 if held_out else _OTHERS  # so that a prompt in both is drawn twice
            processes.from_main(partial(_draw, config, prompts, folder, first))
            processes.barrier()
            sources.append(SourceConfig(path=folder, kind="folder", prior=True, validation=held_out))
    data = config.data.model_copy(update={"sources": tuple(sources)})
    return config.model_copy(update={"data": data})


def _folder(config: TrainConfig, prompts: Sequence[str], held_out: bool) -> Path:
    """Other prompts or another model draw other pictures."""
    number = hash_int("prior" if held_out else "trained prior", str(config.model.init_from), *prompts)
    return config.run.output_dir / f"prior-{number:016x}"


def _draw(config: TrainConfig, wanted: Sequence[str], folder: Path, first: int) -> None:
    prompts = dict.fromkeys(" ".join(prompt.split()) for prompt in wanted)
    paths = {prompt: folder / f"{number:04}.png" for number, prompt in enumerate(prompts)}
    drawn = enumerate(paths.items(), first)
    missing = [(seed, prompt, path) for seed, (prompt, path) in drawn if not path.exists()]
    if not missing:
        return
    model = config.model
    pipe = load(
        model.init_from,
        text_encoders=model.text_encoders if isinstance(model.text_encoders, Path) else None,
        vae=model.vae,
        load_key=model.load_key,
        device=find_device(config.run.device),
    )
    settings = pipe.settings()
    for seed, prompt, path in tqdm(missing, desc="drawing what the base knows"):
        picture = next(iter(pipe.pictures([prompt], settings, seed=seed)))
        file = io.BytesIO()
        picture.image.save(file, format="PNG")
        write_new(path, file.getvalue(), {".txt": prompt.encode("utf-8")})
