"""Supervision complexity while a student trains: of labels, of its teacher, of each layer's projected targets.

```python
trainer.add_callback(SupervisionComplexityCallback(trainer))  # measures before the first step and at each evaluation
trainer.train()  # then: hf-curriculum-distill complexity OUTPUT_DIR
```
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers
from transformers import CONFIG_NAME, AutoConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_curriculum_distill.batches.batch import Batch, BatchReader
from hf_curriculum_distill.batches.randomness import preserved_random_state
from hf_curriculum_distill.complexity.analysis import DRAWN, Drawn, measure_targets
from hf_curriculum_distill.complexity.supervision import SupervisionComplexity
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.files import write_files
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.projections import FILE_NAME as BANK_FILE
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.teachers.checkpoints import find_checkpoints, schedule_ends
from hf_curriculum_distill.teachers.teacher import Targets, Teacher

if TYPE_CHECKING:
    from hf_curriculum_distill.trainer import CurriculumDistillationTrainer

logger = get_logger(__name__)

COMPLEXITY_FILE = "complexity.json"
FINAL, NOW = "teacher", "online teacher"  # the teacher at the end of its training, and at the student's step


class Point(NamedTuple):
    """What was measured after a number of optimizer steps.

    Args:
        step: the number of steps.
        seconds: that the measurement took.
        complexity: by name of the targets: see [`measure_targets`].
    """

    step: int
    seconds: float
    complexity: dict[str, SupervisionComplexity]


def read_points(folder: str) -> list[Point]:
    """The points of a run's `complexity.json`, in order.

    Raises:
        OSError: there is none.
        ValueError: it is damaged.
    """
    path = os.path.join(folder, COMPLEXITY_FILE)
    with open(path, encoding="utf-8") as file:
        try:
            return [
                Point(
                    int(point["step"]),
                    float(point["seconds"]),
                    {name: SupervisionComplexity(*map(float, of)) for name, of in point["complexity"].items()},
                )
                for point in json.load(file)
            ]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error


def write_points(folder: str, points: list[Point]) -> None:
    """Write `complexity.json`, a list of [`Point`]s."""
    os.makedirs(folder, exist_ok=True)
    rows = [dict(zip(Point._fields, point, strict=True)) for point in points]
    write_files({os.path.join(folder, COMPLEXITY_FILE): json.dumps(rows, indent=1).encode()})


class SupervisionComplexityCallback(TrainerCallback):
    """Measures before the first step and at each evaluation how complex the targets are for the student of then.

    On the main process, on held-out examples that are drawn once: "labels", "random labels", "teacher" (at the end of
    its training), "online teacher" (what teaches at this step, with the methods `progressive` and `online`, which has
    no end to look at), and "layer 1" and so on: see [`measure_complexity`]. The training itself is not changed. The
    points are written into `complexity.json` in the `output_dir`, which `hf-curriculum-distill complexity` shows.

    Args:
        trainer: with an evaluation set and a teacher.
        num_examples: held-out examples; the cost of a point grows with their number, and with its square.
        drawn: how many rows and outputs a kernel has; by default 512 and 16.

    Raises:
        ValueError: the trainer has no teacher or no evaluation set, or its student is sharded over processes.
    """

    def __init__(self, trainer: CurriculumDistillationTrainer, num_examples: int = 512, drawn: Drawn = DRAWN):
        if trainer.teacher is None or trainer.eval_dataset is None:
            lacking = "teacher_model" if trainer.teacher is None else "eval_dataset"
            raise ValueError(f"The trainer has no {lacking}, which supervision complexity is measured with; pass one.")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "Supervision complexity needs all gradients in one process, but the student is sharded; measure its "
                "checkpoints, with `hf-curriculum-distill complexity RUN --teacher FOLDER --dataset DATA`."
            )
        self._trainer, self._num_examples, self._drawn = trainer, num_examples, drawn
        self._inputs: Mapping[str, Any] | None = None
        self._points: list[Point] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._points = []
        if state.global_step == 0:
            self._measure(state)
        elif os.path.isfile(os.path.join(args.output_dir, COMPLEXITY_FILE)):
            self._points = [point for point in read_points(args.output_dir) if point.step <= state.global_step]

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step > 0 and state.global_step not in {point.step for point in self._points}:
            self._measure(state)

    def _measure(self, state) -> None:
        trainer = self._trainer
        if not state.is_world_process_zero:
            return
        with preserved_random_state(self._drawn.seed):
            if self._inputs is None:
                self._inputs = self._held_out()
            batch = trainer._read(trainer._prepare_inputs(self._inputs), whole_logits=True)
            bank, teacher = trainer.projection_bank, trainer.teacher
            stage = Stage(hidden=list(bank.layer_pairs) if bank else [], kl_weight=1.0)

            def targets_at(step: int | None) -> Targets:
                teacher.advance(step)
                return _whole(teacher.targets(batch, stage))

            last = NOW if teacher.learns else FINAL
            teachers = {last: targets_at(None)}
            if trainer.args.method == "progressive":
                teachers[NOW] = targets_at(state.global_step)
            point = _point(state.global_step, batch, teachers, stage, teacher, trainer.args.temperature, self._drawn)
        self._points.append(point)
        write_points(trainer.args.output_dir, self._points)

    def _held_out(self) -> Mapping[str, Any]:
        loader = self._trainer.get_eval_dataloader()
        count = len(loader.dataset)
        rows = sorted(random.sample(range(count), min(self._num_examples, count)))
        return loader.collate_fn([loader.dataset[row] for row in rows])


def measure_run(
    run: str,
    teacher: str,
    inputs: Mapping[str, Any],
    temperature: float = 1.0,
    drawn: Drawn = DRAWN,
    schedule: str = "fraction",
) -> Iterator[Point]:
    """Measure the checkpoints of a run, which need not have been trained by this library.

    Args:
        run: a folder with `checkpoint-STEP` folders of a student.
        teacher: a model's folder, or one with the checkpoints of its training: the last is the final teacher, and the
            next one at or after the student's step the online teacher.
        inputs: held-out examples as the models' inputs, with `labels`.
        temperature: of the teachers' probabilities.
        drawn: how many rows and outputs a kernel has.
        schedule: when a checkpoint teaches: "fraction" of both trainings or "step".

    Yields:
        a point for each checkpoint, in order.

    Raises:
        OSError, ValueError: a folder is missing, or holds no model of transformers.
    """
    students, teachers = find_checkpoints(run), find_checkpoints(teacher)
    steps = [_step_of(folder) for folder in students]
    args = CurriculumDistillationConfig(output_dir=run, use_cpu=True, report_to="none")
    ends = schedule_ends(teachers, schedule, max(steps))
    loaded = [Teacher(load_model(folder)) for folder in teachers]
    bank = None
    if os.path.isfile(os.path.join(students[-1], BANK_FILE)):
        bank = ProjectionBank.from_pretrained(students[-1])
    for each in loaded:
        each.prepare(bank)
    stage = Stage(hidden=list(bank.layer_pairs) if bank else [], kl_weight=1.0)
    for step, folder in zip(steps, students, strict=True):
        student = PartialForward(load_model(folder))
        batch = BatchReader(student, loaded[-1].partial_forward, args)(inputs, whole_logits=True)
        found = {FINAL: _whole(loaded[-1].targets(batch, stage))}
        if len(loaded) > 1:
            now = loaded[sum(end <= step for end in ends)]
            found[NOW] = _whole(now.targets(batch, Stage(kl_weight=1.0)))
        yield _point(step, batch, found, stage, loaded[-1], temperature, drawn)


def load_model(folder: str) -> PreTrainedModel:
    """The model in a folder, of the class of transformers that its configuration names.

    Raises:
        OSError, ValueError: there is none.
    """
    if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}, so it holds no model.")
    names = AutoConfig.from_pretrained(folder).architectures or ["no class"]
    if (kind := getattr(transformers, names[0], None)) is None:
        raise ValueError(
            f"{folder} holds a {names[0]}, which is no class of transformers; measure it while it trains, with "
            "SupervisionComplexityCallback."
        )
    return kind.from_pretrained(folder)


def _step_of(folder: str) -> int:
    name = os.path.basename(os.path.normpath(folder))
    return int(name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")) if name.startswith(PREFIX_CHECKPOINT_DIR) else 0


def _whole(targets: Targets) -> Targets:
    """Targets that later changes of the teacher's weights do not change."""
    return Targets(targets.hidden, targets.logits[:])


def _point(
    step: int,
    batch: Batch,
    found: Mapping[str, Targets],
    stage: Stage,
    teacher: Teacher,
    temperature: float,
    drawn: Drawn,
) -> Point:
    start = time.monotonic()
    complexity = measure_targets(batch, found, stage, teacher.partial_forward.stack, temperature, drawn)
    point = Point(step, time.monotonic() - start, complexity)
    values = ", ".join(f"{name} {of.value:.3g}" for name, of in complexity.items())
    logger.info("Supervision complexity at step %d (%.1f s): %s", step, point.seconds, values)
    return point
