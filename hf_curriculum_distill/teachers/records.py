"""A store of bytes by key on disk, which only grows, verifies what it reads, and may have any number of writers."""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Mapping

from hf_curriculum_distill.logs import get_logger

logger = get_logger(__name__)

_ROW = struct.Struct("<16sQQI")  # a row of an index: key, offset, size in bytes, checksum
ROW_SIZE = _ROW.size


class RecordStore:
    """Records of bytes by key in one folder. Each writer appends to files of its own; everyone reads all files.

    A record exists once its row is in the index, which is written after the record. Every read compares its checksum:
    if a process is killed while it writes, a write is lost or a bit flips, a record is missing, but never wrong.

    Args:
        folder: created if needed.

    ```python
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     RecordStore(folder).write({b"16 bytes of key.": b"record"})
    ...     bytes(RecordStore(folder).read(b"16 bytes of key."))
    b'record'

    ```
    """

    def __init__(self, folder: str):
        self.folder = folder
        self._rows: dict[bytes, tuple[str, int, int, int]] = {}
        self._read: dict[str, int] = {}  # how many bytes of each index were read
        self._maps: dict[str, mmap.mmap] = {}
        self._own: str | None = None
        os.makedirs(folder, exist_ok=True)
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def refresh(self) -> None:
        """Read the rows that others have written since. Of two records with one key, the later file's counts."""
        for name in sorted(entry for entry in os.listdir(self.folder) if entry.endswith(".index")):
            path, start = os.path.join(self.folder, name), self._read.get(name, 0)
            if not os.path.isfile(path) or os.path.getsize(path) < start + ROW_SIZE:
                continue
            with open(path, "rb") as file:
                file.seek(start)
                rows = file.read()
            rows = rows[: len(rows) // ROW_SIZE * ROW_SIZE]  # the last row may still be incomplete
            self._read[name] = start + len(rows)
            for key, *place in _ROW.iter_unpack(rows):
                self._rows[key] = (name.replace(".index", ".data"), *place)

    def read(self, key: bytes) -> memoryview | None:
        """The record of a key that the store contains; None if it is damaged, and then the key is forgotten."""
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
        """Treat a damaged record as missing, until another is written."""
        name = self._rows.pop(key)[0]
        logger.warning("A cached target in %s is damaged; it is computed again", os.path.join(self.folder, name))

    def write(self, records: Mapping[bytes, bytes]) -> None:
        """Append records by key (16 bytes each).

        Raises:
            OSError: the disk is full or fails. Records that were written before stay readable.
        """
        if not records:
            return
        own, self._own = self._own or self._reserve(), None  # after an error, the next call begins new files
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
        """Create empty files under the next free number, which no other writer can get, and return it."""
        number = len(os.listdir(self.folder)) // 2
        while True:
            try:  # mode "x" refuses names that exist, even as links
                for kind in ("index", "data"):
                    open(os.path.join(self.folder, f"{number:06}.{kind}"), "xb").close()
            except FileExistsError:
                number += 1
            else:
                return f"{number:06}"
