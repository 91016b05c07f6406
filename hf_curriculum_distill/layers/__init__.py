"""Inside a model: its stack of blocks, a run of a prefix, logits of some rows that are never whole, students of it."""

from hf_curriculum_distill.layers.blocks import find_block_stack
from hf_curriculum_distill.layers.chunks import RowLogits
from hf_curriculum_distill.layers.configurations import student_size
from hf_curriculum_distill.layers.forward import PartialForward, Wanted
from hf_curriculum_distill.layers.heads import auxiliary_loss, predicts_next_token
from hf_curriculum_distill.layers.students import make_student

__all__ = [
    "PartialForward",
    "RowLogits",
    "Wanted",
    "auxiliary_loss",
    "find_block_stack",
    "make_student",
    "predicts_next_token",
    "student_size",
]
