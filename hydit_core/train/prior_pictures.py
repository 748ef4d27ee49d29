"""Pictures that the base draws before it is trained: by their loss it shows what it forgets."""

from __future__ import annotations

import io
from pathlib import Path

from tqdm import tqdm

from ..data.config import SourceConfig
from ..data.order import hash_int
from ..loading import load
from ..new_files import write_new
from .config import TrainConfig
from .distributed import Processes, find_device


def with_prior_pictures(config: TrainConfig, processes: Processes) -> TrainConfig:
    """``config`` with the pictures of ``validation.prior`` as one more source, held out.

    The first process draws those that are not there yet, into the run's folder; all processes must see it.
    """
    prompts = config.validation.prior
    if not prompts:
        return config
    folder = _folder(config)
    processes.from_main(lambda: _draw(config, folder))
    processes.barrier()
    source = SourceConfig(path=folder, kind="folder", prior=True, validation=True)
    data = config.data.model_copy(update={"sources": (*config.data.sources, source)})
    return config.model_copy(update={"data": data})


def _folder(config: TrainConfig) -> Path:
    """Other prompts or another model draw other pictures."""
    name = f"prior-{hash_int('prior', str(config.model.init_from), *config.validation.prior):016x}"
    return config.run.output_dir / name


def _draw(config: TrainConfig, folder: Path) -> None:
    prompts = dict.fromkeys(" ".join(prompt.split()) for prompt in config.validation.prior)
    paths = {prompt: folder / f"{number:04}.png" for number, prompt in enumerate(prompts)}
    missing = [(seed, prompt, path) for seed, (prompt, path) in enumerate(paths.items()) if not path.exists()]
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
