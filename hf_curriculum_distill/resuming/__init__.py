"""Training that can be killed at any moment and goes on, to the bit, as if it had not been."""

from hf_curriculum_distill.resuming.trainer import ResumableTrainer

__all__ = ["ResumableTrainer"]
