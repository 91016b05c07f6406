"""Distil transformers with a `transformers.Trainer` whose loss follows the layers of a trained teacher."""

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers.students import project_embeddings, student_from_teacher
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import CURRICULUM_EXTRACTION, Stage, StageScheduler
from hf_curriculum_distill.trainer import CurriculumDistillationTrainer

__all__ = [
    "CURRICULUM_EXTRACTION",
    "CurriculumDistillationConfig",
    "CurriculumDistillationTrainer",
    "ProjectionBank",
    "Stage",
    "StageScheduler",
    "project_embeddings",
    "student_from_teacher",
]
