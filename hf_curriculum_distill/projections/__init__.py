"""Fixed projections of the teacher's hidden states: the student's targets in the layer stages."""

from hf_curriculum_distill.projections.bank import ProjectionBank
from hf_curriculum_distill.projections.files import FILE_NAME
from hf_curriculum_distill.projections.matrices import PROJECTIONS

__all__ = ["FILE_NAME", "PROJECTIONS", "ProjectionBank"]
