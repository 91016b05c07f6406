"""The teacher's targets on disk: what was answered once is read in later epochs, and by other students.

A record is what one target holds of one example, under a hash of what the teacher read of it; so neither the order of
the data nor batches nor trailing padding matter. Records of other teachers, matrices or precisions lie in folders of
other names.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_curriculum_distill.chunks import RowLogits
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.files import replacing
from hf_curriculum_distill.losses import TopLogits, top_logits
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.store import ROW_SIZE, RecordStore
from hf_curriculum_distill.teachers import FrozenTeacher, weights_fingerprint

logger = logging.getLogger(__name__)

_FORMAT_VERSION = 1
_LOGITS = "logits"  # the name of their target; hidden states have their student layer's number
_SAYS_NOTHING = ("architectures", "dtype", "torch_dtype", "transformers_version")  # in a config, about the answers


class Question(NamedTuple):
    """What is asked about a batch.

    Args:
        inputs: what the teacher reads.
        rows: of the flattened logits, those that count; None where no logits are wanted.
        answers: how many rows of logits each example has.
        ask: asks the teacher, for the whole batch; returns projected hidden states by student layer, and logits.
    """

    inputs: Mapping[str, Any]
    rows: Tensor | None
    answers: int
    ask: Callable[[], tuple[dict[int, Tensor], Tensor | None]]


class _Examples:
    """The examples of a batch: their keys, and how much of each target is theirs."""

    def __init__(self, question: Question):
        inputs, rows, answers, _ = question
        tensors = {name: value.detach().cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
        self.size = len(next(iter(tensors.values())))
        if wrong := [name for name, tensor in tensors.items() if not tensor.dim() or len(tensor) != self.size]:
            raise ValueError(
                f"{wrong[0]} has shape {tuple(tensors[wrong[0]].shape)} in a batch of {self.size}; teacher_cache needs "
                "inputs with one entry an example. Use a collator without packing, or leave out teacher_cache."
            )
        tokens = tensors["input_ids"].shape[:2] if "input_ids" in tensors else None
        self.length = None if tokens is None else tokens[1]
        self.lengths = [self.length] * self.size
        mask = tensors.get("attention_mask")
        if mask is not None and mask.shape == tokens:  # what trails the last token of the mask, nobody sees
            self.lengths = (mask.ne(0) * torch.arange(1, self.length + 1)).amax(1).tolist()
        rows = torch.empty(0, dtype=torch.long) if rows is None else rows.cpu()
        self.counts = torch.bincount(rows // answers, minlength=self.size).tolist()
        positions = (rows % answers).split(self.counts)
        self.keys, self.logit_keys = [], []
        for index, (length, own) in enumerate(zip(self.lengths, positions, strict=True)):
            digest = hashlib.blake2b(digest_size=16)
            for name, tensor in sorted(tensors.items()):
                value = tensor[index, :length] if tensor.shape[:2] == tokens else tensor[index]
                digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
                digest.update(_bytes(value))
            self.keys.append(digest.digest())
            digest.update(b"rows " + _bytes(own))
            self.logit_keys.append(digest.digest())


class TeacherCache:
    """Reads targets from a folder, asks the teacher for those that are not there, and writes them.

    Hidden states are stored projected, in bfloat16; logits as the `teacher_cache_logits` likeliest classes and the
    weight of the rest, or whole, in float32. Whoever asked, what is returned was read from the records: a target
    is the same the first time and every later time.

    Attributes:
        asked: whether the teacher was asked for the last batch.
    """

    def __init__(self, teacher: FrozenTeacher, bank: ProjectionBank | None, args: CurriculumDistillationConfig):
        self.folder = args.teacher_cache
        os.makedirs(self.folder, exist_ok=True)
        self._bank, self._k, self._temperature = bank, args.teacher_cache_logits, args.temperature
        config = {n: v for n, v in teacher.model.config.to_dict().items() if n[0] != "_" and n not in _SAYS_NOTHING}
        self._teacher = {
            "format_version": _FORMAT_VERSION,
            "teacher": weights_fingerprint(teacher.model, samples=2**62),  # every value: the folder outlives the run
            "class": type(teacher.model).__name__,
            "config": json.loads(json.dumps(config, default=str)),
            "dtype": str(teacher.model.dtype),
            "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        }
        self._records: dict[int | str, RecordStore] = {}
        self._row_sizes: dict[int | str, int] = {}  # in bytes, once the teacher was asked
        self.asked = False
        self._seen = self._found = 0

    def targets(
        self, question: Question, stage: Stage, asked: Stage
    ) -> tuple[dict[int, Tensor], Tensor | TopLogits | None]:
        """A stage's projected hidden states by student layer, float32, and the logits of the rows that count.

        Where anything is missing the teacher answers `asked`, what any stage wants, and for the whole batch: so it
        runs once for all stages, and its answers don't depend on what was there before.
        """
        examples = _Examples(question)
        device = next(value.device for value in question.inputs.values() if isinstance(value, Tensor))
        self.asked = False
        missing = self._missing(examples, asked)
        self._seen += examples.size
        self._found += examples.size - len(set().union(*missing.values()))
        for _ in range(2):
            if any(missing.values()):
                self.asked = True
                self._write(examples, missing, *question.ask())
            if (found := self._read(examples, stage, device)) is not None:
                return found
            missing = self._missing(examples, asked)  # what was damaged
        raise OSError(
            f"teacher_cache {self.folder} does not give back what was written to it; check the disk, or use another."
        )

    def log_epoch(self, epoch: int) -> None:
        """Say how much was found; warn where later epochs find little."""
        share = self._found / max(1, self._seen)
        logger.info("teacher_cache: %.1f %% of epoch %d were found", 100 * share, epoch + 1)
        if epoch and self._seen and share < 0.5:
            logger.warning(
                "teacher_cache: only %.1f %% of the examples of epoch %d were found in %s. What the teacher reads "
                "changes from epoch to epoch (random masks do that), so a cache costs more than it saves; mask once, "
                "before training, or leave out teacher_cache.",
                100 * share, epoch + 1, self.folder,
            )  # fmt: skip
        self._seen = self._found = 0

    def forecast(
        self,
        sample: Sequence[Question],
        again: Sequence[Question],
        asked: Stage,
        num_examples: int,
        spans: Sequence[tuple[float, float]],
        aloud: bool = True,
    ) -> None:
        """Say, before training, how much will be written and from which epoch on it pays.

        Args:
            sample, again: some batches of the data, loaded twice; what differs will differ in each epoch.
            asked: what will be written.
            num_examples: how many different examples the run will see.
            spans: for each stage, how many epochs it lasts and to what share of its depth it runs the teacher.
            aloud: whether this process is the one that says so.

        Raises:
            OSError: there is less room than will be written.
        """
        ask, (sample, again) = sample[0].ask, ([_Examples(one) for one in load] for load in (sample, again))
        keys, other = ([key for examples in load for key in examples.logit_keys] for load in (sample, again))
        same = sum(a == b for a, b in zip(keys, other, strict=True)) / len(keys)
        (teacher, write, read), values = self._measure(sample[0], ask)
        units = {n: sum(map(len, own)) / max(1, sum(self._lengths(n, sample[0]))) for n, own in values.items()}
        size, num_missing = 0, 0
        for examples in sample:
            missing = self._missing(examples, asked)
            num_missing += len(set().union(*missing.values()))
            for target, lacking in missing.items():
                size += sum(ROW_SIZE + units[target] * self._lengths(target, examples)[i] for i in lacking)
        epochs, miss = sum(length for length, _ in spans), teacher + write
        size = round(size / len(keys) * num_examples * (min(1, epochs) + max(0, epochs - 1) * (1 - same)))
        first = read + num_missing / len(keys) * (miss - read)
        epoch = epoch_that_pays([(e, s * teacher) for e, s in spans], first, same * read + (1 - same) * miss)
        self.forecast_bytes, self.forecast_epoch = size, epoch
        logger.log(
            logging.DEBUG if not aloud else logging.INFO if epoch else logging.WARNING,
            "teacher_cache: up to %.3f GB will be written to %s; %s of %.1f (measured on one batch of %d: teacher %.1f "
            "ms, write %.1f ms, read %.1f ms). When loaded again, %.0f %% of a sample of %d examples were the same%s.",
            size / 1e9, self.folder,
            f"it pays from epoch {epoch}" if epoch else "it does not pay in this run", epochs, sample[0].size,
            1e3 * teacher, 1e3 * write, 1e3 * read, 100 * same, len(keys),
            "" if same == 1 else "; random masks or augmentation leave nothing to read again: mask once, beforehand",
        )  # fmt: skip
        if (free := shutil.disk_usage(self.folder).free) < size:
            raise OSError(
                f"teacher_cache {self.folder} has {free / 1e9:.3f} GB free, but {size / 1e9:.3f} GB will be written; "
                "make room, use another disk, lower teacher_cache_logits, or leave out teacher_cache."
            )

    def _measure(self, examples: _Examples, ask: Callable) -> tuple[tuple[float, float, float], dict]:
        """Seconds to ask about a batch, to write and to read it, and its records by target."""
        ask()  # warms up
        moments = [time.perf_counter()]
        values = self._encode(examples, *ask())
        moments.append(time.perf_counter())
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            for target, own in values.items():
                RecordStore(os.path.join(folder, str(target))).write(dict(zip(examples.keys, own, strict=True)))
            moments.append(time.perf_counter())
            for target in values:
                records = RecordStore(os.path.join(folder, str(target)))
                for key in examples.keys:
                    records.read(key)
            moments.append(time.perf_counter())
        teacher, write, read = (b - a for a, b in itertools.pairwise(moments))
        return (teacher, write, read), values

    # ---- records ----

    def _records_of(self, target: int | str) -> RecordStore:
        if target not in self._records:
            facts = {"target": "logits", "k": self._k, "temperature": self._temperature if self._k else None}
            if target != _LOGITS:
                (teacher_layer,) = [t for s, t in self._bank.layer_pairs if s == target]
                tensors = (
                    self._bank.tensors()[f"layer_{target}_{teacher_layer}.{n}"] for n in ("weight", "mean", "std")
                )
                matrix = hashlib.sha256(b"".join(f"{t.shape}".encode() + _bytes(t.cpu()) for t in tensors)).hexdigest()
                facts = {"target": "hidden", "teacher_layer": teacher_layer, "projection": matrix}
            described = json.dumps(self._teacher | facts, sort_keys=True, indent=2)
            folder = os.path.join(self.folder, hashlib.sha256(described.encode()).hexdigest()[:32])
            self._records[target] = RecordStore(folder)
            description = os.path.join(folder, "description.json")
            with replacing(description) as path, open(path, "w", encoding="utf-8") as file:
                file.write(described)  # for who looks; nothing reads it
        return self._records[target]

    def _targets_of(self, stage: Stage) -> list[int | str]:
        return [*stage.student_layers, *([_LOGITS] if stage.kl_weight else [])]

    def _keys(self, target: int | str, examples: _Examples) -> list[bytes]:
        return examples.logit_keys if target == _LOGITS else examples.keys

    def _missing(self, examples: _Examples, stage: Stage) -> dict[int | str, list[int]]:
        def look() -> dict[int | str, list[int]]:
            keys = {target: self._keys(target, examples) for target in self._targets_of(stage)}
            return {t: [i for i, key in enumerate(own) if key not in self._records_of(t)] for t, own in keys.items()}

        missing = look()
        if any(missing.values()):  # another process may have them by now
            for target in missing:
                self._records_of(target).refresh()
            missing = look()
        return missing

    def _write(self, examples: _Examples, missing: Mapping[int | str, list[int]], hidden, logits) -> None:
        values = self._encode(examples, hidden, logits)
        for target, lacking in missing.items():
            keys = self._keys(target, examples)
            try:
                self._records_of(target).write({keys[i]: values[target][i] for i in lacking})
            except OSError as error:
                raise OSError(
                    f"teacher_cache {self.folder} cannot be written ({error}). Make room and resume from the last "
                    "checkpoint, what was written stays good; or start without teacher_cache."
                ) from error

    def _encode(self, examples: _Examples, hidden: Mapping[int, Tensor], logits: Tensor | None):
        """Each example's record, by target."""
        values: dict[int | str, list[bytes]] = {}
        for layer, states in hidden.items():
            states = states.bfloat16().cpu()
            values[layer] = [_bytes(own[:length]) for own, length in zip(states, examples.lengths, strict=True)]
        if logits is not None:
            pieces = (logits[rows] for rows in logits.chunks()) if isinstance(logits, RowLogits) else [logits]
            numbers = torch.cat([self._encode_logits(piece).cpu() for piece in pieces])
            values[_LOGITS] = [_bytes(own) for own in numbers.split(examples.counts)]
        for target, own in values.items():
            if num_rows := sum(self._lengths(target, examples)):
                self._row_sizes[target] = sum(map(len, own)) // num_rows
        return values

    def _encode_logits(self, logits: Tensor) -> Tensor:
        if self._k is None or logits.shape[-1] <= self._k:
            return logits.float()
        top = top_logits(logits, self._k, self._temperature)
        return torch.cat([top.log_probabilities, top.classes.int().view(torch.float32)], -1)

    def _read(self, examples: _Examples, stage: Stage, device: torch.device):
        """What [`targets`] returns; None if a record is damaged."""
        records = {
            t: [self._records_of(t).read(key) for key in self._keys(t, examples)] for t in self._targets_of(stage)
        }
        if any(record is None for own in records.values() for record in own):
            return None
        row_sizes = {target: self._row_size(target, examples, own) for target, own in records.items()}
        if wrong := [target for target, size in row_sizes.items() if size is None]:
            for target in wrong:
                for key in set(self._keys(target, examples)):
                    self._records_of(target).forget(key)
            return None
        hidden, logits = {}, None
        for target, own in records.items():
            if target == _LOGITS:
                numbers = np.frombuffer(b"".join(own), np.int32).reshape(sum(examples.counts), row_sizes[target] // 4)
                logits = self._decode_logits(torch.from_numpy(numbers.copy()).view(torch.float32).to(device))
                continue
            width = self._bank.shapes[next(pair for pair in stage.hidden if pair[0] == target)][0]
            arrays = [np.frombuffer(record, np.int16).reshape(-1, width) for record in own]
            states = np.zeros((examples.size, examples.length or len(arrays[0]), width), np.int16)
            for index, array in enumerate(arrays):
                states[index, : len(array)] = array  # the rest is padding, which counts nowhere
            hidden[target] = torch.from_numpy(states).view(torch.bfloat16).to(device).float()
        return hidden, logits

    def _row_size(self, target: int | str, examples: _Examples, records: Sequence[memoryview]) -> int | None:
        """Bytes of each row of these records; None if that cannot be, or is not the same for all of them."""
        lengths = self._lengths(target, examples)
        # what the teacher's own rows had or, before it was asked, what these have on average
        size = self._row_sizes.get(target, sum(map(len, records)) // max(1, sum(lengths)))
        if target == _LOGITS:
            whole = size % 4 == 0 and (self._k is None or size // 4 <= self._k or size // 4 == 2 * self._k + 1)
        else:
            state = 2 * self._bank.shapes[next(pair for pair in self._bank.layer_pairs if pair[0] == target)][0]
            whole = size % state == 0 if examples.length is None else size == state
        return size if whole and all(len(r) == n * size for r, n in zip(records, lengths, strict=True)) else None

    def _decode_logits(self, numbers: Tensor) -> Tensor | TopLogits:
        if self._k is None or numbers.shape[-1] <= self._k:
            return numbers
        log_probabilities, classes = numbers.split([self._k + 1, self._k], -1)
        return TopLogits(log_probabilities, classes.contiguous().view(torch.int32).long())

    def _lengths(self, target: int | str, examples: _Examples) -> list[int]:
        """How many rows each example's record has; without tokens all have equally many."""
        if target == _LOGITS:
            return examples.counts
        return [1 if length is None else length for length in examples.lengths]


def epoch_that_pays(spans: Sequence[tuple[float, float]], first: float, later: float) -> int | None:
    """The first epoch behind which a run with a cache is ahead of one without, or None.

    Args:
        spans: for each stage, how many epochs it lasts and what the teacher costs in it an epoch, without a cache.
        first, later: what targets cost in the first epoch and in each later one, with it.

    ```python
    >>> epoch_that_pays([(4, 1.0)], first=1.5, later=0.1)
    2
    >>> epoch_that_pays([(1, 1.0)], first=1.5, later=0.1) is None
    True

    ```
    """
    total = sum(length for length, _ in spans)
    for epoch in range(1, math.ceil(total) + 1):
        end, begin, without = min(epoch, total), 0.0, 0.0
        for length, cost in spans:
            without += cost * max(0.0, min(end, begin + length) - begin)
            begin += length
        if first * min(end, 1) + later * max(0.0, end - 1) <= without:
            return epoch
    return None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
