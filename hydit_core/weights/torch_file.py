"""The two formats of ``torch.save``: a zip file (since torch 1.6), and pickles followed by numbers."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

from .pickle_reader import MAX_BYTES, ForeignNames, Refused, Storage, StoredTensor, read_pickle

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def _begins_as_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


class TorchFile:
    """What was saved, with :class:`StoredTensor` for tensors, and where each storage begins in the file.

    Raises:
        Refused, ForeignNames: it holds something that is not accepted.
        Exception: nearly any class, if it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = os.path.getsize(path)
        self._storages: dict[str, Storage] = {}
        self.value: Any
        self._begins: dict[str, int]
        if zipfile.is_zipfile(path):
            self.value, self._begins = self._read_zip()
        elif _begins_as_zip(path):
            raise ValueError("the end of the zip file is missing: it is cut off")
        else:
            self.value, self._begins = self._read_pickles()

    def place(self, tensor: StoredTensor) -> tuple[int, int]:
        """The range of bytes in the file that a tensor is in."""
        begin = self._begins[tensor.storage.key] + tensor.offset * tensor.dtype.itemsize
        return begin, begin + tensor.reach * tensor.dtype.itemsize

    def _read_zip(self) -> tuple[Any, dict[str, int]]:
        with zipfile.ZipFile(self.path) as archive, open(self.path, "rb") as file:
            entries = {info.filename: info for info in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise Refused("two entries of one name")
            pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError("no data.pkl" if not pickles else "several data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}constants.pkl" in entries:
                raise Refused("a TorchScript program, which is code; save its state_dict()")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder")[:10] != b"little":
                raise Refused("big-endian numbers; save it on a little-endian machine")
            if entries[pickles[0]].file_size > MAX_BYTES:
                raise Refused(f"a pickle of more than {MAX_BYTES:,} bytes")
            self._check_stored(entries[pickles[0]])
            value = read_pickle(io.BytesIO(archive.read(pickles[0])), self._storages)
            begins = {}
            for key, storage in self._storages.items():
                info = entries[f"{root}data/{key}"]
                self._check_stored(info)
                begins[key] = self._begin(file, info)
                if self._bytes(storage) > info.file_size:
                    raise ValueError(f"storage {key} is larger than its entry")
        return value, begins

    @staticmethod
    def _check_stored(info: zipfile.ZipInfo) -> None:
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or info.flag_bits & 1:
            raise Refused("compressed or encrypted entries, which torch does not write")

    def _begin(self, file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
        """Where an entry's content begins: after its own header, which may differ from the directory's."""
        file.seek(info.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("an entry without a header")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        begin = info.header_offset + 30 + lengths
        if begin + info.file_size > self.size:
            raise ValueError("an entry beyond the end of the file")
        return begin

    def _read_pickles(self) -> tuple[Any, dict[str, int]]:
        with open(self.path, "rb") as file:
            stream = io.BytesIO(file.read(MAX_BYTES))
            if read_pickle(stream, {}, longest=11) != _MAGIC or read_pickle(stream, {}) != _PROTOCOL:
                raise ValueError("not a file of torch.save")
            system = read_pickle(stream, {})
            if not isinstance(system, dict) or system.get("little_endian") is not True:
                raise Refused("big-endian numbers; save it on a little-endian machine")
            value = read_pickle(stream, self._storages)
            keys = read_pickle(stream, {})
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise ValueError("no list of storages")
            begins, reached = {}, stream.tell()
            for key in keys:
                file.seek(reached)
                count = int.from_bytes(file.read(8), "little")
                storage = self._storages[key]
                if count != storage.length or reached + 8 + self._bytes(storage) > self.size:
                    raise ValueError(f"storage {key} is not whole")
                begins[key] = reached + 8
                reached += 8 + self._bytes(storage)
        return value, begins

    @staticmethod
    def _bytes(storage: Storage) -> int:
        return storage.length * (storage.dtype.itemsize if storage.dtype else 1)


__all__ = ["ForeignNames", "Refused", "StoredTensor", "TorchFile"]
