"""Every knob of a distillation run, validated at construction."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_curriculum_distill.losses import DIVERGENCES
from hf_curriculum_distill.projections import PROJECTIONS
from hf_curriculum_distill.stages import (
    LAYER_ORDERS,
    Stage,
    StageScheduler,
    check_layer_range,
    curriculum_stages,
    parse_layer_pairs,
    resolve_layer_map,
)

METHODS = ("curriculum", "one_shot", "progressive", "online", "labels")
TEACHER_DTYPES = ("float32", "bfloat16", "float16")
# schedules that are no function of the step alone can't be restarted in each stage
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_SWITCHES = (
    "shared_projection",
    "standardize_targets",
    "freeze_matched_layers",
    "truncate",
    "restart_schedule_per_stage",
)


@dataclass
class CurriculumDistillationConfig(TrainingArguments):
    """[`~transformers.TrainingArguments`] plus what is matched, when, and against what.

    Two defaults differ from `TrainingArguments`: `logging_nan_inf_filter=False` (a loss that is not finite is
    reported, never averaged away), and `ddp_find_unused_parameters=True` (a layer stage leaves later blocks unused).

    Raises:
        ValueError: a value is unknown or out of range; everything that needs the models is checked by the trainer.
    """

    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave losses that are nan or inf out of the logged average."}
    )
    method: str = field(
        default="curriculum",
        metadata={
            "help": "Who teaches, and what is matched when: 'curriculum' (hidden states layer by layer, then logits), "
            "'one_shot' (logits only), 'progressive' (logits of the teacher's checkpoints in turn), 'online' (logits "
            "of a teacher that trains alongside) or 'labels' (no teacher's). Without a teacher: the model's own loss, "
            "exactly as transformers.Trainer."
        },
    )
    stages: list | str | None = field(
        default=None,
        metadata={
            "help": "Explicit stages, a list of Stage fields (JSON on the command line), instead of those of `method`: "
            '[{"hidden": [[3, 6]], "until": 0.5}, {"kl_weight": 1.0}].'
        },
    )
    layer_map: list | str | None = field(
        default="uniform",
        metadata={"help": "'uniform', 'last' or [[student_layer, teacher_layer], ...]; blocks count from 1."},
    )
    num_layer_stages: int | None = field(
        default=None,
        metadata={"help": "How many student layers are matched; every block of the student by default."},
    )
    layer_stack: str = field(
        default="encoder",
        metadata={
            "help": "Which blocks of an encoder-decoder are matched: the 'encoder''s, or the 'decoder''s, for which "
            "the whole encoder runs and trains, too. Other models have one stack."
        },
    )
    layer_order: str = field(
        default="sequential",
        metadata={
            "help": "How layer stages follow each other: 'sequential' (one pair a stage, lowest first), 'cumulative' "
            "(each keeps the earlier pairs), 'together' (one stage, all pairs) or 'last' (one stage, highest pair)."
        },
    )
    hidden_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the hidden-state MSE in layer stages; with SGD it scales their learning rate."},
    )
    hidden_weight_in_logit_stage: float = field(
        default=0.0,
        metadata={"help": "Weight of the last layer stage's hidden-state MSE in the logit stage."},
    )
    hidden_positions: str = field(
        default="tokens",
        metadata={
            "help": "Where hidden states are matched: 'tokens' (all that are not padding) or 'labels' (only tokens "
            "whose label counts, as the masked ones)."
        },
    )
    layer_stage_fraction: float = field(
        default=0.5, metadata={"help": "Share of the steps given to the layer stages, split equally among them."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Divides both logits; the divergence is multiplied by its square."}
    )
    divergence: str = field(
        default="forward_kl",
        metadata={"help": "Between teacher's and student's logits: 'forward_kl', 'reverse_kl' or 'jensen_shannon'."},
    )
    label_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on the labels in the logit stage."}
    )
    projection: str = field(
        default="gaussian",
        metadata={"help": "Kind of fixed matrix: 'gaussian', 'rademacher', 'orthogonal' or 'identity' (first units)."},
    )
    projection_seed: int = field(default=0, metadata={"help": "Seed of the projections and of the calibration sample."})
    shared_projection: bool = field(
        default=False,
        metadata={"help": "Whether all layers have the same matrix, so that a residual stream keeps one basis."},
    )
    standardize_targets: bool = field(
        default=True,
        metadata={"help": "Whether projected states are standardised (calibration sample's mean and deviation)."},
    )
    calibration_samples: int = field(
        default=256, metadata={"help": "How many training examples measure the projected states' mean and deviation."}
    )
    train_prefix: str = field(
        default="joint",
        metadata={
            "help": "What a layer stage trains: 'joint' (all blocks up to its layer) or 'block' (only those above the "
            "previous stage's layer)."
        },
    )
    freeze_matched_layers: bool = field(
        default=False,
        metadata={
            "help": "Whether the logit stage leaves all blocks up to the highest matched one as they are; a head that "
            "is tied to the embeddings still trains these."
        },
    )
    truncate: bool = field(
        default=True,
        metadata={"help": "Whether layer stages stop behind their last block; off: whole models, same loss."},
    )
    logit_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of logits, student's and teacher's, that are in memory at a time; 0 for all, by default as "
            "many as fill 4 MiB on a CPU and 128 MiB elsewhere, but at least 96. Loss and operations are the same. All "
            "at once with torch_compile, fp16, FSDP or DeepSpeed, for classifiers and in evaluation."
        },
    )
    restart_schedule_per_stage: bool = field(
        default=False, metadata={"help": "Whether each stage has a learning-rate schedule of its own."}
    )
    stage_warmup_ratio: float = field(
        default=0.2, metadata={"help": "Share of each stage that warms up, with restart_schedule_per_stage."}
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "The teacher's dtype: 'float32', 'bfloat16' or 'float16'; as it was saved by default."},
    )
    teacher_schedule: list | str | None = field(
        default="step",
        metadata={
            "help": "Which checkpoint teaches when, with method='progressive': 'step' (the next one at or after the "
            "student's step), 'fraction' (the same after stretching the teacher's steps to the student's), or the "
            "list of where each but the last stops, as steps or fractions of max_steps (JSON on the command line)."
        },
    )
    teacher_learning_rate: float | None = field(
        default=None,
        metadata={"help": "The teacher's peak learning rate with method='online'; the student's by default."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder to keep the teacher's targets in, for later epochs and other students that read the same "
            "tokens: with random masks they never do."
        },
    )
    teacher_cache_logits: int | None = field(
        default=64,
        metadata={
            "help": "How many of the likeliest classes teacher_cache keeps of each row of logits, all others as one; "
            "None (null in YAML): all, which is exact."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for a value that is unknown or out of range; lists in JSON become lists.

        Runs at construction and, because values may be set later (a hyperparameter search sets them), before training.
        """
        for name in ("stages", "layer_map", "teacher_schedule"):
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("["):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} is {value!r}, which is no valid JSON list ({error}).") from error
        self._check_choice("method", METHODS)
        self._check_choice("layer_order", LAYER_ORDERS)
        self._check_choice("divergence", tuple(DIVERGENCES))
        self._check_choice("projection", PROJECTIONS)
        self._check_choice("hidden_positions", ("tokens", "labels"))
        self._check_choice("layer_stack", ("encoder", "decoder"))
        self._check_choice("train_prefix", ("joint", "block"))
        self._check_choice("teacher_dtype", (None, *TEACHER_DTYPES))
        if isinstance(self.layer_map, (list, tuple)):
            parse_layer_pairs(self.layer_map)
        else:
            self._check_choice("layer_map", ("uniform", "last"), " or [[student_layer, teacher_layer], ...]")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):  # any text would count as True
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False.")
        self._check_range("layer_stage_fraction", 0, 1, "both excluded", lambda x: 0 < x < 1)
        self._check_range("stage_warmup_ratio", 0, 1, "1 excluded", lambda x: 0 <= x < 1)
        self._check_range("temperature", 0, math.inf, "0 excluded", lambda x: 0 < x < math.inf)
        self._check_range("hidden_weight", 0, math.inf, "0 excluded", lambda x: 0 < x < math.inf)
        self._check_range("hidden_weight_in_logit_stage", 0, math.inf, "finite", lambda x: 0 <= x < math.inf)
        self._check_range("label_loss_weight", 0, math.inf, "finite", lambda x: 0 <= x < math.inf)
        self._check_range("calibration_samples", 1, math.inf, "whole", lambda x: isinstance(x, int) and x >= 1)
        self._check_range("projection_seed", 0, 2**64, "whole", lambda x: isinstance(x, int) and 0 <= x < 2**64)
        # stock knobs that the stages and losses are computed from
        self._check_range("max_steps", -1, math.inf, "whole; -1: by epochs", lambda x: isinstance(x, int))
        self._check_range("num_train_epochs", 0, math.inf, "finite", lambda x: 0 <= x < math.inf or self.max_steps > 0)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            self._check_range(name, 1, math.inf, "whole", lambda x: isinstance(x, int) and x >= 1)
        self._check_range("learning_rate", 0, math.inf, "finite", lambda x: 0 <= x < math.inf)
        self._check_range("label_smoothing_factor", 0, 1, "both included", lambda x: 0 <= x <= 1)
        if self.restart_schedule_per_stage and self.lr_scheduler_type in _STATEFUL_SCHEDULES:
            raise ValueError(
                f"restart_schedule_per_stage needs a schedule that is a function of the step, but lr_scheduler_type is "
                f"{_schedule_name(self)!r}; use one like 'cosine' or 'linear'."
            )
        self._check_who_teaches()
        if self.logit_chunk_size is not None:
            self._check_range("logit_chunk_size", 0, math.inf, "whole", lambda x: isinstance(x, int) and x >= 0)
            for name in ("torch_compile", "fp16", "deepspeed", "fsdp"):
                if self.logit_chunk_size and getattr(self, name):
                    raise ValueError(
                        f"logit_chunk_size is {self.logit_chunk_size}, but with {name} logits are computed at once, "
                        "because gradients of a chunk are taken inside the forward pass; leave one of the two out."
                    )
        self._check_cache()
        if self.num_layer_stages is not None:
            self._check_range("num_layer_stages", 1, math.inf, "whole", lambda x: isinstance(x, int) and x >= 1)
        if self.stages is not None:
            if not isinstance(self.stages, (list, tuple)):
                raise ValueError(f"stages is {self.stages!r}; write a list with a dict of Stage fields for each stage.")
            self.stages = [_stage_fields(stage, index) for index, stage in enumerate(self.stages)]

    @classmethod
    def from_training_arguments(cls, args: TrainingArguments) -> CurriculumDistillationConfig:
        """The same arguments with this library's defaults added; `args` itself is not changed.

        Raises:
            ValueError: the arguments have fields that this class lacks.
        """
        names = {f.name for f in dataclasses.fields(args) if f.init}
        if extra := sorted(names - {f.name for f in dataclasses.fields(cls)}):
            raise ValueError(
                f"args is a {type(args).__name__} with fields {', '.join(extra)}, which a {cls.__name__} lacks; pass "
                "that, or a subclass of it with these fields."
            )
        return cls(**{name: getattr(args, name) for name in names - {"logging_nan_inf_filter"}})

    def resolve_stages(self, student_depth: int, teacher_depth: int | None) -> tuple[Stage, ...]:
        """The stages that `stages` or `method` stand for, between models of so many blocks (None: no teacher).

        Raises:
            ValueError: a layer is out of range, or a stage needs a teacher where there is none.
        """
        if self.stages is not None:
            stages = tuple(Stage(**stage) for stage in self.stages)
        elif teacher_depth is None:
            return ()
        else:
            logit_stage = {"kl_weight": 1.0, "label_weight": self.label_loss_weight}
            if self.method == "labels":
                return (Stage(label_weight=1.0),)
            if self.method != "curriculum":
                return (Stage(**logit_stage),)
            logit_stage["hidden_weight"] = self.hidden_weight_in_logit_stage
            pairs = resolve_layer_map(self.layer_map, self.num_layer_stages, student_depth, teacher_depth)
            stages = tuple(
                curriculum_stages(pairs, self.layer_order, self.layer_stage_fraction, self.hidden_weight, logit_stage)
            )
        for index, stage in enumerate(stages):
            if stage.needs_teacher and teacher_depth is None:
                raise ValueError(
                    f"stages[{index}] ({stage.name}) matches a teacher, but no teacher_model was given; pass one, or "
                    "use only label_weight."
                )
            check_layer_range(stage.hidden, student_depth, teacher_depth or 0)
        return stages

    def schedule(self, stages: Sequence[Stage], max_steps: int) -> StageScheduler:
        """The scheduler of [`resolve_stages`]' stages.

        Raises:
            ValueError: `max_steps` are too few for them.
        """
        num_layer_stages = sum(not stage.needs_logits for stage in stages)
        try:
            return StageScheduler(stages, max_steps)
        except ValueError as error:
            if self.stages is not None or not num_layer_stages or max_steps < 1:
                raise
            fraction = self.layer_stage_fraction
            needed = max(math.ceil(num_layer_stages / fraction), math.floor(0.5 / (1 - fraction)) + 1)
            raise ValueError(
                f"{num_layer_stages} layer stages in {100 * fraction:g} % of {max_steps} steps, with the rest for the "
                f"logit stage, need max_steps >= {needed}; raise it, lower num_layer_stages, or use "
                "layer_order='last', which has one layer stage."
            ) from error

    def _check_who_teaches(self) -> None:
        if not isinstance(self.teacher_schedule, (list, tuple)):
            self._check_choice("teacher_schedule", ("step", "fraction"))
        else:
            for end in self.teacher_schedule:
                whole = isinstance(end, int) and not isinstance(end, bool) and end >= 1
                if not (whole or (isinstance(end, float) and 0 < end < 1)):
                    raise ValueError(
                        f"teacher_schedule has {end!r}; write a number of steps from 1, or a fraction of max_steps "
                        "between 0 and 1."
                    )
        if self.teacher_learning_rate is not None:
            self._check_range("teacher_learning_rate", 0, math.inf, "0 excluded", lambda x: 0 < x < math.inf)
        if self.method == "online":
            if self.fp16:
                raise ValueError("method='online' with fp16 has no loss scaling for the teacher; use bf16 or fp32.")
            if self.teacher_dtype not in (None, "float32"):
                raise ValueError(
                    f"teacher_dtype is {self.teacher_dtype!r}, but method='online' trains the teacher, which needs "
                    "'float32' weights; use bf16=True for speed."
                )
            if self.lr_scheduler_type in _STATEFUL_SCHEDULES:
                raise ValueError(
                    f"method='online' needs a schedule that is a function of the step, but lr_scheduler_type is "
                    f"{_schedule_name(self)!r}; use one like 'cosine' or 'linear'."
                )

    def _check_cache(self) -> None:
        if self.teacher_cache_logits is not None:
            self._check_range("teacher_cache_logits", 1, math.inf, "whole", lambda x: isinstance(x, int) and x >= 1)
        if self.teacher_cache is None:
            return
        if not isinstance(self.teacher_cache, (str, os.PathLike)) or not os.fspath(self.teacher_cache):
            raise ValueError(f"teacher_cache is {self.teacher_cache!r}; give the name of a folder.")
        self.teacher_cache = os.fspath(self.teacher_cache)
        if self.method in ("progressive", "online", "labels"):
            why = "no teacher is asked" if self.method == "labels" else "the teacher changes while it teaches"
            raise ValueError(
                f"teacher_cache was given with method={self.method!r}, in which {why}, so that nothing can be read "
                "again; leave it out, or use method='curriculum' or 'one_shot'."
            )

    def _check_choice(self, name: str, choices: tuple, otherwise: str = "") -> None:
        if getattr(self, name) not in choices:
            allowed = ", ".join(map(repr, choices)) + otherwise
            raise ValueError(f"{name} is {getattr(self, name)!r}; use one of {allowed}.")

    def _check_range(self, name: str, low: float, high: float, note: str, holds: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise ValueError(f"{name} is {value!r}; it must be a number between {low} and {high} ({note}).")


def _schedule_name(args: TrainingArguments) -> str:
    return getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)


def _stage_fields(stage: Any, index: int) -> dict[str, Any]:
    """Check one entry of `stages` and return it as plain JSON values."""
    stage = dataclasses.asdict(stage) if isinstance(stage, Stage) else stage
    if not isinstance(stage, dict):
        raise ValueError(f"stages[{index}] is {stage!r}; write each stage as a dict of Stage fields.")
    known = [f.name for f in dataclasses.fields(Stage)]
    if unknown := sorted(set(stage) - set(known), key=str):
        raise ValueError(f"stages[{index}] has unknown fields {unknown}; a stage has {', '.join(known)}.")
    try:
        fields = dataclasses.asdict(Stage(**stage))
    except ValueError as error:
        raise ValueError(f"stages[{index}]: {error}") from error
    return fields | {"hidden": [list(pair) for pair in fields["hidden"]]}
