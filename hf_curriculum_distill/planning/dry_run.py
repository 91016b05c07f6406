"""A stage's micro-batch on models without values: operations, trained parameters and memory."""

from hf_curriculum_distill.cost import DryRun

__all__ = ["DryRun"]
