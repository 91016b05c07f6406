"""Random draws kept apart, so that what one part of a run draws changes nothing in another."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore Python's, NumPy's and torch's random states (current accelerator included) on leaving.

    With a seed, the block inside starts from it.
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class RandomStream:
    """Random states of the host that go on, whenever they are active, where they stopped the last time.

    Loading data draws from such a stream, so that it neither changes what training draws (dropout) nor depends on it.
    NumPy forgets the second of a pair of normal numbers when streams change.
    """

    def __init__(self):
        self._states = random.getstate(), np.random.MT19937(), torch.get_rng_state()

    def restart(self, *seed: object) -> None:
        with self:
            seed_host(*seed)

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_) -> None:
        self._exchange()

    def _exchange(self) -> None:
        python, numpy, host = self._states
        # NumPy's generator itself: to read and write its state takes longer than the rest together
        self._states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
        random.setstate(python)
        np.random.set_bit_generator(numpy)
        torch.set_rng_state(host)


def seed_host(*seed: object) -> None:
    """Start Python's, NumPy's and torch's generators of the host from anything that prints the same every time."""
    number = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "big")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
