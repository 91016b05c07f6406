"""The comparison of a student with its teacher against plain loops, however the evaluation is cut into batches."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_curriculum_distill.teachers.comparison import TeacherComparison

ACCELERATOR = Accelerator(cpu=True)


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
        teacher_logits = teacher[start:end] if with_teacher else None
        comparison.update(ACCELERATOR, student[start:end], teacher_logits, labels[start:end], examples, size)
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
