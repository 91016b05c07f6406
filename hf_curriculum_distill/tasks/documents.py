"""Documents of the Hub or of files: those to train on, and those held out."""

from __future__ import annotations

import os
from itertools import islice

from datasets import Dataset, IterableDataset, load_dataset

from hf_curriculum_distill.options import TextOptions


def load_documents(
    options: TextOptions, streaming: bool = False
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Load the documents of a data set of the Hub, or of a file or folder of parquet, JSON or text files.

    Args:
        options: which data set, and how many documents.
        streaming: whether to read them while training instead of before. The documents to train on are then shuffled in
            a buffer and without end, so that no process runs out of its files before another.

    Returns:
        the documents to train on; and those held out, which are the validation split if there is one.
    """
    config = options.dataset_config
    if config is None and options.dataset == "wikimedia/wikipedia":
        config = "20231101.en"
    folder, file = os.path.split(options.dataset) if os.path.isfile(options.dataset) else (options.dataset, None)
    documents = load_dataset(folder or ".", config, data_files=file, streaming=streaming)
    train, num_heldout = documents["train"], options.heldout_documents
    if "validation" in documents:
        heldout = documents["validation"]
    elif streaming:
        train, heldout = train.skip(num_heldout), train.take(num_heldout)
    else:
        train, heldout = train.train_test_split(test_size=num_heldout, seed=0).values()
    if options.train_documents is not None:
        train = train.take(min(options.train_documents, len(train)) if not streaming else options.train_documents)
    return train.shuffle(seed=0, buffer_size=10_000).repeat(None) if streaming else train, heldout


def evaluated_blocks(blocks: Dataset | IterableDataset, options: TextOptions) -> Dataset:
    """Take the blocks that are evaluated: the first ones are the test set, and as many after them the validation set.

    Args:
        blocks: all that are held out.
        options: `evaluate_on` is "test" or "validation", of `eval_blocks` blocks at most.

    Raises:
        ValueError: there are none.
    """
    first = options.eval_blocks if options.evaluate_on == "validation" else 0
    if not (rows := list(islice(blocks, first, first + options.eval_blocks))):
        raise ValueError(
            f"The held-out text fills no block of {options.block_size} tokens for the {options.evaluate_on} set; raise "
            "--heldout_documents."
        )
    return Dataset.from_list(rows)
