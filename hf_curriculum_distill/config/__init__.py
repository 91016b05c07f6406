"""Every knob of a distillation run, and the checks of their values."""

from hf_curriculum_distill.config.checks import METHODS, UNCACHED_METHODS
from hf_curriculum_distill.config.distillation import CurriculumDistillationConfig
from hf_curriculum_distill.config.extended import extended

__all__ = ["METHODS", "UNCACHED_METHODS", "CurriculumDistillationConfig", "extended"]
