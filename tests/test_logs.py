"""The library's messages are seen where those of transformers are."""

import logging

from transformers.utils import logging as hf_logging

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.logs import get_logger


def test_verbosity_of_transformers_is_that_of_the_library():
    before = hf_logging.get_verbosity()
    try:
        for level in (logging.INFO, logging.ERROR):
            hf_logging.set_verbosity(level)
            assert get_logger("hf_curriculum_distill.some.module").getEffectiveLevel() == level
    finally:
        hf_logging.set_verbosity(before)


def test_stages_are_announced_with_the_log_level_of_the_arguments(student, teacher, examples, config, caplog):
    before = hf_logging.get_verbosity()
    try:
        args = config(max_steps=2, method="one_shot", log_level="info")
        CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher).train()
    finally:
        hf_logging.set_verbosity(before)
    assert "Stage 1 of 1: kl (steps 1 to 2)" in caplog.messages
