"""The models that the loaders offer: their names, where they are, and when they changed.

Lists come from ComfyUI's own folders, which are read and never changed. A name with a trailing slash is a
folder: a diffusers pipeline's, Tencent's, or that of one text encoder, ControlNet or LoRA (PEFT).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import folder_paths

from ...hydit_core.embedded import (
    embedded_controlnets,
    embedded_ip_adapters,
    embedded_loras,
    embedded_model,
)
from ...hydit_core.errors import HyditError, WeightsError, printable
from ...hydit_core.weights.beside import FOLDERS
from ...hydit_core.weights.files import SUFFIXES

CHECKPOINTS = ("checkpoints", "diffusers")
DIT = ("diffusion_models", "checkpoints", "diffusers")
TEXT_ENCODERS = ("text_encoders", "checkpoints", "diffusers")
CONTROLNETS = ("controlnet", "diffusers")
LORAS = ("loras",)
IP_ADAPTERS = ("ipadapter", "checkpoints", "diffusion_models")
IMAGE_ENCODERS = ("clip_vision", "ipadapter")
"""ComfyUI's folders, in the order in which they are searched for a name."""

_UNLISTED = ("diffusers", "ipadapter")
"""Folders whose files ComfyUI does not list. It may not know the second at all: other packs brought it up."""
_EMBEDDED = "[embedded] "
_ENCODER_NAME = "clip_img_encoder.pt"
_ENCODERS = (*FOLDERS["bert"], *FOLDERS["t5"])
# The file names in a folder of one encoder, as transformers writes it.
_OWN_WEIGHTS = ("model.", "model-", "pytorch_model")
# Other folders of a pipeline that contain a file of the same name.
_PIPELINE_PARTS = (("transformer",), ("unet",), ("vae",), ("prior",))
_READ = (*SUFFIXES, ".json", ".txt", ".model")
_SHOWN, _LONGEST = 10, 100
PathParts = tuple[str, ...]
_TREES: dict[str, tuple[dict[str, int], list[PathParts]]] = {}
"""For each root: when the folders below it were changed, and the weights files in them."""


def checkpoint_names() -> list[str]:
    """The embedded model, files, and folders that hold a whole model."""
    return [*_embedded(CHECKPOINTS), *_files(CHECKPOINTS), *_folders(CHECKPOINTS, _model_folder)]


def dit_names() -> list[str]:
    """The embedded model, files that may hold a DiT, and folders with one."""
    return [*_embedded(DIT), *_files(DIT), *_folders(DIT, _model_folder)]


def text_encoder_names() -> list[str]:
    """The embedded model, files that may hold a text encoder, and folders with one or both."""
    own = _folders(TEXT_ENCODERS[:1], _encoder_folder)
    return [
        *_embedded(TEXT_ENCODERS),
        *_files(TEXT_ENCODERS),
        *own,
        *(name for name in _folders(TEXT_ENCODERS[1:], _encoders_folder) if name not in own),
    ]


def control_names() -> list[str]:
    """The embedded ControlNets, files of ControlNets of any model, and diffusers folders with one."""
    # ComfyUI itself lists each file of the first folder
    return [*_embedded(CONTROLNETS), *_files(CONTROLNETS), *_folders(CONTROLNETS[1:], _control_folder)]


def lora_names() -> list[str]:
    """The embedded LoRAs, files of LoRAs of any model, and PEFT's folders."""
    return [*_embedded(LORAS), *_files(LORAS), *_folders(LORAS, _adapter_folder)]


def ip_adapter_names() -> list[str]:
    """The embedded IP-Adapters, and files of IP-Adapters of any model."""
    # A checkpoint may have one inside, and is found by its name
    return [*_embedded(IP_ADAPTERS), *_files(IP_ADAPTERS[:1])]


def image_encoder_names() -> list[str]:
    """Files of CLIP's image encoders of any model, also those beside IP-Adapters."""
    return _files(IMAGE_ENCODERS)


def encoder_for(adapter: Path) -> Path:
    """The image encoder in an IP-Adapter's file, beside it, or under Tencent's name in ComfyUI's own folder.

    Raises:
        WeightsError: it is in none of these places.
    """
    from ...hydit_core.image_prompts.encoder import encoder_beside  # brings transformers

    try:
        return encoder_beside(adapter)
    except WeightsError as error:
        if found := _find("clip_vision", _ENCODER_NAME):
            return found
        raise WeightsError(f"{error}, or choose it in clip_vision_name") from None


def resolve(name: str, *kinds: str) -> Path:
    """The file or folder that a name from the lists means, with either path separator.

    Args:
        kinds: ComfyUI's folders to look in, such as :data:`DIT`.

    Raises:
        HyditError: if it is no longer there; the message names what is.
    """
    if not isinstance(name, str):  # in a prompt that no page wrote
        raise HyditError(f"{_shortened(repr(name))} is not the name of a file; choose one from the list")
    if name.startswith(_EMBEDDED):
        own = _embedded(kinds)
        if name in own:
            return own[name]
        raise HyditError(
            f"{_shortened(name)} is not part of this version of hydit; it has {_shown(list(own))}"
        )
    for kind in kinds:
        if found := _find(kind, name):
            return found
    own_rule = {CONTROLNETS: (_control_folder,), LORAS: (_adapter_folder,)}
    rules = own_rule.get(kinds, (_model_folder, _encoder_folder))
    there = [*_files(kinds), *(folder for rule in rules for folder in _folders(kinds, rule))]
    places = ", ".join(path for kind in kinds for path in _roots(kind))
    raise HyditError(
        f"{_shortened(name)} is not there (any more): looked in {places}; choose another. "
        f"There is: {_shown(there)}"
    )


def check(name: Any, *kinds: str) -> bool | str:
    """True, or :func:`resolve`'s error as text, for ``validate_inputs``. None is a linked, unknown name."""
    try:
        return name is None or bool(resolve(name, *kinds))
    except HyditError as error:
        return str(error)


def fingerprint(path: Path) -> str:
    """A text that changes whenever the file, or any file in the folder, does (by time and size)."""
    digest = sha256()
    for file in sorted(_walk(path, _READ)) if path.is_dir() else [path]:
        status = file.stat()
        digest.update(f"{file}|{status.st_mtime_ns}|{status.st_size}\n".encode())
    return digest.hexdigest()


def _embedded(kinds: PathParts) -> dict[str, Path]:
    """The files that come with hydit, by their names in the lists."""
    parts = {
        CONTROLNETS: embedded_controlnets,
        LORAS: embedded_loras,
        IP_ADAPTERS: embedded_ip_adapters,
        IMAGE_ENCODERS: embedded_ip_adapters,
    }
    if kinds in parts:
        return {f"{_EMBEDDED}{path.stem}": path for path in parts[kinds]()}
    try:
        path = embedded_model()
    except WeightsError as error:  # the nodes must load nevertheless
        logging.warning("hydit: %s", error)
        return {}
    return {f"{_EMBEDDED}{path.stem}": path}


def _roots(kind: str) -> list[str]:
    known = folder_paths.get_folder_paths(kind) if kind in folder_paths.folder_names_and_paths else []
    if kind != "ipadapter":
        return known
    usual = os.path.join(folder_paths.models_dir, kind)
    return list(dict.fromkeys([*known, usual]))


def _files(kinds: Iterable[str]) -> list[str]:
    """Files without duplicates: the first kind with a name provides its file."""
    lists = (_listed(kind) for kind in kinds if kind != "diffusers" and _roots(kind))
    return list(dict.fromkeys(name for names in lists for name in names))


def _listed(kind: str) -> list[str]:
    if kind not in _UNLISTED:
        names: list[str] = folder_paths.get_filename_list(kind)
        return names
    return sorted("/".join(parts) for parts in _weights(kind))


def _find(kind: str, name: str) -> Path | None:
    for spelling in dict.fromkeys((name, name.replace("\\", "/"))):
        if found := folder_paths.get_full_path(kind, spelling):
            return Path(found)
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts or any(part == ".." or ":" in part for part in parts):
        return None
    # os.path, which says of a name that is too long that it does not exist
    there = os.path.exists if kind == "ipadapter" else os.path.isdir
    return next((Path(path) for root in _roots(kind) if there(path := os.path.join(root, *parts))), None)


def _shortened(name: str) -> str:
    return printable(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}...")


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "nothing"


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names if name.endswith(suffixes))


def _weights(kind: str) -> Iterator[PathParts]:
    """The path, relative to its root, of every weights file of a kind; in ComfyUI's lists: in a subfolder."""
    if kind in _UNLISTED:
        for root in _roots(kind):
            yield from _tree(root)
    else:
        # Only names at first: a folder may hold a hundred thousand files
        nested = (name.replace("\\", "/") for name in _files([kind]) if "/" in name or "\\" in name)
        yield from (tuple(name.split("/")) for name in nested)


def _tree(root: str) -> list[PathParts]:
    """The weights files below a folder, searched again after a change, as ComfyUI's lists are."""
    times, files = _TREES.get(root, ({}, []))
    if root not in times or any(_changed(folder) != time for folder, time in times.items()):
        times, files = {root: _changed(root)}, []
        for parent, _, names in os.walk(root, followlinks=True):
            times[parent] = _changed(parent)
            parts = tuple(filter(None, parent[len(root) :].split(os.sep)))
            files += [(*parts, name) for name in names if name.endswith(SUFFIXES)]
        _TREES[root] = times, files
    return files


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:  # not there
        return -1


def _folders(kinds: Iterable[str], rule: Callable[[PathParts], PathParts]) -> list[str]:
    """The folders that ``rule`` derives from the paths of the weights files."""
    found = {folder for kind in kinds for parts in _weights(kind) if (folder := rule(parts))}
    return sorted("/".join(folder) + "/" for folder in found)


def _model_folder(parts: PathParts) -> PathParts:
    """The model's folder if this file is a transformer where diffusers or Tencent keep it; else ()."""
    if parts[-3:-1] == ("t2i", "model"):
        return parts[:-3] or parts[:-2]
    tencent = parts[-2:-1] == ("model",) and parts[-1].startswith("pytorch_model")
    return parts[:-2] if tencent or parts[-2:-1] == ("transformer",) else ()


def _encoders_folder(parts: PathParts) -> PathParts:
    """The model's folder if this file is a text encoder where diffusers or Tencent keep it; else ()."""
    if len(parts) < 3 or parts[-2] not in _ENCODERS:
        return ()
    return parts[:-3] or parts[:-2] if parts[-3] == "t2i" else parts[:-2]


def _encoder_folder(parts: PathParts) -> PathParts:
    """The same, or the folder of one encoder as transformers writes it."""
    own = parts[:-1] if parts[-1].startswith(_OWN_WEIGHTS) else ()
    return _encoders_folder(parts) or own


def _control_folder(parts: PathParts) -> PathParts:
    """The folder of a ControlNet as diffusers keeps it: alone, or as part of a pipeline."""
    if parts[-2:-1] == ("controlnet",):
        return parts[:-2] or parts[:-1]
    alone = parts[-1].startswith("diffusion_pytorch_model") and parts[-2:-1] not in _PIPELINE_PARTS
    return parts[:-1] if alone else ()


def _adapter_folder(parts: PathParts) -> PathParts:
    """The folder of a LoRA as PEFT keeps it."""
    return parts[:-1] if parts[-1].startswith("adapter_model.") else ()
