"""Files that are written completely or not at all, and folders that can be written."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Write a file under another name, and give it its own at the end of the block.

    A link at `path` is replaced, too: what it points to stays as it is. If the block fails, `path` stays as it is.

    Args:
        path: the file to write or replace.

    Yields:
        The path of a new empty file in the same folder, to be written inside the block.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    partial = f"{os.fspath(path)}.{secrets.token_hex(4)}.partial"
    open(partial, "xb").close()  # fails if something has this name already, rather than follow a link
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            os.remove(partial)
        raise


def check_writable(folder: str, option: str, contents: str) -> None:
    """Make a folder if there is none, and check now, rather than when it is needed, that files can be written there.

    Args:
        folder: to be written.
        option: name of the argument that the user gave it in.
        contents: what is going to be written there, in the plural.

    Raises:
        OSError: the folder cannot be made, or nothing can be written there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"{option} {folder} cannot be written ({error}), and {contents} go there; pass another one."
        ) from error


def write_files(contents: Mapping[str, bytes]) -> None:
    """Write files, each completely or not at all.

    Args:
        contents: `path -> bytes`.

    Raises:
        OSError: one of the paths is a folder, or a symbolic link, which may lead to any file; then none is written.
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
