"""What describes a run that is planned: options of the plan, the run's configuration, and options that it ignores."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.options import ModelOptions, teacher_source
from hf_curriculum_distill.preparing.checks import check_launch

TASKS = ("MaskedLM", "CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
# Options of the recipes that change nothing in a plan. The recipes are no part of the package, so the list is
# written out; a test compares it with them.
RECIPE_OPTIONS = {
    "allow_untrained_teacher", "cache_targets", "complexity_images", "dataset", "dataset_config", "dimension",
    "dimensions", "earlier_teachers", "eval_blocks", "evaluate_on", "first_checkpoint", "gguf_file", "grammar",
    "head_dim", "heldout_documents", "heldout_examples", "heldout_images", "heldout_sentences", "image_size",
    "initializer_range", "label_column", "mask_once", "max_length", "methods", "model", "num_layers",
    "overwrite_output_dir", "packed", "patch_size", "preprocessing_workers", "seeds", "shuffle_features",
    "smallest_budget", "sparsities", "sparsity", "start", "streaming", "student_embeddings", "student_heads",
    "student_width", "support", "support_seed", "teacher_accuracy", "teacher_batch_size", "teacher_finish_samples",
    "teacher_heads", "teacher_max_samples", "teacher_save_samples", "teacher_save_steps", "teacher_seed",
    "teacher_share", "teacher_steps", "teacher_width", "text_column", "train_documents", "train_images",
    "train_sentences", "unlabelled_column", "unlabelled_config", "unlabelled_text", "variants", "whole_words",
}  # fmt: skip


@dataclass
class PlanArguments(ModelOptions):
    """What describes a run besides its [`CurriculumDistillationConfig`]; the recipes use the same names.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    task: str = field(default="MaskedLM", metadata={"help": f"What both models do: {', '.join(TASKS)}."})
    num_processes: int = field(default=1, metadata={"help": "Processes that share each step, one a device."})
    flops_per_second: float | None = field(
        default=None, metadata={"help": "Operations a second that one device reaches in such a training."}
    )
    measure: float | None = field(
        default=None,
        metadata={"help": "Or: seconds for which matrices are multiplied here, for --utilisation of the rate reached."},
    )
    utilisation: float = field(default=0.4, metadata={"help": "Share of that rate which training is assumed to reach."})
    json: str | None = field(default=None, metadata={"help": "File to which the plan is written as well."})

    def __post_init__(self):
        if self.student is None:
            raise ValueError("No student is given; name its folder, config.json, Hub model or size with --student.")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; use one of {', '.join(TASKS)}.")
        if self.flops_per_second is not None and self.measure is not None:
            raise ValueError("Both flops_per_second and measure are given; the time follows from one of them.")
        for name, highest in {"mlm_probability": 1, "utilisation": 1, "flops_per_second": None, "measure": 60}.items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= (highest or value):
                limits = "above 0" + (f" and at most {highest}" if highest else "")
                raise ValueError(f"{name} is {value}; it must be {limits}.")
        for name in ("block_size", "num_processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.mlm_probability is None:
            self.mlm_probability = 0.15 if self.task == "MaskedLM" else 1.0

    @property
    def teacher_source(self) -> str | None:
        """Where the teacher's configuration comes from: `teacher`, or `teacher_from` if nothing is saved there yet."""
        return teacher_source(self.teacher, self.teacher_from)


@dataclass
class PlannedConfig(CurriculumDistillationConfig):
    """The configuration of a run on a machine that need not be this one, so it is valid here without an accelerator."""

    def __post_init__(self):
        on_cpu, self.use_cpu, self.tf32 = self.use_cpu, True, None
        super().__post_init__()
        check_launch(self, None)  # sets up the device, which must be done while use_cpu is True
        self.use_cpu = on_cpu
        self.teacher_entropy_threshold = None  # which rows it leaves out depends on values, and a plan has none
