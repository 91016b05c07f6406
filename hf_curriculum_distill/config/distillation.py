"""[`CurriculumDistillationConfig`]: every knob of a distillation run, validated at construction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_curriculum_distill.config.checks import check_values, parse_json, too_few_steps
from hf_curriculum_distill.stages import (
    LayerPair,
    Stage,
    StageScheduler,
    check_stage_depths,
    curriculum_stages,
    frozen_layer,
    parse_stages,
    resolve_layer_map,
)


@dataclass(repr=False)  # TrainingArguments' own leaves out tokens
class CurriculumDistillationConfig(TrainingArguments):
    """[`~transformers.TrainingArguments`] plus who teaches, what is matched, and when.

    The defaults of the curriculum are what won in `docs/results.md`; those of the paper are `CURRICULUM_EXTRACTION`.

    Two defaults differ from `TrainingArguments`: `logging_nan_inf_filter=False` (a loss that is not finite is
    reported, never averaged away) and `ddp_find_unused_parameters=True` (a layer stage does not use later blocks).

    The `help` of each field documents it.

    Raises:
        ValueError: a value is unknown or out of range. The trainer checks what depends on the models.
    """

    # Parameters whose default differs from TrainingArguments
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Whether to leave losses that are nan or inf out of the logged average."}
    )

    # Parameters that control who teaches, and what is matched when
    method: str = field(
        default="curriculum",
        metadata={
            "help": "Who teaches, and what is matched when: 'curriculum' (hidden states layer by layer, then logits), "
            "'hidden' (hidden states alone, in layer stages that share all steps; for any head or none), "
            "'one_shot' (logits only), 'progressive' (logits of the teacher's checkpoints in turn), 'online' (logits "
            "of a teacher that trains alongside) or 'labels' (labels only). Without a teacher: the model's own loss, "
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

    # Parameters that control which layers are matched, and in which order
    layer_map: list | str | None = field(
        default="uniform",
        metadata={"help": "'uniform', 'last' or [[student_layer, teacher_layer], ...]; blocks count from 1."},
    )
    num_layer_stages: int | None = field(
        default=None, metadata={"help": "The number of student layers that are matched; by default every block."}
    )
    layer_stack: str = field(
        default="encoder",
        metadata={
            "help": "Whose blocks are matched in an encoder-decoder: the 'encoder' or the 'decoder', for which the "
            "whole encoder runs and trains, too. Other models have one stack."
        },
    )
    layer_order: str = field(
        default="together",
        metadata={
            "help": "What each layer stage matches: 'together' (one stage, all pairs), 'sequential' (one pair, lowest "
            "first, as in the paper), 'cumulative' (this and all earlier pairs), 'last' (one stage, the highest pair) "
            "or 'complexity' (measured before the first step: the layers whose targets are easiest for this student "
            "first, equally easy ones in one stage, those as hard as random ones in none)."
        },
    )

    # Parameters that control the layer stages
    hidden_loss: str = field(
        default="mse",
        metadata={
            "help": "The loss between hidden states, per position: 'mse', 'cosine' (1 - cosine similarity) or "
            "'layer_norm_mse' (MSE after a layer norm of both, which leaves out mean and size, as MobileBERT); logged "
            "as hidden_ and this name."
        },
    )
    hidden_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the hidden loss in layer stages; with SGD it scales their learning rate."},
    )
    hidden_weight_in_logit_stage: float = field(
        default=1.0,
        metadata={"help": "Weight of the last layer stage's hidden loss in the logit stage; 0 in the paper."},
    )
    hidden_weight_at_end: float | None = field(
        default=None,
        metadata={
            "help": "What hidden_weight_in_logit_stage changes to, linearly with the steps, until training ends; 0 "
            "anneals the hidden term away, and by default its weight stays the same."
        },
    )
    hidden_positions: str = field(
        default="tokens",
        metadata={
            "help": "Where hidden states are matched: 'tokens' (all that are not padding) or 'labels' (only those "
            "whose label counts, such as masked tokens)."
        },
    )
    layer_stage_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Fraction of the steps for the layer stages, which share it equally (all, with method='hidden'); "
            "with 0 there are none, and the logit stage matches the last layer stage's layers from the first step."
        },
    )

    # Parameters that control the logit stage
    temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of both models; its square multiplies the divergence."}
    )
    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "Divergence of the student's logits: 'forward_kl', 'reverse_kl' or 'jensen_shannon', logged as kl; "
            "or 'hard', the cross-entropy with the teacher's first choice, which has no temperature and is logged as "
            "hard_label_loss."
        },
    )
    label_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on the labels in the logit stage."}
    )
    class_weights: list | str | None = field(
        default=None,
        metadata={
            "help": "Weight of each class in the cross-entropy on labels, by class number (JSON on the command line). "
            "The sum is divided by the number of labels all the same, so weights that are 1 on average keep its size."
        },
    )
    teacher_entropy_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Up to which entropy of the teacher, as a share of the highest (the logarithm of the number of "
            "classes), a row of logits learns from the teacher alone; above it, from its label alone. By default each "
            "row learns from both."
        },
    )

    pooling: str | None = field(
        default=None,
        metadata={
            "help": "For embeddings, of models without a head: what the logit stage compares of a text by hidden_loss: "
            "the 'mean' of its tokens' last states, that of the first ('cls') or of the 'last' token, or the model's "
            "'pooler' output. Those of a teacher of another width are projected."
        },
    )

    # Parameters that control the projection bank
    projection: str = field(
        default="gaussian",
        metadata={
            "help": "Kind of fixed matrix: 'gaussian', 'rademacher', 'orthogonal', 'identity' (first units), 'pca' "
            "(the directions in which the teacher's states vary most on the calibration sample; whitened by "
            "standardize_targets) or 'rotated_pca' (the same, mixed by a random rotation, so that directions keep "
            "their relative sizes)."
        },
    )
    projection_seed: int = field(default=0, metadata={"help": "Seed of the projections and of the calibration sample."})
    shared_projection: bool = field(
        default=True,
        metadata={
            "help": "Whether all layers share one matrix, so that a residual stream keeps one basis; a PCA pools the "
            "covariances of their teacher layers."
        },
    )
    standardize_targets: bool = field(
        default=True,
        metadata={"help": "Whether to standardise projected states by the calibration sample's mean and deviation."},
    )
    calibration_samples: int = field(
        default=256,
        metadata={
            "help": "Training examples to measure the projected states' mean and deviation, and a PCA's directions, on."
        },
    )

    # Parameters that control what a stage trains and runs
    train_prefix: str = field(
        default="joint",
        metadata={
            "help": "What a layer stage trains: 'joint' (all blocks up to its layer), 'block' (only those above the "
            "previous stage's layer) or 'independent' (all segments at once, each with the target of the matched layer "
            "below it as its input and no gradient into lower ones; with layer_order='together')."
        },
    )
    finished_layer_rate: float = field(
        default=1.0,
        metadata={
            "help": "The share of the learning rate at which a layer stage goes on training the blocks up to the "
            "previous stage's layer, embeddings included: 1 for all of it; train_prefix='block' is 0."
        },
    )
    freeze_embeddings_in_layer_stages: bool = field(
        default=False,
        metadata={
            "help": "Whether layer stages freeze all that runs before the first block; the logit stage trains it."
        },
    )
    freeze_matched_layers: bool = field(
        default=False,
        metadata={
            "help": "Whether the logit stage freezes all blocks up to the highest matched one; a head that is tied to "
            "the embeddings still trains these."
        },
    )
    truncate: bool = field(
        default=True,
        metadata={"help": "Whether layer stages stop after their last block; if False, whole models run (same loss)."},
    )
    logit_chunk_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of logits of each model that are in memory at a time; 0 for all; by default as many as fill "
            "4 MiB on a CPU and 128 MiB elsewhere, but at least 96. Loss and operations are the same. All at once with "
            "torch_compile, fp16, FSDP or DeepSpeed, for classifiers and in evaluation."
        },
    )

    # Parameters that control the optimizer
    restart_schedule_per_stage: bool = field(
        default=False, metadata={"help": "Whether each stage has a learning-rate schedule of its own."}
    )
    stage_warmup_ratio: float = field(
        default=0.2, metadata={"help": "Fraction of each stage that is warm-up, with restart_schedule_per_stage."}
    )
    carry_optimizer: bool = field(
        default=True,
        metadata={
            "help": "Whether the optimizer keeps its moments and step counts from one stage to the next; if False, "
            "each stage begins without."
        },
    )

    # Parameters that control how both models run
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "The attention of student and teacher, by the name transformers gives it: 'sdpa', "
            "'flash_attention_2', 'eager' (faster in bfloat16 on a CPU), ...; by default as the models are."
        },
    )

    # Parameters that control the teacher
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "The teacher's dtype: 'float32', 'bfloat16' or 'float16'; by default as it was saved."},
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further arguments of the teacher's from_pretrained, where teacher_model is a name or a folder "
            "(JSON on the command line): revision, dtype, attn_implementation, device_map, quantization_config, "
            "gguf_file (whose weights are unpacked unless quantization_config says otherwise), trust_remote_code, ..."
        },
    )
    teacher_schedule: list | str | None = field(
        default="step",
        metadata={
            "help": "Which checkpoint teaches when, with method='progressive': 'step' (the next one at or after the "
            "student's step), 'fraction' (the same, with the teacher's steps scaled to the student's), or a list of "
            "where each but the last stops, in steps or as fractions of max_steps (JSON on the command line)."
        },
    )
    teacher_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of a teacher that is trained here; None: the student's."},
    )

    # Parameters that control the cache of the teacher's targets
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the teacher's targets for later epochs and other students, which must read the "
            "same tokens; with random masks they never do."
        },
    )
    teacher_cache_logits: int | None = field(
        default=64,
        metadata={
            "help": "The number of likeliest classes that teacher_cache keeps of each row of logits, with all others "
            "as one; None (null in YAML) keeps all, which is exact."
        },
    )

    # Parameters that control evaluation
    evaluate_layers: bool = field(
        default=False,
        metadata={
            "help": "Whether evaluations report how far each matched layer is from its target, as eval_layer_3_mse "
            "(1: as far as the targets' mean); it takes another pass of the student."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.prepare()

    def prepare(self) -> None:
        """The end of the construction: the default that depends on others, and the checks."""
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True
        self.check()

    def check(self) -> None:
        """Raise a `ValueError` for a value that is unknown or out of range, and parse lists written as JSON.

        It runs at construction and again before training, because values may be set in between, for instance by a
        hyperparameter search.
        """
        parse_json(self)
        check_values(self)
        if self.stages is not None:
            self.stages = parse_stages(self.stages)

    def resolve_stages(
        self, student_depth: int, teacher_depth: int | None, groups: Sequence[tuple[LayerPair, ...]] | None = None
    ) -> tuple[Stage, ...]:
        """The stages that `stages`, or else `method`, stands for.

        Args:
            student_depth, teacher_depth: the number of blocks; None without a teacher.
            groups: the layer pairs of each layer stage, once layer_order='complexity' has measured them.

        Returns:
            the stages, with each `until` as it was given; none without a teacher and explicit `stages`.

        Raises:
            ValueError: a layer is out of range, or a stage needs a teacher and there is none.
        """
        if self.stages is not None:
            stages = tuple(Stage(**stage) for stage in self.stages)
        elif teacher_depth is None:
            return ()
        else:
            logit_stage = {"kl_weight": 1.0, "label_weight": self.label_loss_weight}
            if self.method == "labels":
                return (Stage(label_weight=1.0),)
            if self.method not in ("curriculum", "hidden"):
                return (Stage(**logit_stage),)
            logit_stage["hidden_weight"] = self.hidden_weight_in_logit_stage
            logit_stage["hidden_weight_at_end"] = self.hidden_weight_at_end
            pairs = resolve_layer_map(self.layer_map, self.num_layer_stages, student_depth, teacher_depth)
            fraction, last = (1.0, None) if self.method == "hidden" else (self.layer_stage_fraction, logit_stage)
            stages = tuple(curriculum_stages(pairs, self.layer_order, fraction, self.hidden_weight, last, groups))
        check_stage_depths(stages, student_depth, teacher_depth)
        return stages

    @property
    def matches_logits(self) -> bool:
        """Whether anything is learnt from logits or labels; if not, any head will do, or none."""
        if self.pooling or self.stages is None:
            return self.pooling is None and self.method != "hidden"
        return self.method == "online" or any(Stage(**stage).needs_logits for stage in self.stages)

    @property
    def measures_order(self) -> bool:
        """Whether the layer stages are known only once a training has measured how hard each layer is."""
        return self.layer_order == "complexity" and self.stages is None and self.method in ("curriculum", "hidden")

    @property
    def treats_layers_apart(self) -> bool:
        """Whether a stage freezes some layers, trains them more slowly, or cuts them off from others."""
        return self.freeze_matched_layers or self.train_prefix != "joint" or self.finished_layer_rate != 1

    def frozen_layer(self, stages: Sequence[Stage], index: int) -> int | None:
        """The student's highest layer that gets no gradient in a stage: see [`~stages.frozen_layer`]."""
        frozen = self.train_prefix, self.freeze_matched_layers, self.freeze_embeddings_in_layer_stages
        return frozen_layer(stages, index, *frozen)

    def schedule(self, stages: Sequence[Stage], max_steps: int) -> StageScheduler:
        """The scheduler of the stages that [`resolve_stages`] returned.

        Raises:
            ValueError: `max_steps` is too small for them.
        """
        try:
            return StageScheduler(stages, max_steps)
        except ValueError as error:
            num_layer_stages = sum(not stage.needs_logits for stage in stages)
            if self.stages is not None or not num_layer_stages or max_steps < 1:
                raise
            raise ValueError(too_few_steps(self, num_layer_stages, max_steps)) from error
