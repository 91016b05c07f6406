"""A restarted schedule is transformers' own, once over each stage."""

import itertools
import math

import pytest
import torch
from conftest import masked_lm_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from hf_curriculum_distill import CurriculumDistillationTrainer, Stage, StageScheduler
from hf_curriculum_distill.schedules import restarted_schedule


def stock_learning_rates(name, num_steps, warmup_ratio, kwargs, learning_rate=1.0):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=learning_rate)
    warmup = math.ceil(warmup_ratio * num_steps)
    schedule = get_scheduler(name, optimizer, warmup, num_steps, kwargs)
    rates = []
    for _ in range(num_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("inverse_sqrt", {}),
        ("warmup_stable_decay", {"num_decay_steps": 2}),
    ],
)
@settings(deadline=None, max_examples=20)
@given(ends=st.sets(st.integers(1, 29), max_size=4), warmup_ratio=st.floats(0, 1))
def test_each_stage_runs_the_stock_schedule_from_its_start(name, kwargs, ends, warmup_ratio):
    stages = StageScheduler([Stage(kl_weight=1.0, until=end) for end in [*sorted(ends), None]], max_steps=30)
    factor = restarted_schedule(stages, name, 1.0, warmup_ratio, kwargs)
    lengths = [end - start for start, end in itertools.pairwise([0, *sorted(ends), 30])]
    expected = [rate for length in lengths for rate in stock_learning_rates(name, length, warmup_ratio, kwargs)]
    rates = {step: factor(step) for step in reversed(range(30))}  # a function of the step, in whatever order
    assert [rates[step] for step in range(30)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_the_schedule_has_a_value_after_its_last_step(name):
    stages = StageScheduler([Stage(hidden=[(1, 1)], until=4), Stage(kl_weight=1.0)], max_steps=20)
    assert math.isfinite(restarted_schedule(stages, name, 1.0, 0.2, {})(20))


@pytest.mark.parametrize(
    "name, kwargs", [("cosine_with_min_lr", {"min_lr": 2e-4}), ("polynomial", {"lr_end": 2e-4, "power": 2.0})]
)
def test_learning_rates_among_the_schedules_options_are_absolute(config, student, teacher, name, kwargs):
    args = config(
        restart_schedule_per_stage=True,
        stage_warmup_ratio=0.25,
        learning_rate=1e-3,
        max_steps=16,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=kwargs,
    )
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=masked_lm_examples(16), teacher_model=teacher)
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    expected = [rate for length in (4, 4, 8) for rate in stock_learning_rates(name, length, 0.25, kwargs, 1e-3)]
    assert rates == pytest.approx(expected)
