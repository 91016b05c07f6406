"""The calibration sample is drawn alike everywhere and checked as training data is; the bank is the one of args."""

import copy
import dataclasses
import itertools
import random

import pytest
import torch
from conftest import masked_lm_examples, tiny_bert
from torch.utils.data import DataLoader
from transformers import BertForMaskedLM, default_data_collator

from hf_curriculum_distill import ProjectionBank, Stage
from hf_curriculum_distill.batches.batch import BatchReader
from hf_curriculum_distill.complexity.analysis import Drawn, compare_layers
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.preparing.calibration import bank_settings, checked, make_bank, measure_layers, sample
from hf_curriculum_distill.teachers.teacher import Teacher

PAIRS = [(1, 2), (2, 4)]

# ---- the sample ----


def test_a_seed_draws_the_same_examples_each_once_and_all_where_there_are_fewer():
    data = list(range(100))
    drawn = sample(data, 10, random.Random(3))
    assert drawn == sample(data, 10, random.Random(3)) != sample(data, 10, random.Random(4))
    assert len(set(drawn)) == 10 and set(drawn) <= set(data)
    assert sorted(sample(data, 101, random.Random(3))) == data
    random.seed(5)
    first = sample(data, 10)
    random.seed(5)
    assert sample(data, 10) == first
    assert sample([], 10) == []


def test_of_a_stream_the_first_examples_are_drawn_and_no_more_are_read():
    stream = itertools.count()
    assert sample(stream, 3) == [0, 1, 2]
    assert next(stream) == 3
    assert sample(iter([1, 2]), 3) == [1, 2]


# ---- its batches ----


@pytest.fixture
def check(config, student):
    """The batches of some examples, two at a time, as calibration gets them."""

    def check(examples, needs_logits=True, reads_labels=True):
        read = BatchReader(PartialForward(student), None, config(), reads_labels=reads_labels)
        return list(checked(DataLoader(examples, 2), read, lambda inputs: inputs, needs_logits))

    return check


def without_labels(examples):
    return [example | {"labels": torch.full_like(example["labels"], -100)} for example in examples]


def test_the_batches_are_those_of_the_loader(check):
    examples = masked_lm_examples(5)
    batches = check(examples)
    assert torch.equal(
        torch.cat([batch.inputs["input_ids"] for batch in batches]), torch.stack([e["input_ids"] for e in examples])
    )


@pytest.mark.parametrize("needs_logits", [True, False])
@pytest.mark.parametrize("reads_labels", [True, False])
def test_a_sample_in_which_no_label_counts_is_refused_where_labels_say_which_logits_do(
    check, needs_logits, reads_labels
):
    examples = without_labels(masked_lm_examples(4))
    if needs_logits and reads_labels:
        with pytest.raises(ValueError, match="In the whole calibration sample no label counts"):
            check(examples)
    else:
        assert len(check(examples, needs_logits, reads_labels)) == 2


def test_one_label_that_counts_or_no_labels_at_all_are_enough(check):
    examples = without_labels(masked_lm_examples(4))
    examples[3]["labels"][0] = 7
    assert len(check(examples)) == 2
    for example in examples:
        del example["labels"]
    assert len(check(examples)) == 2


def test_a_bad_batch_is_named_whatever_is_wrong_with_it(check):
    examples = masked_lm_examples(4)
    negative = [*examples[:3], examples[3] | {"input_ids": torch.full((12,), -1)}]
    with pytest.raises(ValueError, match=r"^The batch of the calibration sample cannot be used: "):
        check(negative)
    with pytest.raises(ValueError, match=r"^The batch of the calibration sample cannot be used: "):
        check([*examples[:3], {"input_ids": examples[3]["input_ids"]}])  # which no collator can put together


# ---- the bank ----


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"projection": "orthogonal"},
        {"projection": "rademacher", "projection_seed": 4},
        {"shared_projection": True},
        {"projection": "pca"},
    ],
    ids=str,
)
def test_the_bank_is_the_one_of_the_arguments(config, fields):
    args = config(**fields)
    bank = make_bank(PAIRS, 16, 24, args)
    assert bank.shapes == dict.fromkeys(PAIRS, (16, 24)) and not bank.frozen
    drawn = {"kind": args.projection, "seed": args.projection_seed, "shared": args.shared_projection}
    assert bank.metadata == drawn | {"teacher": None}
    assert bank.fingerprint == ProjectionBank.create(PAIRS, [16, 16], [24, 24], **drawn).fingerprint
    if args.projection == "pca":
        assert bank.lacks_matrices
        return
    first, second = (bank.tensors()[f"layer_{student}_{teacher}.weight"] for student, teacher in PAIRS)
    assert torch.equal(first, second) == args.shared_projection


def test_another_bank_is_needed_where_an_argument_that_it_depends_on_has_changed_and_only_there(config):
    args, differ = config(), set()
    for field in dataclasses.fields(args):
        changed = copy.copy(args)
        setattr(changed, field.name, "another value")
        if bank_settings(changed) != bank_settings(args):
            differ.add(field.name)
    drawn = {"projection", "projection_seed", "shared_projection"}
    measured = {"standardize_targets", "calibration_samples", "hidden_positions", "layer_stack"}
    assert differ == drawn | measured
    assert bank_settings(copy.copy(args)) == bank_settings(args)


# ---- the layers' complexity ----


class Fused(torch.autograd.Function):
    """An operation as fused kernels define theirs, of which torch.func cannot take gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class FusedBert(BertForMaskedLM):
    def __init__(self, config):
        super().__init__(config)
        self.bert.embeddings.LayerNorm.register_forward_hook(lambda *args: Fused.apply(args[-1]))


@pytest.fixture
def batches(config, teacher):
    """Three batches of a student of the class, and its teacher with a bank that was fitted to them."""

    def make(model_class=BertForMaskedLM):
        student, examples = tiny_bert(2, seed=1, model_class=model_class), masked_lm_examples(6)
        of_teacher = Teacher(teacher)
        read = BatchReader(PartialForward(student), of_teacher.partial_forward, config())
        read_batches = [read(default_data_collator(examples[start : start + 2])) for start in (0, 2, 4)]
        of_teacher.fit(bank := make_bank(PAIRS, 16, 24, config()), read_batches)
        of_teacher.prepare(bank)
        return read_batches, of_teacher

    return make


def test_each_draw_is_of_another_batch(batches):
    read, teacher = batches()
    measured = measure_layers(iter(read), teacher, PAIRS)
    assert list(measured) == PAIRS
    for draw, batch in enumerate(read):
        targets = teacher.targets(batch, Stage(hidden=PAIRS)).hidden
        expected = compare_layers(batch, targets, drawn=Drawn(128, 1, seed=draw))
        assert [measured[pair][draw] for pair in PAIRS] == [expected[layer] for layer, _ in PAIRS]
    more = itertools.chain(read, read[:1], iter(lambda: pytest.fail("a fifth batch is read"), None))
    assert [len(draws) for draws in measure_layers(more, teacher, PAIRS).values()] == [4, 4]


def test_a_draw_in_which_nothing_counts_is_refused(batches, config):
    (read, *_), teacher = batches()
    reader = BatchReader(PartialForward(read.model), teacher.partial_forward, config(hidden_positions="labels"))
    empty = reader(read.inputs | {"labels": torch.full_like(read.inputs["labels"], -100)})
    with pytest.raises(ValueError, match="drew 2 examples in which no hidden state counts; raise calibration_samples"):
        measure_layers([empty], teacher, PAIRS)


def test_a_student_without_gradients_of_single_examples_is_refused(batches):
    read, teacher = batches(FusedBert)
    with pytest.raises(ValueError, match=r"gradients of FusedBert for one example at a time, which fails: .*; use"):
        measure_layers(iter(read), teacher, PAIRS)
