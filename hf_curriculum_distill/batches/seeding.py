"""Batches that are the same whenever they are loaded: after a resume, by other workers, between other random draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_curriculum_distill.batches.randomness import RandomStream, seed_host

_UNSEEDED = -1


class SeededBatches(Dataset):
    """A dataset whose random draws, and its collator's, depend on the seed, the epoch and the batch's examples alone.

    Inside [`seeded`], the process that loads a batch (a worker, or the main one) first seeds its generators. Masks and
    augmentation then need no history: a resumed run skips batches without loading them.

    Args:
        data: a dataset with `__getitem__` and `__len__`.
        seed: any objects whose `repr` is the same in every process.
    """

    def __init__(self, data: Any, *seed: object):
        self.data = data
        self.epoch = torch.tensor(_UNSEEDED).share_memory_()  # so that persistent workers see it change
        self._seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]

    def set_epoch(self, epoch: int) -> None:
        """Pass on the number of the epoch, which some datasets depend on; accelerate calls this as an epoch begins."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The examples of one batch; a DataLoader calls this."""
        if (epoch := int(self.epoch)) != _UNSEEDED:
            seed_host(*self._seed, epoch, *map(int, indices))
        if hasattr(self.data, "__getitems__"):
            return self.data.__getitems__(indices)
        return [self.data[index] for index in indices]


class SeededSampler(Sampler):
    """A sampler whose order depends on the seed and the epoch of its [`SeededBatches`] alone.

    The number of epochs that a process has run, its workers and other random draws do not matter. If the sampler draws
    from a `torch.Generator`, as torch's and transformers' can, the order is that of accelerate's
    `SeedableRandomSampler`, which Trainer uses.

    Args:
        sampler: of indices into `batches`.
        batches: what the DataLoader reads.
        seed: of the order.
    """

    def __init__(self, sampler: Sampler, batches: SeededBatches, seed: int):
        self._sampler, self._batches, self._seed = sampler, batches, seed

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        epoch, stream = max(0, int(self._batches.epoch)), RandomStream()
        if hasattr(self._sampler, "generator"):
            self._sampler.generator = torch.Generator()
            self._sampler.generator.manual_seed(self._seed + epoch)
        if hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(epoch)
        stream.restart(self._seed, epoch)
        with stream:
            order = iter(self._sampler)
        while True:
            with stream:
                indices = list(itertools.islice(order, 1024))  # changing streams takes longer than drawing one
            if not indices:
                return
            yield from indices


def seed_batches(dataloader: DataLoader, epoch: int | None) -> None:
    """Seed the batches of a dataloader of [`SeededBatches`] from now on; one of anything else is left alone.

    Args:
        dataloader: not iterated over yet, plain or as accelerate prepared it.
        epoch: from 0; None ends the seeding.
    """
    batches = getattr(dataloader, "dataset", None)
    if not isinstance(batches, SeededBatches):
        return
    if epoch is None:
        batches.epoch.fill_(_UNSEEDED)
        return
    batches.epoch.fill_(epoch)
    batches.set_epoch(epoch)  # accelerate leaves that out where it skips batches
    sampler = dataloader.batch_sampler
    while sampler is not None:  # nor does accelerate's own call reach a batch sampler if there are several processes
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        sampler = getattr(sampler, "batch_sampler", None)


@contextmanager
def seeded(dataloader: DataLoader, epoch: int) -> Iterator[None]:
    """Seed the batches of a dataloader, as [`seed_batches`] does, inside the block."""
    seed_batches(dataloader, epoch)
    try:
        yield
    finally:
        seed_batches(dataloader, None)
