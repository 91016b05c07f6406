"""The former path of [`hf_curriculum_distill.planning`]."""

from hf_curriculum_distill.planning import *  # noqa: F403
