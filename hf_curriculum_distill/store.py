"""Bytes by key on disk: only added to, checked when read, written by any number of processes."""

from __future__ import annotations

import logging
import mmap
import os
import struct
import zlib
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_ROW = struct.Struct("<16sQQI")  # of an index: key, offset, bytes, checksum
ROW_SIZE = _ROW.size


class RecordStore:
    """Bytes by key in one folder. Each writer has a file of its own, which only grows; everyone reads all of them.

    A record counts once its row is in the index, which is written after the record. Its checksum is compared whenever
    it is read, so that a process killed while writing, a lost write or a flipped bit costs a record, never a value.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self._rows: dict[bytes, tuple[str, int, int, int]] = {}
        self._read: dict[str, int] = {}  # how far each index was read
        self._maps: dict[str, mmap.mmap] = {}
        self._own: str | None = None
        os.makedirs(folder, exist_ok=True)
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def refresh(self) -> None:
        """See what others have written meanwhile; of two records of a key the one in the later file counts."""
        for name in sorted(entry for entry in os.listdir(self.folder) if entry.endswith(".index")):
            path, start = os.path.join(self.folder, name), self._read.get(name, 0)
            if not os.path.isfile(path) or os.path.getsize(path) < start + ROW_SIZE:
                continue
            with open(path, "rb") as file:
                file.seek(start)
                rows = file.read()
            rows = rows[: len(rows) // ROW_SIZE * ROW_SIZE]  # of a row that is being written only a part is there
            self._read[name] = start + len(rows)
            for key, *place in _ROW.iter_unpack(rows):
                self._rows[key] = (name.replace(".index", ".data"), *place)

    def read(self, key: bytes) -> memoryview | None:
        """The record, or None if it is damaged; then it is forgotten."""
        name, offset, size, checksum = self._rows[key]
        if name not in self._maps or len(self._maps[name]) < offset + size:
            path = os.path.join(self.folder, name)
            if os.path.isfile(path) and os.path.getsize(path):
                with open(path, "rb") as file:
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        record = memoryview(self._maps[name])[offset : offset + size] if name in self._maps else memoryview(b"")
        if len(record) == size and zlib.crc32(record, zlib.crc32(key)) == checksum:
            return record
        self.forget(key)
        return None

    def forget(self, key: bytes) -> None:
        """Leave a record out that is damaged."""
        name = self._rows.pop(key)[0]
        logger.warning("A cached target in %s is damaged; it is asked for anew", os.path.join(self.folder, name))

    def write(self, records: Mapping[bytes, bytes]) -> None:
        """Append records.

        Raises:
            OSError: the disk is full, or fails. What was written before stays good.
        """
        if not records:
            return
        own, self._own = self._own or self._reserve(), None  # after an error another file is begun
        rows = {}
        with open(os.path.join(self.folder, f"{own}.data"), "ab") as file:
            for key, record in records.items():
                rows[key] = (f"{own}.data", file.tell(), len(record), zlib.crc32(record, zlib.crc32(key)))
                file.write(record)
        with open(os.path.join(self.folder, f"{own}.index"), "ab") as file:
            file.write(b"".join(_ROW.pack(key, *row[1:]) for key, row in rows.items()))
            self._read[f"{own}.index"] = file.tell()
        self._rows |= rows
        self._own = own

    def _reserve(self) -> str:
        """The next free number of a file, which no other writer can get."""
        number = len(os.listdir(self.folder)) // 2
        while True:
            try:  # what is there already, be it a link, is not written to
                for kind in ("index", "data"):
                    open(os.path.join(self.folder, f"{number:06}.{kind}"), "xb").close()
            except FileExistsError:
                number += 1
            else:
                return f"{number:06}"
