"""Sparse parity: the parity of a few coordinates of a random sign vector, and the two-layer network that learns it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput


class SparseParity(Dataset):
    """Uniform `x` in {-1, +1}^dimension and the parity of its coordinates in `support` (counted from 0).

    Any example is a function of the seed and its number, so that a set has any length and takes no memory. The label
    is 1 where the product of the support's coordinates is +1. As tokens, for a causal language model: the bits, then
    the parity, the only token with a label.

    ```python
    >>> SparseParity(1000, dimension=4, support=[0, 2], seed=32)[0]
    {'inputs': tensor([-1.,  1.,  1., -1.]), 'labels': tensor(0)}
    >>> {name: row.tolist() for name, row in SparseParity(1000, 4, [0, 2], 32, as_tokens=True)[0].items()}
    {'input_ids': [0, 1, 1, 0, 0], 'labels': [-100, -100, -100, -100, 0]}

    ```

    Args:
        num_examples: the length of the set.
        dimension: coordinates of `x`.
        support: the coordinates whose parity is the label.
        seed: other seeds give other examples.
        as_tokens: rows for a language model.

    Raises:
        ValueError: the support has no, repeated or unknown coordinates.
    """

    def __init__(self, num_examples: int, dimension: int, support: Sequence[int], seed: int, as_tokens: bool = False):
        if not support or len(set(support)) != len(support) or not all(0 <= i < dimension for i in support):
            raise ValueError(
                f"support is {list(support)}; it must name different coordinates between 0 and {dimension - 1}."
            )
        self.num_examples, self.dimension, self.support = num_examples, dimension, list(support)
        self.seed, self.as_tokens = seed, as_tokens

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.num_examples:
            raise IndexError(f"Example {index} of a set of {self.num_examples}.")
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The examples of a batch, stacked. A data loader calls this where it can, and collates with [`stack`]."""
        bits = random_bits(self.seed, np.asarray(indices, dtype=np.uint64), self.dimension)
        odd_zeros = (1 - bits[:, self.support]).sum(1) % 2
        parity = torch.from_numpy(1 - odd_zeros.astype(np.int64))
        if not self.as_tokens:
            return {"inputs": torch.from_numpy(bits.astype(np.float32)).mul_(2).sub_(1), "labels": parity}
        tokens = torch.cat([torch.from_numpy(bits.astype(np.int64)), parity[:, None]], 1)
        labels = torch.full_like(tokens, -100)
        labels[:, -1] = parity
        return {"input_ids": tokens, "labels": labels}


def random_bits(seed: int, indices: np.ndarray, num_bits: int) -> np.ndarray:
    """`[len(indices), num_bits]` of 0 and 1, from a hash of seed and index (Steele et al., 2014, SplitMix64)."""
    words = -(-num_bits // 64)
    counters = indices.astype(np.uint64)[:, None] * np.uint64(words) + np.arange(words, dtype=np.uint64)
    state = _mix(counters + _mix(np.array([seed], dtype=np.uint64) + _GOLDEN))
    return np.unpackbits(state.astype("<u8").view(np.uint8), axis=1, count=num_bits, bitorder="little")


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_support(dimension: int, sparsity: int, seed: int) -> list[int]:
    """`sparsity` different coordinates below `dimension`, sorted.

    >>> draw_support(50, 6, seed=0)
    [2, 16, 24, 26, 32, 48]
    """
    return sorted(random.Random(seed).sample(range(dimension), sparsity))


def stack(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate examples into a batch; what [`SparseParity.__getitems__`] returns is one already."""
    return batch if isinstance(batch, dict) else default_data_collator(batch)


class ParityMLPConfig(PreTrainedConfig):
    """Sizes of a [`ParityMLPForSequenceClassification`].

    Args:
        input_size: coordinates of an example.
        hidden_size: width of each block.
        num_hidden_layers: blocks.
    """

    model_type = "parity_mlp"

    input_size: int = 50
    hidden_size: int = 100
    num_hidden_layers: int = 1


class ParityMLPForSequenceClassification(PreTrainedModel):
    """Linear, ReLU, Linear(2): each block is a linear map and a ReLU, and its hidden states are a sequence of one."""

    config_class = ParityMLPConfig
    main_input_name = "inputs"

    def __init__(self, config: ParityMLPConfig):
        super().__init__(config)
        sizes = [config.input_size, *[config.hidden_size] * config.num_hidden_layers]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(fan_in, fan_out), nn.ReLU()) for fan_in, fan_out in itertools.pairwise(sizes)
        )
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.reset_parameters()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """`inputs` `[batch, input_size]`, `labels` `[batch]` -> `logits` `[batch, num_labels]`."""
        hidden = inputs[:, None]
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden[:, 0])
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
