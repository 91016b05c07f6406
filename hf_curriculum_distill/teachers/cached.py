"""A teacher whose targets are kept: they are computed once, and read in later epochs and by other students."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.layers.chunks import RowLogits
from hf_curriculum_distill.layers.heads import SPAN
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.stages import Stage, matched_pairs
from hf_curriculum_distill.teachers.target_store import Examples, TargetStore
from hf_curriculum_distill.teachers.teacher import Targets, Teacher

logger = get_logger(__name__)


class CachedTeacher:
    """Reads targets from a folder, and runs the teacher and writes its targets for those that are missing.

    What [`targets`] returns was always read from the folder, so that a target is the same the first time and every
    later time. If one is missing, the teacher computes what any stage needs, for the whole batch. So it runs once for
    all stages, and targets do not depend on which records existed.

    Args:
        teacher: computes the targets.
        store: keeps them.
        stages: the stages of the run.
    """

    learns = False

    def __init__(self, teacher: Teacher, store: TargetStore, stages: Sequence[Stage]):
        self._teacher, self._store = teacher, store
        self._wanted = Stage(matched_pairs(stages), kl_weight=float(any(stage.kl_weight for stage in stages)))
        self._seen = self._found = 0

    def wanted(self, stage: Stage) -> Stage:
        """What the teacher computes if it has to run, as a stage: everything that any stage needs."""
        return self._wanted if stage.needs_teacher else stage

    def forward(self, batch: Batch, stage: Stage) -> tuple[dict[int, Tensor], Tensor | RowLogits | None]:
        """The teacher's own outputs, of everything that is wanted: see [`Teacher.forward`]."""
        return self._teacher.forward(self._with_rows(batch), self.wanted(stage))

    def targets(self, batch: Batch, stage: Stage) -> Targets:
        """The projected hidden states and the logits that a stage matches.

        Raises:
            ValueError: an input does not have one entry per example.
            OSError: the folder cannot be written, or records cannot be read back.
        """
        batch = self._with_rows(batch)
        examples, computed = self._examples(batch), False
        missing = self._store.missing(examples, self._wanted)
        self._seen += examples.size
        self._found += examples.size - len(set().union(*missing.values()))
        for _ in range(2):
            if any(missing.values()):
                computed = True
                self._store.write(examples, missing, self._teacher.targets(batch, self._wanted))
            if (targets := self._store.read(examples, stage, batch.main_input.device)) is not None:
                targets.computed = computed
                return targets
            missing = self._store.missing(examples, self._wanted)  # damaged records are missing now
        raise OSError(
            f"teacher_cache {self._store.folder} does not give back what was written to it; check the disk, or use "
            "another."
        )

    def _with_rows(self, batch: Batch) -> Batch:
        """The batch with row numbers, also if all rows count, unless no stage needs logits."""
        if not self._wanted.kl_weight or batch.rows is not None:
            return batch
        all_rows = torch.arange(batch.rows_per_example * len(batch), device=batch.main_input.device)
        return batch.with_rows(all_rows)

    def _examples(self, batch: Batch) -> Examples:
        inputs, rows = self._teacher.known(batch.model_inputs), batch.rows if self._wanted.kl_weight else None
        stack = self._teacher.partial_forward.stack
        return Examples(inputs, rows, batch.rows_per_example, batch.head is SPAN, stack)

    def log_epoch(self, epoch: int) -> None:
        """Log the share of examples that were found in this epoch; warn if a later epoch found few.

        Args:
            epoch: its number, from 0.
        """
        share = self._found / max(1, self._seen)
        logger.info("teacher_cache: %.1f %% of epoch %d were found", 100 * share, epoch + 1)
        if epoch and self._seen and share < 0.5:
            logger.warning(
                "teacher_cache: only %.1f %% of the examples of epoch %d were found in %s. What the teacher reads "
                "changes from epoch to epoch (random masks do that), so a cache costs more than it saves; mask once, "
                "before training, or leave out teacher_cache.",
                100 * share, epoch + 1, self._store.folder,
            )  # fmt: skip
        self._seen = self._found = 0

    def forecast(
        self,
        sample: Sequence[Batch],
        again: Sequence[Batch],
        num_examples: int,
        spans: Sequence[tuple[float, Stage]],
        log: bool = True,
    ) -> int:
        """Log, before training, how much will be written, and the epoch from which the cache saves time.

        Args:
            sample, again: the same batches, loaded twice: what differs between them will differ in each epoch.
            num_examples: the number of different examples in the run.
            spans: the stages, each with its length in epochs.
            log: whether this process logs.

        Returns:
            the number of bytes that will be written.

        Raises:
            OSError: the disk has less free space than will be written.
        """
        folder, first_batch = self._store.folder, self._with_rows(sample[0])
        sample, again = ([self._examples(self._with_rows(batch)) for batch in load] for load in (sample, again))
        keys, other = ([key for examples in load for key in examples.logit_keys] for load in (sample, again))
        same = sum(a == b for a, b in zip(keys, other, strict=True)) / len(keys)
        self._teacher.targets(first_batch, self._wanted)  # a first run, to warm up
        start = time.perf_counter()
        values = self._store.encode(sample[0], self._teacher.targets(first_batch, self._wanted))
        teacher = time.perf_counter() - start
        write, read = self._store.measure(values, sample[0].keys)
        row_bytes = {n: sum(map(len, v)) / max(1, sum(self._store.num_rows(n, sample[0]))) for n, v in values.items()}
        size, num_missing = 0, 0
        for examples in sample:
            missing = self._store.missing(examples, self._wanted)
            num_missing += len(set().union(*missing.values()))
            size += self._store.expected_bytes(examples, missing, row_bytes)
        epochs, miss = sum(length for length, _ in spans), teacher + write
        size = round(size / len(keys) * num_examples * (min(1, epochs) + max(0, epochs - 1) * (1 - same)))
        first = read + num_missing / len(keys) * (miss - read)
        costs = [(length, teacher * self._share(stage)) for length, stage in spans]  # without a cache
        epoch = epoch_that_pays(costs, first, same * read + (1 - same) * miss)
        logger.log(
            logging.DEBUG if not log else logging.INFO if epoch else logging.WARNING,
            "teacher_cache: up to %.3f GB will be written to %s; %s of %.1f (measured on one batch of %d: teacher %.1f "
            "ms, write %.1f ms, read %.1f ms). When loaded again, %.0f %% of a sample of %d examples were the same%s.",
            size / 1e9, folder,
            f"it pays from epoch {epoch}" if epoch else "it does not pay in this run", epochs, sample[0].size,
            1e3 * teacher, 1e3 * write, 1e3 * read, 100 * same, len(keys),
            "" if same == 1 else "; random masks or augmentation leave nothing to read again: mask once, beforehand",
        )  # fmt: skip
        if (free := shutil.disk_usage(folder).free) < size:
            raise OSError(
                f"teacher_cache {folder} has {free / 1e9:.3f} GB free, but {size / 1e9:.3f} GB will be written; make "
                "room, use another disk, lower teacher_cache_logits, or leave out teacher_cache."
            )
        return size

    def _share(self, stage: Stage) -> float:
        """Of the teacher's depth, what a stage runs."""
        return 1.0 if stage.kl_weight else max(stage.teacher_layers, default=0) / self._teacher.partial_forward.depth


def epoch_that_pays(spans: Sequence[tuple[float, float]], first: float, later: float) -> int | None:
    """The first epoch after which a run with a cache has taken less time than one without; None if there is none.

    Args:
        spans: each stage's length in epochs, and the teacher's cost per epoch in it, without a cache.
        first, later: the cost of targets in the first epoch and in each later one, with the cache; in the same unit.

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
