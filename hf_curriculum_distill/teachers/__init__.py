"""Who teaches: a frozen model, checkpoints, a teacher that learns alongside, and targets that are kept."""

from hf_curriculum_distill.teachers.cached import CachedTeacher
from hf_curriculum_distill.teachers.checkpoints import (
    CheckpointTeacher,
    check_schedule,
    find_checkpoints,
    schedule_ends,
)
from hf_curriculum_distill.teachers.online import OnlineTeacher
from hf_curriculum_distill.teachers.teacher import FrozenTeacher, Targets, Teacher

__all__ = [
    "CachedTeacher",
    "CheckpointTeacher",
    "FrozenTeacher",
    "OnlineTeacher",
    "Targets",
    "Teacher",
    "check_schedule",
    "find_checkpoints",
    "schedule_ends",
]
