import pytest
from conftest import tiny_bert
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from hf_curriculum_distill import CurriculumDistillationTrainer

from .plans import examples_for, peak_bytes, planned


def test_an_optimizer_that_cannot_be_tried_counts_as_adam_and_that_is_said(tmp_path):
    student, teacher = tiny_bert(2), tiny_bert(4)
    unknown, adam = (planned(tmp_path, student, teacher, optim=name) for name in ("adamw_anyprecision", "adamw_torch"))
    assert unknown.stages[0]["memory"]["optimizer"] == adam.stages[0]["memory"]["optimizer"]
    message = (
        "optimizer: adamw_anyprecision is counted as Adam, for it cannot be tried here: ValueError: Please install"
    )
    assert unknown.assumptions[-1].startswith(message) and unknown.assumptions[:-1] == adam.assumptions


class ProfiledStep(TrainerCallback):
    """The most that an optimizer's last step held."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.record.__enter__()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.record.__exit__(None, None, None)
        self.peak = peak_bytes(self.record)


def test_an_optimizers_own_step_counts_where_it_needs_more_than_the_passes(tmp_path, config, monkeypatch):
    """Few tokens' activations are nothing beside Adafactor's squares and updates, each as large as the embeddings."""
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    student, teacher = (tiny_bert(1, vocab_size=5000, tie_word_embeddings=False) for _ in range(2))
    fields = {"optim": "adafactor", "per_device_train_batch_size": 1, "method": "one_shot", "max_steps": 2}
    memory = planned(tmp_path, student, teacher, **fields).total["memory"]
    step, data = ProfiledStep(), examples_for(student)
    CurriculumDistillationTrainer(
        student, config(**fields), train_dataset=data, teacher_model=teacher, callbacks=[step]
    ).train()
    held = sum(memory[name] for name in ("teacher", "student", "gradients", "optimizer"))
    assert memory["total"] - held == pytest.approx(step.peak, rel=0.05) and step.peak > 2 * 4 * 5000 * 16
