"""Separate random states, so that what one part of a run draws changes nothing in another."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore Python's, NumPy's and torch's random states (current accelerator included) at the end of the block.

    Args:
        seed: that the block starts from; None: from the present states.
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
    """Random states of the host that are active inside a `with` block, and resume in the next one where they stopped.

    Data loading draws from such a stream, so that it neither changes what training draws (dropout) nor depends on it.
    NumPy draws normal numbers in pairs; it forgets the second of a pair when streams change.
    """

    def __init__(self):
        self._states = random.getstate(), np.random.MT19937(), torch.get_rng_state()

    def restart(self, *seed: object) -> None:
        """Start the stream anew; `seed` is as for [`seed_host`]."""
        with self:
            seed_host(*seed)

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_) -> None:
        self._exchange()

    def _exchange(self) -> None:
        python, numpy, host = self._states
        # NumPy's generator as a whole: reading and writing its state takes longer than everything else here
        self._states = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
        random.setstate(python)
        np.random.set_bit_generator(numpy)
        torch.set_rng_state(host)


def seed_host(*seed: object) -> None:
    """Seed Python's, NumPy's and torch's generators of the host.

    Args:
        seed: any objects whose `repr` is the same in every process.
    """
    number = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "big")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
