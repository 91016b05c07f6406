"""Which checkpoints are complete: a process can be killed while it writes one."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.resuming.record import FILE_NAME, read_record

logger = get_logger(__name__)

# The record cannot list its own size, Trainer writes its state after the record, and users edit model cards.
_UNLISTED = (FILE_NAME, TRAINER_STATE_NAME, REPOCARD_NAME)


def list_files(checkpoint: str, *beside: str) -> dict[str, int]:
    """The files of a checkpoint, and their sizes.

    Args:
        checkpoint: its folder.
        beside: other folders that belong to it.

    Returns:
        `path -> bytes`, paths relative to the checkpoint's folder.
    """
    paths = [os.path.join(root, name) for f in (checkpoint, *beside) for root, _, names in os.walk(f) for name in names]
    sizes = {os.path.relpath(path, checkpoint): os.path.getsize(path) for path in sorted(paths)}
    return {path: size for path, size in sizes.items() if path not in _UNLISTED}


def read_whole(checkpoint: str) -> dict[str, Any]:
    """Read the record of a complete checkpoint.

    `curriculum.json` lists the checkpoint's files and their sizes once all of them are written. Only Trainer's own
    state is written later, and it holds the step at which it was written.

    Args:
        checkpoint: its folder.

    Returns:
        What [`read_record`] reads.

    Raises:
        FileNotFoundError: the folder has no record, or a listed file is missing.
        ValueError: the checkpoint was never completed, or a file has another size than the record says.
    """
    record = read_record(checkpoint)
    kind, wrong = ValueError, None
    if "files" not in record:
        wrong = "the run ended while it was written, or it was saved with save_only_model"
    elif lost := [name for name in record["files"] if not os.path.isfile(os.path.join(checkpoint, name))]:
        names = ", ".join(name if name.isprintable() else repr(name) for name in lost)
        kind, wrong = FileNotFoundError, f"{names} is missing"
    else:
        for name, size in record["files"].items():
            if (there := os.path.getsize(os.path.join(checkpoint, name))) != size:
                wrong = f"{name} has {there} bytes of {size}"
        wrong = wrong or _state_mismatch(checkpoint, record["step"])
    if wrong:
        raise kind(
            f"{checkpoint} is not whole: {wrong}. Resume from another checkpoint; resume_from_checkpoint=True finds "
            "the last whole one."
        )
    return record


def find_last_checkpoint(output_dir: str) -> str | None:
    """Find the last complete checkpoint of a run; a warning names each later one, which is not.

    Args:
        output_dir: the run's folder.

    Returns:
        The checkpoint's folder, or None.
    """
    for checkpoint in reversed(sort_checkpoints(output_dir)):
        try:
            read_whole(checkpoint)
        except (OSError, ValueError) as error:
            logger.warning("Skipped: %s", error)
        else:
            return checkpoint
    return None


def remove_unfinished(output_dir: str, step: int) -> None:
    """Remove incomplete checkpoints that a killed process left: rotation would keep them, and delete complete ones.

    Args:
        output_dir: the run's folder.
        step: of the checkpoint that is resumed from; only later ones are removed.
    """
    for checkpoint in sort_checkpoints(output_dir):
        with suppress(OSError, ValueError):
            record = read_record(checkpoint)
            if record["step"] > step and "files" not in record:
                logger.warning("Removed: %s was never written to its end", checkpoint)
                shutil.rmtree(checkpoint)


def _state_mismatch(checkpoint: str, step: int) -> str | None:
    try:
        written = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{TRAINER_STATE_NAME} is not readable ({error})"
    return None if written == step else f"{TRAINER_STATE_NAME} is of step {written}, the rest of {step}"
