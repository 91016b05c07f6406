"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """The path of a new empty file to write, which takes the place of `path` at the end of the block.

    A link at `path` is replaced, too: what it points to stays as it is. Where the block fails, so does `path`.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    partial = f"{os.fspath(path)}.{secrets.token_hex(4)}.partial"
    open(partial, "xb").close()  # fails, rather than follow a link, where something has this name already
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.remove(partial)
        raise


def write_files(contents: Mapping[str, bytes]) -> None:
    """Write files, each whole or not at all.

    Raises:
        OSError: one of them is a symbolic link, which may lead to any file, or a folder; then none is written.
    """
    for path in contents:
        if os.path.islink(path):
            raise FileExistsError(
                f"{path} is a symbolic link, and what it leads to is not overwritten; remove the link, or write "
                "somewhere else."
            )
        if os.path.isdir(path):
            raise IsADirectoryError(f"{path} is a folder, but a file is to be written there; move it away.")
    for path, content in contents.items():
        with replacing(path) as partial, open(partial, "wb") as file:
            file.write(content)
