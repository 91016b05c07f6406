"""What a run will cost, before it runs: checks, stages, operations, time and memory, found on models without values."""

from hf_curriculum_distill.planning.arguments import PlanArguments, PlannedConfig
from hf_curriculum_distill.planning.gpus import GPUS
from hf_curriculum_distill.planning.models import SIZES, find_config, find_size, is_config_only, is_hub_name
from hf_curriculum_distill.planning.plan import Plan, make_plan
from hf_curriculum_distill.planning.recipes import recipe_defaults, unread_options
from hf_curriculum_distill.planning.table import format_plan

__all__ = [
    "GPUS",
    "SIZES",
    "Plan",
    "PlanArguments",
    "PlannedConfig",
    "find_config",
    "find_size",
    "format_plan",
    "is_config_only",
    "is_hub_name",
    "make_plan",
    "recipe_defaults",
    "unread_options",
]
