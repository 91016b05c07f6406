"""What describes a run that is planned: options of the plan, the run's configuration, and options that it ignores."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.options import ModelOptions, teacher_source
from hf_curriculum_distill.planning.gpus import GPUS
from hf_curriculum_distill.preparing.checks import check_launch

TASKS = {
    "MaskedLM": AutoModelForMaskedLM,
    "CausalLM": AutoModelForCausalLM,
    "SequenceClassification": AutoModelForSequenceClassification,
    "TokenClassification": AutoModelForTokenClassification,
    "QuestionAnswering": AutoModelForQuestionAnswering,
    "MultipleChoice": AutoModelForMultipleChoice,
    "Embeddings": AutoModel,
}


@dataclass
class PlanArguments(ModelOptions):
    """What describes a run besides its [`CurriculumDistillationConfig`]; the recipes use the same names.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    task: str = field(default="MaskedLM", metadata={"help": f"What both models do: {', '.join(TASKS)}."})
    num_choices: int = field(
        default=4, metadata={"help": "Texts of an example of multiple choice, each of --block_size tokens."}
    )
    num_processes: int = field(default=1, metadata={"help": "Processes that share each step, one a device."})
    gpu: str | None = field(
        default=None,
        metadata={
            "help": f"The GPU that will train, one a process: {', '.join(GPUS)}. Time follows from the peak that its "
            "data sheet names for the run's precision, times --utilisation."
        },
    )
    flops_per_second: float | None = field(
        default=None, metadata={"help": "Operations a second that one device reaches in such a training."}
    )
    measure: float | None = field(
        default=None,
        metadata={"help": "Or: seconds for which matrices are multiplied here, for --utilisation of the rate reached."},
    )
    utilisation: float = field(
        default=0.4, metadata={"help": "Share of that peak or rate which training is assumed to reach."}
    )
    price_per_hour: float | None = field(
        default=None, metadata={"help": "Price of one device for an hour, in any currency."}
    )
    json: str | None = field(default=None, metadata={"help": "File to which the plan is written as well."})

    def __post_init__(self):
        if self.student is None:
            raise ValueError("No student is given; name its folder, config.json, Hub model or size with --student.")
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; use one of {', '.join(TASKS)}.")
        if self.gpu not in (None, *GPUS):
            raise ValueError(f"gpu is {self.gpu!r}; use one of {', '.join(GPUS)}, or give --flops_per_second.")
        if self.measure is not None and (other := "flops_per_second" if self.flops_per_second else self.gpu and "gpu"):
            raise ValueError(f"Both {other} and measure are given; the time follows from one of them.")
        if self.price_per_hour is not None and not (self.gpu or self.flops_per_second or self.measure):
            raise ValueError(
                f"price_per_hour is {self.price_per_hour}, but how many hours is not known; give --gpu, "
                "--flops_per_second or --measure."
            )
        limits = {"mlm_probability": 1, "utilisation": 1, "flops_per_second": None, "measure": 60}
        for name, highest in (limits | {"price_per_hour": None}).items():
            value = getattr(self, name)
            if value is not None and not 0 < value <= (highest or value):
                limits = "above 0" + (f" and at most {highest}" if highest else "")
                raise ValueError(f"{name} is {value}; it must be {limits}.")
        if re.fullmatch(r"\d+-\d+", self.student) and not os.path.exists(self.student):
            self.student = f"teacher-{self.student}"  # of causal_lm.py: a random model of the teacher's family
        for name in ("block_size", "num_choices", "num_processes"):
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
