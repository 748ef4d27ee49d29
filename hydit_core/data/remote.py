"""Files that are not on a disk: ``s3://``, ``gs://``, ``https://`` and whatever else fsspec reads.

:class:`RemotePath` stands where a path on disk would, so that who reads a source need not tell them apart.
Only ranges of a file are asked for. What may pass (a lost connection, an answer of 5xx) is tried again.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..errors import ConfigError, DataError
from .order import hash_int

T = TypeVar("T")
# Path makes one slash of two. A letter alone is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each further try."""
_ANSWER_SECONDS = 60
_READ_AHEAD = 1 << 18
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
_STATUS_SECONDS = 60.0
"""For so long a file is believed to be as it was; a table is asked for every picture in it."""
_stats: dict[str, tuple[float, Status]] = {}
_systems: dict[tuple[int, str], Any] = {}


class RemoteError(DataError, OSError):
    """What a server answered, or that it did not."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"cannot read {where}: {reason}")
        self.strerror = reason


class Status(NamedTuple):
    """What :meth:`RemotePath.stat` tells, under the names of ``os.stat_result``."""

    st_size: int
    st_mtime_ns: int
    """A number made of the server's own mark of this version (ETag, checksum or time of change)."""
    st_mtime: float = 0.0


def is_url(text: str) -> bool:
    """Whether a path means a file that is not on a disk."""
    return _URL.match(text) is not None


def place(text: str | Path) -> Path:
    """A path, on a disk or not."""
    return RemotePath(text) if is_url(str(text)) else Path(text)


class RemotePath(type(Path())):  # type: ignore[misc]
    """A URL as a path. Its methods raise :class:`RemoteError`, and FileNotFoundError where a path would."""

    def __str__(self) -> str:
        return _URL.sub(r"\1://", super().__str__().replace("\\", "/"), count=1)

    def __fspath__(self) -> str:
        return str(self)

    @property
    def shown(self) -> str:
        """For errors: without what may be secret."""
        return re.sub(r"//[^/@]*@", "//", str(self).partition("?")[0])

    @property
    def suffix(self) -> str:
        """Without what asks for a certain version or signs the request."""
        return Path(super().name.partition("?")[0]).suffix

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def expanduser(self) -> RemotePath:
        return self

    def is_absolute(self) -> bool:
        return True

    def stat(self, *, follow_symlinks: bool = True) -> Status:
        before = _stats.get(str(self))
        if before is not None and time.monotonic() - before[0] < _STATUS_SECONDS:
            return before[1]
        told = self._told()
        if not isinstance(told.get("size"), int):
            raise RemoteError(self.shown, "the server does not tell its size")
        marks = (
            "ETag",
            "etag",
            "md5Hash",
            "Content-MD5",
            "Digest",
            "checksum",
            "LastModified",
            "Last-Modified",
        )
        others = ("mtime", "updated", "last_modified", "created")
        mark = next((str(told[name]) for name in (*marks, *others) if told.get(name)), "")
        found = Status(told["size"], hash_int(mark) >> 2)
        _stats[str(self)] = time.monotonic(), found
        return found

    def exists(self, **how: Any) -> bool:
        try:
            self._told()
        except FileNotFoundError:
            return False
        return True

    def is_file(self, **how: Any) -> bool:
        return self.exists() and self._told().get("type") != "directory"

    def is_dir(self, **how: Any) -> bool:
        return not str(self).startswith("http") and self.exists() and self._told().get("type") == "directory"

    def iterdir(self) -> Iterator[Path]:
        names = self._tried(lambda system: system.ls(str(self), detail=False))
        return iter([self._named(name) for name in names])

    def found(self) -> list[Path]:
        """The files of a pattern."""
        return [self._named(name) for name in self._tried(lambda system: system.glob(str(self)))]

    def walked(self) -> Iterator[tuple[Path, list[str]]]:
        """Folders with the names of their files, hidden ones left out, in order."""
        folders: dict[Path, list[str]] = {}
        for name in self._tried(lambda system: system.find(str(self))):
            path = self._named(name)
            if not any(part.startswith(".") for part in path.relative_to(self).parts):
                folders.setdefault(path.parent, []).append(path.name)
        return iter([(folder, sorted(folders[folder])) for folder in sorted(folders)])

    def read_bytes(self) -> bytes:
        content: bytes = self._tried(lambda system: system.cat_file(str(self)))
        return content

    def open(self, mode: str = "rb", *args: Any, **how: Any) -> Any:
        if mode != "rb":
            raise RemoteError(self.shown, "it is only read, and as bytes")
        return io.BufferedReader(_Ranges(self), _READ_AHEAD)

    def range(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` up to ``end``."""

        def ask(system: Any) -> bytes:
            content: bytes = system.cat_file(str(self), start=start, end=end)
            if len(content) > end - start:
                raise RemoteError(self.shown, "the server does not answer with parts of a file")
            if len(content) < end - start:
                raise ConnectionError(f"the answer ended after {len(content)} of {end - start} bytes")
            return content

        return self._tried(ask)

    def _told(self) -> dict[str, Any]:
        told: dict[str, Any] = self._tried(lambda system: system.info(str(self)))
        return told

    def _named(self, name: str) -> RemotePath:
        scheme = str(self).partition("://")[0]
        return RemotePath(name if is_url(name) else f"{scheme}://{name.lstrip('/')}")

    def _tried(self, action: Callable[[Any], T]) -> T:
        for pause in (*_PAUSES, None):
            try:
                return action(_system(str(self).partition("://")[0], self.shown))
            except (DataError, ConfigError):
                raise
            except Exception as error:
                cause = _cause(error)
                if isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) in (404, 410):
                    raise FileNotFoundError(2, "No such file or directory", self.shown) from error
                if pause is None or not _may_pass(cause):
                    raise RemoteError(self.shown, _described(cause)) from error
                time.sleep(pause)
        raise AssertionError


class _Ranges(io.RawIOBase):
    """A file of which every read asks for a range."""

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.size, self.at + len(buffer))
        if end <= self.at:
            return 0
        content = self.path.range(self.at, end)
        buffer[: len(content)] = content
        self.at = end
        return len(content)


def _system(scheme: str, where: str) -> Any:
    """fsspec's reader for a scheme: one in each process, because its connections are not for a fork."""
    key = os.getpid(), scheme
    if key not in _systems:
        try:
            import fsspec

            how: dict[str, Any] = {}
            if scheme in ("http", "https"):
                import aiohttp

                how = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_read=_ANSWER_SECONDS)}}
            _systems[key] = fsspec.filesystem(scheme, skip_instance_cache=True, **how)
        except ImportError as error:
            package = _PACKAGES.get(scheme, "a package for it")
            raise ConfigError(
                f"{where}: reading it needs fsspec and {package}; install the extra: pip install -e "
                '".[remote]"'
            ) from error
        except ValueError as error:
            raise ConfigError(f"{where}: fsspec does not know {scheme}://") from error
    return _systems[key]


def _cause(error: BaseException) -> BaseException:
    """fsspec calls everything that goes wrong over HTTP a missing file; the cause tells what it was."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _may_pass(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(error, OSError | TimeoutError) or type(error).__module__.startswith(
        ("aiohttp", "asyncio")
    )


def _described(error: BaseException) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"{status} {getattr(error, 'message', '')}".strip()
    return " ".join(str(error).split())[:300] or type(error).__name__
