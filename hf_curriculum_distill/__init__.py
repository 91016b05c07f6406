"""Distil transformers with a `transformers.Trainer` whose loss follows the layers of a trained teacher."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_curriculum_distill.complexity import empirical_ntk, margin_bound, sketched_ntk, supervision_complexity
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
    "SupervisionComplexityCallback",
    "empirical_ntk",
    "margin_bound",
    "project_embeddings",
    "sketched_ntk",
    "student_from_teacher",
    "supervision_complexity",
]

# public name -> its module, which is imported at the first use: `hf-curriculum-distill --help` needs no torch
_MODULES = {
    "CURRICULUM_EXTRACTION": "stages",
    "CurriculumDistillationConfig": "config",
    "CurriculumDistillationTrainer": "trainer",
    "ProjectionBank": "projections",
    "Stage": "stages",
    "StageScheduler": "stages",
    "SupervisionComplexityCallback": "complexity.along",
    "empirical_ntk": "complexity",
    "margin_bound": "complexity",
    "project_embeddings": "layers.students",
    "sketched_ntk": "complexity",
    "student_from_teacher": "layers.students",
    "supervision_complexity": "complexity",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return globals()[name]
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
