"""Metrics against plain loops, however the evaluation is cut into batches."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill.metrics import CountedAccuracy, TeacherComparison

ACCELERATOR = Accelerator(cpu=True)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-100, 0, 1, 2, 3])), min_size=1, max_size=30))
def test_counted_accuracy_is_the_share_of_right_predictions_that_count(pairs):
    counted = [(prediction, reference) for prediction, reference in pairs if reference != -100]
    predictions, references = zip(*pairs, strict=True)
    if counted:
        result = CountedAccuracy().compute(predictions=list(predictions), references=np.array(references))
        assert result == {"accuracy": pytest.approx(sum(p == r for p, r in counted) / len(counted))}
    else:
        with pytest.raises(ValueError, match="No reference counts"):
            CountedAccuracy().compute(predictions=list(predictions), references=list(references))


@pytest.mark.parametrize("cut", [[4, 3], [7], [1] * 7, [5, 0, 2]])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_comparison_is_the_slow_mean_over_all_rows(cut, with_teacher):
    generator = torch.Generator().manual_seed(0)
    rows_of = [3, 0, 1, 2, 5, 1, 4]  # the counted rows of each example
    student, teacher = torch.randn(2, sum(rows_of), 6, generator=generator)
    labels = torch.randint(6, (sum(rows_of),), generator=generator)

    comparison, example = TeacherComparison(), 0
    for size in cut:
        start, end = sum(rows_of[:example]), sum(rows_of[: example + size])
        examples = torch.repeat_interleave(
            torch.arange(size), torch.tensor(rows_of[example : example + size], dtype=torch.long)
        )
        target_logits = teacher[start:end] if with_teacher else None
        comparison.update(ACCELERATOR, student[start:end], target_logits, labels[start:end], examples, size)
        example += size

    right, agree, kl = [], [], []
    for ours, theirs, label in zip(student.double(), teacher.double(), labels, strict=True):
        right.append(ours.argmax() == label)
        agree.append(ours.argmax() == theirs.argmax())
        p, q = theirs.softmax(-1), ours.softmax(-1)
        kl.append((p * (p.log() - q.log())).sum())
    expected = {"accuracy": np.mean(right), "agreement": np.mean(agree), "kl": np.mean(kl)}
    names = ("accuracy", "agreement", "kl") if with_teacher else ("accuracy",)
    assert comparison.compute() == {name: pytest.approx(expected[name], rel=1e-5) for name in names}


def test_nothing_compared_is_no_metric():
    assert TeacherComparison().compute() == {}


def test_low_precision_logits_are_compared_in_float32():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    comparison = TeacherComparison()
    comparison.update(ACCELERATOR, logits, logits, logits.argmax(-1), torch.arange(64), 64)
    assert comparison.compute() == {"accuracy": 1.0, "agreement": 1.0, "kl": pytest.approx(0, abs=1e-6)}
