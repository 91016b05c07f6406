"""What a report says of a student and its teacher is what their logits say."""

import dataclasses
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import tiny_bert
from transformers import BertForSequenceClassification

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.report.fidelity import calibration_error, measure_fidelity, reliability
from hf_curriculum_distill.stages import matched_pairs


@pytest.fixture
def trainer(student, teacher, examples, config):
    args = config(method="one_shot", stages=None)
    return CurriculumDistillationTrainer(student, args, eval_dataset=examples[:10], teacher_model=teacher)


def test_the_means_over_rows_are_the_metrics_of_an_evaluation(trainer):
    fidelity = measure_fidelity(trainer, num_examples=3)
    evaluated, rows = trainer.evaluate(), fidelity.rows
    assert rows["kl"].mean() == pytest.approx(evaluated["eval_kl"])
    assert (rows["student"] == rows["teacher"]).mean() == pytest.approx(evaluated["eval_agreement"])
    assert (rows["student"] == rows["label"]).mean() == pytest.approx(evaluated["eval_accuracy"])
    assert (rows["teacher"] == rows["label"]).mean() == pytest.approx(fidelity.metrics["eval_teacher_accuracy"])
    assert {name: fidelity.metrics[name] for name in ("eval_kl", "eval_loss")} == {
        name: pytest.approx(evaluated[name]) for name in ("eval_kl", "eval_loss")
    }


def test_the_worst_examples_are_those_of_the_highest_mean_divergence_with_their_tokens(trainer, examples, teacher):
    worst = measure_fidelity(trainer, num_examples=3).examples
    whole = measure_fidelity(trainer, num_examples=100).examples
    assert [example.number for example in worst] == [example.number for example in whole[:3]]
    assert sorted(example.number for example in whole) == list(range(10))
    assert [example.kl for example in whole] == sorted((example.kl for example in whole), reverse=True)
    for example in whole:
        given = examples[example.number]
        assert np.array_equal(example.inputs, given["input_ids"][given["attention_mask"].bool()])
        labelled = (given["labels"] != -100).nonzero().squeeze(1)
        assert np.array_equal(example.rows["position"], labelled)
        assert np.array_equal(example.rows["label"], given["labels"][labelled])
        with torch.no_grad():
            logits = teacher(given["input_ids"][None], given["attention_mask"][None]).logits[0, labelled]
        assert np.array_equal(example.rows["teacher"], logits.argmax(-1))
        assert example.rows["teacher_confidence"] == pytest.approx(logits.softmax(-1).max(-1)[0].numpy(), rel=1e-4)


def test_a_model_is_faithful_to_itself(teacher, examples, config):
    args = config(method="one_shot", stages=None)
    trainer = CurriculumDistillationTrainer(teacher, args, eval_dataset=examples[:8], teacher_model=deepcopy(teacher))
    metrics = measure_fidelity(trainer).metrics
    assert metrics["eval_agreement"] == 1 and metrics["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["eval_ece"] == pytest.approx(metrics["eval_teacher_ece"])


def test_layers_are_compared_where_the_bank_is_calibrated(student, teacher, examples, config):
    args = config(evaluate_layers=True, max_steps=4)
    trainer = CurriculumDistillationTrainer(
        student, args, train_dataset=examples, eval_dataset=examples[:8], teacher_model=teacher
    )
    assert measure_fidelity(trainer).pairs == ()
    trainer.train()
    fidelity = measure_fidelity(trainer)
    assert fidelity.pairs == tuple(matched_pairs(trainer.stages))
    assert all(fidelity.metrics[f"eval_layer_{layer}_mse"] > 0 for layer, _ in fidelity.pairs)


def test_of_a_classifier_a_row_is_an_example(examples, config):
    kind = {"model_class": BertForSequenceClassification, "initializer_range": 0.3}
    student, teacher = (tiny_bert(depth, seed=depth, **kind) for depth in (2, 4))
    data = [{**example, "labels": torch.tensor(index % 2)} for index, example in enumerate(examples[:6])]
    args = config(method="one_shot", stages=None)
    trainer = CurriculumDistillationTrainer(student, args, eval_dataset=data, teacher_model=teacher)
    fidelity = measure_fidelity(trainer)
    assert sorted(fidelity.rows["label"]) == [0, 0, 0, 1, 1, 1]
    assert [example.rows["position"].tolist() for example in fidelity.examples] == [[-1]] * 6


def test_without_a_teacher_there_is_nothing_to_compare(student, examples, config):
    args = dataclasses.replace(config(), stages=[{"label_weight": 1.0}], method="curriculum")
    trainer = CurriculumDistillationTrainer(student, args, eval_dataset=examples[:4])
    with pytest.raises(ValueError, match="has no teacher; a report compares a student with its teacher"):
        measure_fidelity(trainer)


def test_the_calibration_error_is_that_of_the_formula():
    generator = np.random.default_rng(0)
    confidence, right = generator.uniform(size=500), generator.uniform(size=500) < 0.4
    error = 0.0
    for index in range(15):
        inside = (confidence >= index / 15) & (confidence < (index + 1) / 15)
        error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, right) == pytest.approx(error)
    shares, _, _ = reliability(np.array([1.0, 0.0]), np.array([True, False]))  # the ends are in the outer bins
    assert shares.tolist() == [0.5, 0.5]
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
