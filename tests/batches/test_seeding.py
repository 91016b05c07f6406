"""Which examples a step gets, and what is drawn for them, follows from the seed, the epoch and the step alone."""

import itertools
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from conftest import VOCAB_SIZE, assert_same_weights, tiny_bert, weights
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.batches.seeding import SeededBatches, SeededSampler, seeded

SIZE = 22


class Shuffled(Sampler):
    """A user's sampler, which draws from whatever generator is at hand, and for ever."""

    def __init__(self, endless=False):
        self.endless = endless

    def __len__(self):
        return SIZE

    def __iter__(self):
        while True:
            order = list(range(SIZE))
            random.shuffle(order)
            np.random.shuffle(order)
            yield from (order[i] for i in torch.randperm(SIZE).tolist())
            if not self.endless:
                return


class SeededByItself(Shuffled):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.epoch)).tolist())


LENGTHS = [index % 7 for index in range(SIZE)]
SAMPLERS = {
    "random": lambda: RandomSampler(range(SIZE)),
    "with a generator": lambda: RandomSampler(range(SIZE), generator=torch.Generator().manual_seed(5)),
    "weighted": lambda: WeightedRandomSampler([1.0] * SIZE, SIZE),
    "subset": lambda: SubsetRandomSampler(range(SIZE)),
    "by length": lambda: LengthGroupedSampler(2, lengths=LENGTHS),
    "a user's": Shuffled,
    "endless": lambda: Shuffled(endless=True),
    "seeded by itself": SeededByItself,
}


def order(sampler, batches, epoch):
    loader = DataLoader(batches, sampler=sampler, batch_size=2)
    with seeded(loader, epoch):
        return list(itertools.islice(sampler, SIZE))


def make(name, seed=0):
    batches = SeededBatches(range(SIZE), seed)
    return SeededSampler(SAMPLERS[name](), batches, seed), batches


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epochs_order_is_a_function_of_the_seed_and_its_number(name):
    sampler, batches = make(name)
    orders = [order(sampler, batches, epoch) for epoch in range(3)]
    assert len({tuple(one) for one in orders}) == 3
    for epoch in (2, 0, 2):  # in a process that has run no other epochs, at a time of other draws
        torch.manual_seed(random.randrange(100))
        np.random.rand()
        assert order(*make(name), epoch) == orders[epoch]
    if name != "seeded by itself":
        assert order(*make(name, seed=1), 0) != orders[0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawing_an_order_draws_from_nothing_else(name):
    sampler, batches = make(name)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    order(sampler, batches, 1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_a_random_order_is_that_of_trainer():
    sampler, batches = make("random", seed=42)
    theirs = SeedableRandomSampler(range(SIZE), data_seed=42)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        assert order(sampler, batches, epoch) == list(theirs)


def test_outside_of_training_the_first_epochs_order_is_seen():
    sampler, batches = make("random")
    assert list(sampler) == list(sampler) == order(sampler, batches, 0)
    assert len(sampler) == SIZE


# ---- through the trainer ----


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        if index >= SIZE:
            raise IndexError(index)
        tokens = torch.arange(3 + index % 6) + 5 + index
        return {"input_ids": tokens % VOCAB_SIZE, "labels": tokens % VOCAB_SIZE}


def collate(examples):
    """Pads, and masks at random."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([e[n] for e in examples], batch_first=True, padding_value=value)
        for n, value in (("input_ids", 0), ("labels", -100))
    )
    return {"input_ids": torch.where(torch.rand(ids.shape) < 0.3, 4, ids), "labels": labels}


class Watched(CurriculumDistillationTrainer):
    sampler = None

    def __init__(self, *args, **kwargs):
        self.seen, self.first_tokens = [], {}
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler()

    def training_step(self, model, inputs, *args):
        self.seen.append((self.state.global_step, inputs["input_ids"].tolist()))
        self.first_tokens.setdefault(self.state.global_step, []).extend(inputs["labels"][:, 0].tolist())
        return super().training_step(model, inputs, *args)


WORKERS = {
    "no worker": {},
    "workers": {"dataloader_num_workers": 1},
    "workers that stay": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
}
ORDERS = {
    "random": {},
    "random, kept": {"dataloader_drop_last": True, "gradient_accumulation_steps": 2},
    "not seedable": {"accelerator_config": {"use_seedable_sampler": False}},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "rebalanced": {"train_sampling_strategy": "batch_rebalance"},
    "sequential": {"train_sampling_strategy": "sequential"},
    "a user's": {"sampler": Shuffled},
}


@pytest.fixture
def run(config, teacher):
    def run(folder="run", checkpoint=None, sampler=None, **fields):
        args = config(
            folder, **{"method": "one_shot", "max_steps": -1, "num_train_epochs": 3, "logging_strategy": "no"} | fields
        )
        trainer = Watched(
            tiny_bert(1, seed=1), args, data_collator=collate, train_dataset=Data(), teacher_model=teacher
        )
        trainer.sampler = sampler
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.seen, weights(trainer.model), trainer.args.output_dir

    return run


@pytest.mark.parametrize("order", ORDERS)
def test_a_resumed_run_sees_the_batches_that_it_would_have_seen_whatever_loads_them(run, order):
    fields = ORDERS[order]
    seen, expected, folder = run(save_strategy="steps", save_steps=1, **fields)
    epoch = (seen[-1][0] + 1) // 3  # steps
    for workers, step in zip(WORKERS, (epoch, epoch + 2, 2 * epoch), strict=True):
        again, resumed, _ = run("resumed", f"{folder}/checkpoint-{step}", **fields, **WORKERS[workers])
        assert again == [batch for batch in seen if batch[0] >= step], (workers, step)
        assert_same_weights(resumed, expected)


@pytest.mark.parametrize("order", ["by length", "a user's"])
def test_workers_change_no_batch(run, order):
    whole = [run(workers, **ORDERS[order], **fields)[0] for workers, fields in WORKERS.items()]
    assert whole[0] == whole[1] == whole[2]
    assert len(whole[0]) == 18


def test_an_order_does_not_depend_on_what_was_seeded_before_training(run):
    seen = run(max_steps=8)[0]
    torch.manual_seed(999)
    assert run("again", max_steps=8)[0] == seen


# ---- what may not change ----


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (Data()[index] for index in range(SIZE))


CHANGES = {
    "seed": ({"seed": 7}, "data.seed changed from 42 to 7"),
    "data seed": ({"data_seed": 7}, "data.seed changed from 42 to 7"),
    "strategy": (
        {"train_sampling_strategy": "group_by_length"},
        "data.train_sampling_strategy changed from 'random' to 'group_by_length'",
    ),
    "drop": ({"dataloader_drop_last": True}, "data.dataloader_drop_last changed from False to True"),
    "batch": ({"per_device_train_batch_size": 2}, "samples_per_step changed from 4 to 2"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "samples_per_step changed from 4 to 8"),
    "fewer": ({"data": list(range(20))}, "data.num_examples changed from 22 to 20"),
    "stream": ({"data": Stream()}, "data.num_examples changed from 22 to None"),
}


@pytest.fixture
def trainer(config, teacher):
    def build(folder="run", data=None, **fields):
        args = config(
            folder, **{"method": "one_shot", "max_steps": 2, "save_strategy": "steps", "save_steps": 1} | fields
        )
        data = Data() if data is None else data
        data = [Data()[index] for index in data] if isinstance(data, list) else data
        return Watched(tiny_bert(1, seed=1), args, data_collator=collate, train_dataset=data, teacher_model=teacher)

    return build


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_the_order_of_the_data_is_refused(trainer, name):
    fields, message = CHANGES[name]
    first = trainer()
    first.train()
    checkpoint = f"{first.args.output_dir}/checkpoint-1"
    changed = trainer("changed", **fields)
    with pytest.raises(ValueError, match=f"written by a run with other settings.*{message}"):
        changed.train(resume_from_checkpoint=checkpoint)
    assert changed.state.global_step == 0
    ignoring = trainer("ignoring", ignore_data_skip=True, **fields)  # which says that other batches are welcome
    ignoring.train(resume_from_checkpoint=checkpoint)
    assert ignoring.state.global_step == 2


IN_ONE, IN_TWO = {}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("before, after", [(IN_ONE, IN_TWO), (IN_TWO, IN_ONE)], ids=["cut", "joined"])
@pytest.mark.parametrize("data", [Data, Stream])
def test_the_same_batch_may_be_cut_otherwise_and_loaded_by_any_number_of_workers(trainer, data, before, after):
    first = trainer(data=data(), max_steps=9, **before)
    first.train()
    for step in (2, 7):  # in the first pass over the data, and in the second
        workers = {"dataloader_num_workers": 1} if data is Data else {}
        resumed = trainer("cut", data=data(), max_steps=9, save_strategy="no", **after, **workers)
        resumed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-{step}")
        assert resumed.state.global_step == 9
        assert [resumed.first_tokens[s] for s in (step, step + 1)] == [first.first_tokens[s] for s in (step, step + 1)]


@pytest.mark.parametrize(
    "fields", [{"data": Stream(), "dataloader_num_workers": 2}, {"dataloader_drop_last": True}], ids=["workers", "drop"]
)
def test_where_other_micro_batches_are_of_other_examples_they_are_refused(trainer, fields):
    first = trainer(**fields, **IN_TWO)
    first.train()
    changed = trainer("changed", **fields)
    with pytest.raises(ValueError, match="gradient_accumulation_steps changed from 2 to 1"):
        changed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")


@pytest.mark.parametrize("before, after", [(0, 1), (1, 2)])
def test_the_number_of_workers_that_read_a_stream_may_not_change(trainer, before, after):
    first = trainer(data=Stream(), dataloader_num_workers=before)
    first.train()
    checkpoint = f"{first.args.output_dir}/checkpoint-1"
    trainer("again", data=Stream(), dataloader_num_workers=before).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=f"data.dataloader_num_workers changed from {before} to {after}"):
        trainer("other", data=Stream(), dataloader_num_workers=after).train(resume_from_checkpoint=checkpoint)
