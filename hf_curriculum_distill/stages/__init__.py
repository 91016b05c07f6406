"""Which losses are trained when: stages, the map from optimizer step to stage, what a stage freezes. Pure Python."""

from hf_curriculum_distill.stages.curriculum import (
    CURRICULUM_EXTRACTION,
    LAYER_ORDERS,
    check_layer_range,
    check_stage_depths,
    curriculum_stages,
    matched_pairs,
    resolve_layer_map,
    rising_groups,
)
from hf_curriculum_distill.stages.freezing import finished_layer, frozen_layer
from hf_curriculum_distill.stages.scheduler import StageScheduler
from hf_curriculum_distill.stages.stage import LayerPair, Stage, parse_layer_pairs, parse_stages

__all__ = [
    "CURRICULUM_EXTRACTION",
    "LAYER_ORDERS",
    "LayerPair",
    "Stage",
    "StageScheduler",
    "check_layer_range",
    "check_stage_depths",
    "curriculum_stages",
    "finished_layer",
    "frozen_layer",
    "matched_pairs",
    "parse_layer_pairs",
    "parse_stages",
    "resolve_layer_map",
    "rising_groups",
]
