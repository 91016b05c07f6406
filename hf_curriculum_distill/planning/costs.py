"""Operations, time and memory of a run's stages."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_curriculum_distill.planning.dry_run import DryRun
from hf_curriculum_distill.planning.memory import PeakMemory
from hf_curriculum_distill.planning.optimizer import OptimizerMemory
from hf_curriculum_distill.preparing.calibration import projected_pairs
from hf_curriculum_distill.stages import Stage, StageScheduler


@dataclass
class RunCosts:
    """Counts what stages cost, for a run's own and for any other schedule of the same models.

    Args:
        run: both models and their micro-batch, without values.
        optimizer: of the student, and of an online teacher.
        num_processes: processes that share each step.
        rate: operations per second of each of them; None: the time is not known.
    """

    run: DryRun
    optimizer: OptimizerMemory
    num_processes: int = 1
    rate: float | None = None

    def __post_init__(self):
        model = self.run.student.model
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        self._parameters = dict(model.named_parameters())
        self._states = {
            name: self.optimizer.measure(parameter, embeds=id(parameter) in embeddings)
            for name, parameter in self._parameters.items()
        }

    def of_stages(self, scheduler: StageScheduler, online: bool = False) -> list[dict[str, Any]]:
        """Count each stage.

        Args:
            scheduler: of the stages.
            online: the teacher learns, too.

        Returns:
            One dictionary per stage: `name`, `first_step` and `last_step` (from 1), `trained_parameters`,
            `student_flops`, `teacher_flops` and `flops` of all processes, `seconds` (None: not known), and `memory`,
            the most bytes that one process holds: `teacher`, `student`, `gradients`, `optimizer`, `activations`,
            `logits`, each at its own worst moment, and `total`, at the worst of all.

        Raises:
            ValueError: a stage cannot be run without values.
        """
        args, stages = self.run.args, scheduler.stages
        teacher, costs, stepped = self._teacher_bytes(stages, online), [], set()
        for index, stage in enumerate(stages):
            first, end = scheduler.span(index)
            frozen = args.frozen_layer(stages, index)
            *flops, trained, peak = self._try(stage, frozen, online)
            passes = (end - first) * args.gradient_accumulation_steps * self.num_processes
            student_flops, teacher_flops = (passes * each for each in flops)
            # an optimizer keeps its states for parameters that later stages leave alone
            stepped = trained | stepped if args.carry_optimizer else trained
            costs.append(
                {
                    "name": stage.name,
                    "first_step": first + 1,
                    "last_step": end,
                    "trained_parameters": sum(self._parameters[name].numel() for name in trained),
                    "student_flops": student_flops,
                    "teacher_flops": teacher_flops,
                    "flops": student_flops + teacher_flops,
                    "seconds": self.rate and (student_flops + teacher_flops) / (self.rate * self.num_processes),
                    "memory": self._memory(trained, stepped, peak, *teacher),
                }
            )
        return costs

    def _try(self, stage: Stage, frozen: int | None, online: bool) -> tuple[int, int, set[str], PeakMemory]:
        log = logging.getLogger("torch._subclasses.fake_tensor")  # where torch writes a traceback before it raises
        try:
            log.disabled = True
            return self.run.measure(stage, frozen, online)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"Stage {stage.name!r} cannot be run without values ({str(error).splitlines()[0]}): a model whose "
                "computation depends on values is not planned."
            ) from error
        finally:
            log.disabled = False

    def _teacher_bytes(self, stages: Sequence[Stage], online: bool) -> tuple[int, int]:
        """Bytes of weights, projections and, online, optimizer states; bytes of gradients."""
        student, teacher = self.run.student, self.run.teacher
        if teacher is None:
            return 0, 0
        # each pair has a float32 matrix, and a mean and a deviation of the student's width
        pairs = projected_pairs(stages, self.run.args, student, teacher.partial_forward)
        projections = len(pairs) * student.hidden_size * (teacher.partial_forward.hidden_size + 2) * 4
        learning = list(teacher.model.parameters()) if online else []
        states = sum(self.optimizer.measure(parameter)[0] for parameter in learning)
        return _model_bytes(teacher.model) + projections + states, sum(parameter.nbytes for parameter in learning)

    def _memory(
        self, trained: Collection[str], stepped: Collection[str], peak: PeakMemory, teacher: int, teacher_gradients: int
    ) -> dict[str, int]:
        """The most bytes that a stage holds, by what they are for.

        Args:
            trained, stepped: names of the parameters that this stage trains, and that it or earlier stages trained.
            peak: of the passes of a micro-batch.
            teacher, teacher_gradients: bytes.
        """
        student, held = _model_bytes(self.run.student.model), sum(self._states[name][0] for name in stepped)
        gradients = sum(self._parameters[name].nbytes for name in trained)
        if self.run.args.gradient_accumulation_steps == 1:
            passes = peak.peak_with_gradients
        else:  # gradients of the first micro-batch are there while later ones are computed
            passes = peak.peak + gradients + teacher_gradients
        step = gradients + max((self._states[name][1] for name in trained), default=0)
        return {
            "teacher": teacher + teacher_gradients,
            "student": student,
            "gradients": gradients,
            "optimizer": held,
            "activations": peak.peak - peak.peak_of_size,
            "logits": peak.peak_of_size,
            "total": teacher + student + held + max(passes, step),
        }


def add_up(name: str, costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add stages up: sums of operations and seconds, the most parameters and memory.

    Args:
        name: of the result.
        costs: of at least one stage, from [`RunCosts.of_stages`].

    Returns:
        A dictionary of the same form.
    """
    largest = max(costs, key=lambda stage: stage["memory"]["total"])
    return {
        "name": name,
        "first_step": 1,
        "last_step": costs[-1]["last_step"],
        "trained_parameters": max(stage["trained_parameters"] for stage in costs),
        **{flops: sum(stage[flops] for stage in costs) for flops in ("student_flops", "teacher_flops", "flops")},
        "seconds": None if costs[0]["seconds"] is None else sum(stage["seconds"] for stage in costs),
        "memory": largest["memory"],
    }


def _model_bytes(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
