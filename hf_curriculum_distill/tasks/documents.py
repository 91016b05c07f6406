"""Documents of the Hub or of files: those to train on, and those held out."""

from __future__ import annotations

from itertools import islice

from datasets import Dataset, IterableDataset

from hf_curriculum_distill.options import TextOptions
from hf_curriculum_distill.tasks.reading import MOST_HELD_OUT, check_text, num_held_out, read_dataset


def load_documents(
    options: TextOptions, streaming: bool = False
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset]:
    """Load the documents of a data set: see [`~hf_curriculum_distill.tasks.reading.read_dataset`].

    Args:
        options: which data set, and how many documents.
        streaming: whether to read them while training instead of before. The documents to train on are then shuffled in
            a buffer and without end, so that no process runs out of its files before another.

    Returns:
        the documents to train on; and those held out, which are the validation split if there is one.

    Raises:
        OSError: there is no such data set within reach.
        ValueError: the data set cannot be read, its column is no text, or it has too few documents.
    """
    source, config = options.dataset, options.dataset_config
    if config is None and source == "wikimedia/wikipedia":
        config = "20231101.en"
    documents = read_dataset(source, config, streaming)
    train, wanted = documents["train"], options.heldout_documents
    check_text(source, train, options.text_column)
    if "validation" in documents:
        heldout = documents["validation"]
        check_text(f"the validation set of {source}", heldout, options.text_column)
    elif streaming:  # of a stream the length is not known
        number = MOST_HELD_OUT if wanted is None else wanted
        train, heldout = train.skip(number), train.take(number)
        if next(iter(train), None) is None:
            raise ValueError(
                f"{source} has no document beside the {number:,} that are held out; lower --heldout_documents, or read "
                "it without --streaming."
            )
    else:
        number = num_held_out(source, len(train), wanted=wanted)
        train, heldout = train.train_test_split(test_size=number, seed=0).values()
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
