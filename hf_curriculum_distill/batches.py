"""Batches that are the same whenever they are loaded: on resume, by other workers, beside other random draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from hf_curriculum_distill.randomness import seed_host


class SeededBatches(Dataset):
    """A dataset whose random draws, and its collator's, depend on the seed, the epoch and the batch's examples alone.

    The generators of the process that loads a batch (a worker, or the main one) are seeded as it begins to, so that
    masks and augmentation need no history: a resumed run skips batches without loading them. `epoch` lies in memory
    shared with persistent workers.
    """

    def __init__(self, data: Any, *seed: object):
        self.data = data
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """What a DataLoader asks for: the examples of one batch."""
        seed_host(*self._seed, int(self.epoch), *map(int, indices))
        if hasattr(self.data, "__getitems__"):
            return self.data.__getitems__(indices)
        return [self.data[index] for index in indices]
