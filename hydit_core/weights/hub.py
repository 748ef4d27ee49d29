"""Places on the Hugging Face hub: ``hub:ORG/NAME``, downloaded because the user named them so, and only then.

What is downloaded lies in the cache that all programs share that use huggingface_hub: it is found again, it
resumes after an interruption, and its folder is set by HF_HOME.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from ..errors import WeightsError
from ..untrusted import is_plain_name
from .files import SUFFIXES, preferred_weights

PREFIX = "hub:"
# Where published folders keep each part, tokenizers and configurations included; Tencent's are below t2i.
_FOLDERS = {
    "dit": ("transformer", "scheduler", "model"),
    "controlnet": ("controlnet",),
    "bert": ("text_encoder", "tokenizer", "clip_text_encoder"),
    "t5": ("text_encoder_2", "tokenizer_2", "mt5"),
    "vae": ("vae", "sdxl-vae-fp16-fix"),
}
_SMALL = (".json", ".txt", ".model")
_MOST_FILES = 10_000
_NAME = re.compile(
    r"hub:(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w.%-]{1,200}))?(/(?P<inside>.+))?",
    re.ASCII,
)


class HubPlace(NamedTuple):
    """A repository, one of its revisions (a branch, a tag or a commit), and a file or folder in it, or ""."""

    repo: str
    revision: str
    inside: str

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{PREFIX}{self.repo}{revision}{'/' if self.inside else ''}{self.inside}"


class _Listing(NamedTuple):
    """The files of a revision with their sizes, its commit, and its licence."""

    sizes: dict[str, int]
    commit: str
    licence: str


def local(
    path: str | os.PathLike[str], only: Collection[str] = tuple(_FOLDERS), *, load_key: str | None = None
) -> Path:
    """A place as a path on this machine: unchanged, or, for ``hub:ORG/NAME[@REVISION][/INSIDE]``, downloaded.

    Says on stderr what is downloaded, and under which licence.

    Args:
        only: the parts that are wanted, as in :func:`~.bundle.bundle`; of a LoRA ``lora``.
        load_key: which of Tencent's ``pytorch_model_{load_key}.pt``.

    Raises:
        WeightsError: it is no such name, huggingface_hub is missing, there is no such thing on the hub, or no
            network.
    """
    if not (text := name(path)):
        return Path(path)
    place = parse(text)
    with _hub(place) as hub:
        listing = _listing(hub, place)
        if listing is None:
            return _before(hub, place)
        names = needed(place, listing.sizes, only, load_key)
        return _fetch(hub, place, listing, names)


def name(path: str | os.PathLike[str]) -> str:
    """A place's name on the hub; "" for one on this machine."""
    text = os.fspath(path).replace("\\", "/")
    return text if text.startswith(PREFIX) else ""


def parse(text: str) -> HubPlace:
    """Raises :class:`WeightsError` for a text that is not ``hub:ORG/NAME[@REVISION][/INSIDE]``."""
    match = _NAME.fullmatch(text)
    inside = (match["inside"] or "").strip("/") if match else ""
    if match is None or not all(map(is_plain_name, inside.split("/") if inside else ())):
        raise WeightsError(
            f"{text}: expected hub:ORG/NAME, hub:ORG/NAME@REVISION, or a file or folder in it, as in "
            "hub:Tencent-Hunyuan/HYDiT-LoRA/jade"
        )
    return HubPlace(match["repo"], unquote(match["revision"] or "main"), inside)


def needed(
    place: HubPlace, names: Iterable[str], only: Collection[str], load_key: str | None = None
) -> list[str]:
    """The files of a repository that hold the wanted parts, each once: not in several formats or variants.

    Raises:
        WeightsError: there are none, or it is not clear which are meant.
    """
    paths = [PurePosixPath(name) for name in names]
    top = PurePosixPath(place.inside)
    if top in paths:
        beside = [path for path in paths if path.parent == top.parent and path.suffix in _SMALL]
        return [str(top), *map(str, beside if top.suffix in SUFFIXES else ())]
    below = [path for path in paths if path.is_relative_to(top)]
    root = top / "t2i" if any(path.is_relative_to(top / "t2i") for path in below) else top
    found: list[PurePosixPath] = []
    for part in only:
        folders = {root / name for name in _FOLDERS.get(part, ())}
        own = _chosen([path for path in below if path.parent in folders], load_key)
        # A part without a folder of its own is in the files at the top.
        found += own if _weights(own) else _chosen([path for path in below if path.parent == top], load_key)
    if "lora" in only:  # peft's folder of a LoRA that changes text encoders, too
        found += _chosen([path for path in below if path.parent in (top / "bert", top / "t5")], load_key)
    if not _weights(found):
        raise WeightsError(_nothing(place, below))
    _check_one(place, found)
    return list(dict.fromkeys(map(str, found)))


def _chosen(paths: Iterable[PurePosixPath], load_key: str | None) -> list[PurePosixPath]:
    """Of each folder the weights in one format, and all of what is small."""
    folders: dict[PurePosixPath, list[PurePosixPath]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    chosen: list[PurePosixPath] = []
    for files in folders.values():
        weights = [path for path in files if path.suffix in SUFFIXES]
        chosen += map(PurePosixPath, preferred_weights(weights, load_key))
        chosen += [path for path in files if path.suffix in _SMALL]
    return chosen


def _weights(paths: Iterable[PurePosixPath]) -> list[PurePosixPath]:
    return [path for path in paths if path.suffix in SUFFIXES]


def _nothing(place: HubPlace, below: list[PurePosixPath]) -> str:
    if not below:
        return f"{place}: there is no such file or folder in the repository"
    shown = _shown(place, map(str, _weights(below) or below))
    return f"{place} holds no weights of the wanted kind there; name one of its files or folders: {shown}"


def _check_one(place: HubPlace, found: list[PurePosixPath]) -> None:
    """Raise where a folder holds several files of which none is the one to take."""
    by_folder: dict[PurePosixPath, set[str]] = {}
    for path in _weights(found):
        by_folder.setdefault(path.parent, set()).add(re.sub(r"-\d{5}-of-\d{5}", "", path.name))
    for folder, stems in by_folder.items():
        if len(stems) > 1:
            shown = _shown(place, (str(folder / stem) for stem in sorted(stems)))
            raise WeightsError(f"{place} holds {len(stems)} weights files; name one of them: {shown}")


def _shown(place: HubPlace, names: Iterable[str]) -> str:
    """Files in a repository as a user would type them."""
    return ", ".join(str(place._replace(inside=name)) for name in [*names][:8])


@functools.cache
def _listing(hub: Any, place: HubPlace) -> _Listing | None:
    """What is in a repository; None without network."""
    try:
        info = hub.HfApi().model_info(place.repo, revision=place.revision, files_metadata=True)
    except Exception as error:
        if _is_answer(error):
            raise
        return None
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
    if len(sizes) > _MOST_FILES:
        raise WeightsError(f"{place} holds {len(sizes):,} files; up to {_MOST_FILES:,} are looked at")
    safe = {name: size for name, size in sizes.items() if all(map(is_plain_name, name.split("/")))}
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license_name") or card.get("license") or "not said"
    link = card.get("license_link")
    text = str(licence)[:100] + (f" ({link[:200]})" if isinstance(link, str) and link else "")
    return _Listing(safe, str(info.sha), text)


def _fetch(hub: Any, place: HubPlace, listing: _Listing, names: list[str]) -> Path:
    cached = functools.partial(hub.try_to_load_from_cache, place.repo, revision=listing.commit)
    missing = [file for file in names if not isinstance(cached(file), str)]
    if missing:
        size = f"{sum(listing.sizes[file] for file in missing) / 1e6:,.1f} MB"
        print(f"{place}: {len(missing)} files, {size}; licence: {listing.licence}", file=sys.stderr)
    paths = {}
    for file in names:
        found = cached(file)
        download = functools.partial(hub.hf_hub_download, place.repo, file, revision=place.revision)
        paths[file] = Path(found if isinstance(found, str) else download())
    top = PurePosixPath(place.inside)
    first, path = next(iter(paths.items()))
    return path.parents[len(PurePosixPath(first).parts) - 1] / top


def _before(hub: Any, place: HubPlace) -> Path:
    """What an earlier download has left, where there is no network."""
    try:
        root = hub.snapshot_download(place.repo, revision=place.revision, local_files_only=True)
    except Exception:
        root = None
    if root is None or not (found := Path(root) / place.inside).exists():
        raise WeightsError(
            f"{place}: no network, and it was not downloaded before; connect, or give a file or folder"
        )
    print(f"{place}: no network; what was downloaded before is taken", file=sys.stderr)
    return found


@contextmanager
def _hub(place: HubPlace) -> Iterator[Any]:
    """huggingface_hub; what it raises becomes one line."""
    try:
        import huggingface_hub
    except ImportError:
        raise WeightsError(
            f"{place}: downloading needs huggingface_hub: pip install 'hydit[hub]' (or download it yourself)"
        ) from None
    try:
        yield huggingface_hub
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{place}: {_reason(error)}") from None


_LOG_IN = "`hf auth login`"
_ANSWERS = {
    "GatedRepoError": f"only those get it who have accepted its licence on its page; then log in: {_LOG_IN}",
    "RepositoryNotFoundError": f"there is no such repository, or it is private ({_LOG_IN})",
    "RevisionNotFoundError": "there is no such revision: a branch, a tag or a commit",
    "EntryNotFoundError": "a file of it is not there any more",
    "HfHubHTTPError": "the hub does not give it",
}
"""What its errors mean, by the names of their classes, which have been in several modules."""


def _kinds(error: Exception) -> list[str]:
    return [cls.__name__ for cls in type(error).__mro__ if cls.__name__ in _ANSWERS]


def _is_answer(error: Exception) -> bool:
    """Whether an error came from the hub, rather than from having no way to it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return bool(_kinds(error)) and status is not None and status < 500


def _reason(error: Exception) -> str:
    if kinds := _kinds(error):
        detail = f": {_first_line(error)}" if kinds[0] == "HfHubHTTPError" else ""
        return _ANSWERS[kinds[0]] + detail
    return f"the download broke off: {_first_line(error)}; the same command goes on with it"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
