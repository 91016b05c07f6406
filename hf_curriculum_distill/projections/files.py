"""Where a bank's file is: in a folder, or in a Hub repository."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import HfApi, snapshot_download

FILE_NAME = "projection_bank.safetensors"


def find_file(folder_or_repo: str | os.PathLike, revision: str | None = None) -> str:
    """The path of the bank's file, which is downloaded from a Hub repository.

    Args:
        folder_or_repo: one that holds it.
        revision: the branch, tag or commit of a Hub repository.

    Raises:
        OSError: there is no such folder, repository or file.
    """
    folder = os.fspath(folder_or_repo)
    if not os.path.isdir(folder):
        try:
            folder = snapshot_download(folder, revision=revision, allow_patterns=FILE_NAME)
        except (OSError, ValueError) as error:
            raise OSError(
                f"{folder!r} is no folder, and there is no such Hub repository within reach ({error}); name the "
                f"folder or repository that holds {FILE_NAME}."
            ) from error
    path = os.path.join(folder, FILE_NAME)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {FILE_NAME} in {folder}; it is saved beside each student.")
    return path


def upload_file(folder: str, repo_id: str, **kwargs: Any) -> str:
    """Upload the bank's file from a folder; returns the commit's address. Arguments as of `push_to_hub` of a bank."""
    api = HfApi(token=kwargs.pop("token", None))
    api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
    path = os.path.join(folder, FILE_NAME)
    return str(api.upload_file(path_or_fileobj=path, path_in_repo=FILE_NAME, repo_id=repo_id, **kwargs))
