"""What the options of ``python -m hydit_core.generate`` mean: files to open, a model, and pictures.

Other commands that draw with the same options (:mod:`hydit_core.compare`) go the same way.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ..diffusion.forecast import tolerance_of
from ..diffusion.run import Progress
from ..errors import ConfigError
from ..images import load_picture
from ..loading import load
from ..pictures.png import png_info
from ..pictures.redraw import redraw
from ..pipeline import Picture, Pipeline
from ..presets import RunSettings, check_cfg_end
from . import control as control_cli
from . import image_prompts as image_cli
from . import lora as lora_cli
from . import memory as memory_cli
from . import retouch
from .settings import settings_of

if TYPE_CHECKING:
    from ..lora.adapter import Adapter
    from ..weights.bundle import Bundle

LOADING = ("text_encoders", "vae", "load_key", "dtype", "device", "offload", "compile")
"""The options that :func:`hydit_core.load` gets, beside the model."""
_OF_MODEL = ("model", *LOADING, "lora", "lora_block_weights", "partial")
_VERSIONS = ("v1.0", "v1.1", "v1.2")


class Files(NamedTuple):
    """What is opened before the model is loaded, which takes longer and may be in vain."""

    init: Image.Image | None
    mask: Image.Image | None
    adapters: list[Adapter]
    controlnets: list[Bundle]
    pictures: image_cli.Opened | None

    @property
    def memory(self) -> memory_cli.Opened:
        """What of it counts in the device's memory."""
        return self.init, self.controlnets, self.pictures


class Model(NamedTuple):
    """A loaded model with its LoRAs, and what pictures say about these."""

    pipe: Pipeline
    loras: list[dict[str, Any]]


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is opened. Raises :class:`ConfigError`."""
    retouch.check(args)
    check_text(args.negative or "")
    tolerance_of(args.forecast)
    check_cfg_end(args.cfg_end)
    lora_cli.check(args)
    control_cli.check(args)
    image_cli.check(args)


def check_text(text: str) -> None:
    """Refuse bytes that are invalid in the terminal's encoding: neither tokenizers nor PNG accept them.

    Raises :class:`ConfigError`.
    """
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{text!a} is not valid text: check the terminal's encoding (UTF-8)")


def open_files(args: argparse.Namespace) -> Files:
    """Open what the options name beside the model.

    Raises :class:`HyditError` for files that cannot be read.
    """
    init = None if args.init_image is None else load_picture(args.init_image)
    mask, pictures = retouch.read_mask(args), image_cli.open_files(args)
    return Files(init, mask, lora_cli.read(args), control_cli.open_files(args), pictures)


def model_key(args: argparse.Namespace) -> tuple[str, ...]:
    """The same for two command lines whose models are the same, LoRAs included."""
    return tuple(repr(getattr(args, name)) for name in _OF_MODEL)


def load_model(args: argparse.Namespace, files: Files, *, quiet: bool = False) -> Model:
    """Load the model and put the LoRAs into it; unless ``quiet``, say on stderr what of them fits.

    Raises :class:`HyditError` for files that cannot be read or do not fit.
    """
    given = {name: getattr(args, name) for name in LOADING}
    if args.offload == "auto":
        given["offload"] = memory_cli.choice(args, files.memory, quiet=quiet)
    pipe = load(args.model, **given)
    return Model(pipe, lora_cli.load(args, files.adapters, pipe, quiet=quiet))


class Drawing:
    """A command line's pictures: settings, ControlNets, image prompts, and what is written into each file.

    Args:
        folder: where the pictures go; control pictures are written there.

    Raises:
        HyditError: a setting is out of range, or a ControlNet or an IP-Adapter does not fit.
    """

    def __init__(self, args: argparse.Namespace, files: Files, model: Model, folder: Path):
        self.args = args
        self.pipe = model.pipe
        self.run = settings_of(model.pipe, args, files.init)
        self._second = retouch.second_run(args, self.run, model.pipe)
        self._init = files.init
        self._pictures = files.pictures
        self._loras = model.loras
        self._part = retouch.inpainting(args, files.init, files.mask, self.run.sampling)
        self._images, self._image_facts = image_cli.read(
            args, files.pictures, model.pipe, self.run.sampling, folder
        )
        self._controls, self._control_facts = control_cli.read(
            args, files.controlnets, files.init, model.pipe, self.run.sampling, self._part, folder
        )
        self._mask = None if self._part is None else control_cli.write_mask(self._part.mask, args, folder)

    @property
    def steps(self) -> int:
        """Steps of each prompt's batch, and of enlarging its pictures."""
        runs = [self.run] if self._second is None else [self.run, *[self._second] * self.run.batch]
        return sum(
            len(self.pipe.schedule.sigmas_for(run.sampling.spacing, run.sampling.steps, run.strength)) - 1
            for run in runs
        )

    def advice(self, prompts: Sequence[str]) -> list[str]:
        """What the user should know before sampling."""
        sampling = self.run.sampling
        if self.run.tile is not None:  # the network sees no more at once
            sampling = replace(sampling, width=self.run.tile[0], height=self.run.tile[1])
        notes = self.pipe.advice(prompts, sampling)
        if self._part is not None and self._part.covers_all:
            notes.append("the mask covers everything: nothing of the picture stays")
        preset, version = self.args.preset, self.pipe.info.version
        if preset in _VERSIONS and (preset == "v1.2") != (version == "v1.2"):
            notes.append(f"preset {preset} is meant for another release than this model ({version})")
        return notes

    def pictures(
        self,
        prompts: Sequence[str],
        callback: Progress | None = None,
        each: Sequence[tuple[int, str]] | None = None,
    ) -> Iterator[Picture]:
        """See :meth:`Pipeline.pictures`."""
        controls = self._controls
        if self._second is not None:
            controls = [control for control, late in zip(controls, self._late, strict=True) if not late]
        part = self._part
        first = self.pipe.pictures(
            prompts,
            self.run,
            init_image=self._init if part is None else part.picture,
            mask=None if part is None else part.mask,
            controls=controls,
            images=self._images,
            callback=callback,
            each=each,
        )
        return first if self._second is None else self._enlarged(first, self._second, callback)

    def _enlarged(
        self, drawn: Iterator[Picture], run: RunSettings, callback: Progress | None
    ) -> Iterator[Picture]:
        """Each picture, enlarged and redrawn in tiles; it is what ``tile`` ControlNets follow."""
        late = [control for control, late in zip(self._controls, self._late, strict=True) if late]
        for picture in drawn:
            hint = control_cli.enlarged(picture.image, run.sampling)
            (large,) = self.pipe.pictures(
                [picture.prompt],
                run,
                seed=picture.seed,
                init_image=picture.image,
                controls=[replace(control, image=hint) for control in late],
                images=self._images,
                callback=callback,
            )
            yield large._replace(
                prompt_index=picture.prompt_index,
                calls=picture.calls + large.calls,
                real_calls=picture.real_calls + large.real_calls,
            )

    @property
    def _late(self) -> list[bool]:
        """Of each ControlNet, whether it follows the picture that is enlarged."""
        return [fact["preprocess"] == "tile" for fact in self._control_facts]

    def png(self, picture: Picture) -> bytes:
        """The picture as a PNG file that remembers how it was made."""
        facts = self.facts(picture.prompt, picture.seed)
        args = self.args
        graph = redraw(
            facts,
            **_places(args),
            **image_cli.networks(self._pictures),
            loras=lora_cli.files(args),
            controlnets=control_cli.files(args),
        )
        info = png_info(facts, workflow=graph.workflow(), prompt=graph.prompt())
        file = io.BytesIO()
        picture.image.save(file, format="PNG", pnginfo=info)
        return file.getvalue()

    def facts(self, prompt: str, seed: int) -> dict[str, Any]:
        """What is written into a picture."""
        settings = self.run.sampling
        facts: dict[str, Any] = {
            "prompt": prompt,
            **vars(settings),
            "negative": settings.negative if settings.cfg > 1 else "",
            "seed": seed,
            "model": self.pipe.name,
            "version": self.pipe.info.version,
            "dtype": str(self.pipe.dit.dtype).removeprefix("torch."),
        }
        if self.pipe.title:
            facts["title"] = self.pipe.title
        if self.args.load_key is not None:
            facts["load_key"] = self.args.load_key
        if tolerance := tolerance_of(self.run.forecast):  # the number: what a name stands for may change
            facts["forecast"] = tolerance
        if self.run.cfg_end < 1 and settings.cfg > 1:
            facts["cfg_end"] = self.run.cfg_end
        if self._init is not None:
            facts |= {"init_image": self.args.init_image.name, "strength": self.run.strength}
        facts |= retouch.facts(self.args, self.run, self._second)
        if self._mask is not None:
            facts["inpaint"] = {"mask": Path(self.args.inpaint).name, "picture": self._mask.name}
            if self.args.feather:
                facts["inpaint"]["feather"] = self.args.feather
        if self._loras:
            facts["loras"] = self._loras
        if self._controls:
            facts["controls"] = self._control_facts
        if self._images:
            facts["image_prompts"] = self._image_facts
        return facts


def _places(args: argparse.Namespace) -> dict[str, Path | None]:
    """The files that :func:`~..pictures.redraw.redraw` takes."""
    given = {name: getattr(args, name) for name in ("model", "text_encoders", "vae", "init_image")}
    return {name: None if path is None else Path(path).expanduser() for name, path in given.items()}
