"""What a training is made of before its first step."""

from hf_curriculum_distill.preparing.trainer import PreparedTrainer

__all__ = ["PreparedTrainer"]
