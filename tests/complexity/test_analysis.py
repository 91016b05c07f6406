"""The complexity of a batch's labels, teacher and hidden targets for a student."""

import itertools

import pytest
import torch
from conftest import masked_lm_examples, tiny_bert
from transformers import BertForMaskedLM, BertForSequenceClassification, default_data_collator

from hf_curriculum_distill import ProjectionBank, Stage, empirical_ntk, supervision_complexity
from hf_curriculum_distill.batches.batch import BatchReader
from hf_curriculum_distill.complexity import (
    class_targets,
    compare_layers,
    hidden_states,
    measure_complexity,
    relative_complexity,
)
from hf_curriculum_distill.complexity.analysis import Drawn
from hf_curriculum_distill.layers import PartialForward
from hf_curriculum_distill.teachers import Teacher

EVERYTHING = Stage(hidden=[(1, 2), (2, 4)], kl_weight=1.0, label_weight=1.0)


@pytest.fixture
def measured(config):
    """A batch of a student of the class, its teacher, and their bank."""

    def make(model_class, inputs, **sizes):
        student = tiny_bert(2, width=8, seed=1, model_class=model_class, **sizes)
        teacher = Teacher(tiny_bert(4, width=12, seed=2, initializer_range=0.3, model_class=model_class, **sizes))
        hooked = PartialForward(student)  # as in a training
        hooked.install()
        batch = BatchReader(hooked, teacher.partial_forward, config())(inputs, whole_logits=True)
        bank = ProjectionBank.create(EVERYTHING.hidden, [8, 8], [12, 12])
        teacher.fit(bank, [batch])
        teacher.prepare(bank)
        return batch, teacher, bank

    return make


def classified(count):
    inputs = default_data_collator(masked_lm_examples(count))
    return inputs | {"labels": torch.arange(count) % 3}


def test_of_a_classifier_everything_is_what_its_own_kernel_says(measured):
    inputs = classified(8)
    batch, teacher, bank = measured(BertForSequenceClassification, inputs, num_labels=3)
    actual = measure_complexity(batch, teacher, EVERYTHING, temperature=2.0)
    assert list(actual) == ["labels", "random labels", "teacher", "layer 1", "layer 2"]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    kernel = empirical_ntk(batch.model, inputs, "trace")
    labels = class_targets(torch.nn.functional.one_hot(batch.labels, 3))
    assert actual["labels"] == pytest.approx(supervision_complexity(kernel, labels))
    with torch.no_grad():
        outputs = teacher.model(**inputs, output_hidden_states=True)
    probabilities = class_targets((outputs.logits / 2).softmax(-1))
    assert actual["teacher"] == pytest.approx(supervision_complexity(kernel, probabilities))
    rows = inputs["attention_mask"].flatten().nonzero().flatten()
    kernel = empirical_ntk(batch.model, inputs, "trace", hidden_states(1), rows)
    hidden = bank.project(1, outputs.hidden_states[2]).flatten(0, 1)[rows]
    assert actual["layer 1"] == pytest.approx(supervision_complexity(kernel, hidden), rel=1e-3)


def test_of_a_masked_language_model_the_labelled_rows_are_measured(measured):
    inputs = default_data_collator(masked_lm_examples(6))
    batch, teacher, _ = measured(BertForMaskedLM, inputs)
    actual = measure_complexity(batch, teacher, EVERYTHING, max_rows=10, num_directions=4)
    assert list(actual) == ["labels", "random labels", "teacher", "layer 1", "layer 2"]
    assert all(one.value > 0 and one.at_tenth_ridge >= one.value for one in actual.values())
    assert actual == measure_complexity(batch, teacher, EVERYTHING, max_rows=10, num_directions=4)
    assert actual != measure_complexity(batch, teacher, EVERYTHING, max_rows=10, num_directions=4, seed=1)


def test_what_a_stage_does_not_match_is_not_measured(measured):
    batch, teacher, _ = measured(BertForSequenceClassification, classified(3), num_labels=3)
    assert list(measure_complexity(batch, teacher, Stage(hidden=[(2, 4)]), num_directions=2)) == ["layer 2"]
    without = {name: value for name, value in batch.inputs.items() if name != "labels"}
    batch = BatchReader(batch._reader.student, teacher.partial_forward, batch._reader.args)(without)
    assert list(measure_complexity(batch, teacher, Stage(kl_weight=1.0))) == ["random labels", "teacher"]


def test_a_student_that_predicts_numbers_is_refused(measured):
    inputs = classified(3) | {"labels": torch.ones(3)}
    batch, teacher, _ = measured(BertForSequenceClassification, inputs, num_labels=1)
    with pytest.raises(ValueError, match="BertForSequenceClassification predicts numbers"):
        measure_complexity(batch, teacher, Stage(kl_weight=1.0))


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_drawn_at_random_have_a_mean_square_of_at_least_one(classes):
    """Over all labellings, it is `Tr K * Tr K^-1 / n^2` exactly; every label has a mean square of 1."""
    features = torch.randn(4, 6, dtype=torch.float64)
    kernel = features @ features.T
    values = []
    for labels in itertools.product(range(classes), repeat=4):
        targets = class_targets(torch.nn.functional.one_hot(torch.tensor(labels), classes))
        assert float(targets.square().mean()) == pytest.approx(1)
        values.append(supervision_complexity(kernel, targets, ridge=0).value)
    mean_square = sum(value**2 for value in values) / len(values)
    assert mean_square == pytest.approx(float(kernel.trace() * torch.linalg.inv(kernel).trace()) / 16)
    assert mean_square >= 1


def test_layers_are_compared_on_the_same_rows(measured):
    inputs = default_data_collator(masked_lm_examples(3))
    batch, teacher, _ = measured(BertForMaskedLM, inputs)
    hidden = teacher.targets(batch, EVERYTHING).hidden
    rows = inputs["attention_mask"].flatten().nonzero().flatten()
    expected = {}
    for layer in (1, 2):
        kernel = empirical_ntk(batch.model, batch.student_inputs, "trace", hidden_states(layer), rows)
        expected[layer] = relative_complexity(kernel, hidden[layer].flatten(0, 1)[rows])
    assert compare_layers(batch, hidden) == pytest.approx(expected)
    drawn = Drawn(max_rows=5, num_directions=2, seed=1)
    together = compare_layers(batch, hidden, drawn=drawn)
    assert together == {layer: compare_layers(batch, {layer: hidden[layer]}, drawn=drawn)[layer] for layer in (2, 1)}
