"""Who teaches: a frozen model, its checkpoints one after another, or a model that learns alongside the student."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_curriculum_distill import losses
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.layers import PartialForward
from hf_curriculum_distill.loading import check_teacher, load_teacher, weights_fingerprint
from hf_curriculum_distill.schedules import schedule_factor

TeacherModel = PreTrainedModel | str | os.PathLike | Sequence[str | os.PathLike]

OPTIMIZER_FILE = "optimizer.safetensors"


class FrozenTeacher:
    """A trained model that only answers: in eval mode, without gradients, never part of the student.

    Args:
        model: the teacher. It is put into eval mode and its parameters stop requiring gradients.
        name: where it came from, for the records of a run.
    """

    def __init__(self, model: PreTrainedModel, name: str | None = None):
        self.model = model.eval().requires_grad_(False)
        self.partial_forward = PartialForward(model)
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.revision = getattr(model.config, "_commit_hash", None)
        self.fingerprint = weights_fingerprint(model)

    @torch.inference_mode()
    def __call__(
        self, inputs: Mapping[str, Any], layers: Sequence[int] = (), **partial_forward: Any
    ) -> tuple[dict[int, Tensor], Tensor | None]:
        """Hidden states at `layers` and, if asked for, logits: see [`PartialForward`]. Inputs it lacks are dropped."""
        return self.partial_forward(self.model, self._known(inputs), layers, **partial_forward)

    def at(self, step: int | None) -> FrozenTeacher:
        """The teacher of this optimizer step; None: the one that evaluations compare with."""
        return self

    def plan(self, max_steps: int) -> None:
        """Learn how long the student's training is; a frozen teacher needs no plan."""

    def _known(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        accepts = self.partial_forward.accepts
        known = {name: value for name, value in inputs.items() if accepts(name)}
        return known | {"use_cache": False} if accepts("use_cache") else known


class CheckpointTeacher(FrozenTeacher):
    """Checkpoints of a teacher's own training, one after another (Panigrahi et al., 2025).

    One model in memory, whose weights are exchanged. Evaluations compare with the last checkpoint.

    Args:
        folders: the checkpoints, in the order of their training.
        load: reads one of them as a checked model, in its place.
        schedule: see the config's `teacher_schedule`.

    Raises:
        ValueError: the checkpoints are of different sizes, or the schedule doesn't fit them.
    """

    def __init__(
        self, folders: Sequence[str], load: Callable[[str], PreTrainedModel], schedule: str | list[int | float]
    ):
        self._folders, self._load, self._schedule = list(folders), load, schedule
        self._steps = [_steps_of(folder) for folder in self._folders] if isinstance(schedule, str) else []
        if len(folders) > 1 or not isinstance(schedule, str):
            self._check_schedule()
        digest, sizes = hashlib.sha256(), None
        for folder in self._folders:
            model = load(folder)
            own_sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            sizes = sizes or own_sizes
            if own_sizes != sizes:
                raise ValueError(
                    f"{self._folders[0]} and {folder} are models of different sizes; one model in memory takes the "
                    "weights of each checkpoint in turn, so pass checkpoints of one training run."
                )
            digest.update(weights_fingerprint(model).encode())
        super().__init__(model, ", ".join(self._folders))
        self.fingerprint = digest.hexdigest()
        self._index = len(self._folders) - 1
        self._ends: list[int] | None = None

    def at(self, step: int | None) -> FrozenTeacher:
        index = len(self._folders) - 1 if step is None else bisect_right(self._ends, step)
        if index != self._index:
            self.model.load_state_dict(self._load(self._folders[index]).state_dict())
            self._index = index
        return self

    def plan(self, max_steps: int) -> None:
        """Fix the student's step at which each checkpoint but the last stops teaching."""
        if self._schedule == "step":
            ends = self._steps[:-1]
        elif self._schedule == "fraction":
            ends = [round(step * max_steps / self._steps[-1]) for step in self._steps[:-1]]
        else:
            ends = [round(end * max_steps) if isinstance(end, float) else end for end in self._schedule]
            if sorted(set(ends)) != ends or any(not 0 < end < max_steps for end in ends):
                raise ValueError(
                    f"teacher_schedule is {self._schedule} (steps {ends} of {max_steps}); each checkpoint must stop "
                    "teaching after the one before it and before max_steps."
                )
        self._ends = ends if len(self._folders) > 1 else []

    def _check_schedule(self) -> None:
        if isinstance(self._schedule, str):
            if None in self._steps or sorted(set(self._steps)) != self._steps:
                raise ValueError(
                    f"teacher_schedule={self._schedule!r} needs folders named {PREFIX_CHECKPOINT_DIR}-STEP in "
                    f"increasing order, but the checkpoints are {', '.join(self._folders)}; set teacher_schedule to "
                    "the list of steps at which each but the last stops teaching."
                )
        elif len(self._schedule) != len(self._folders) - 1:
            raise ValueError(
                f"teacher_schedule has {len(self._schedule)} ends for {len(self._folders)} checkpoints; give one end "
                "for each but the last."
            )


class OnlineTeacher(FrozenTeacher):
    """A teacher that learns the task from the labels while it teaches, with an optimizer of its own.

    It answers in eval mode and without gradients, then trains on the same micro-batch; its gradients are summed over
    processes here, because nothing wraps it.
    """

    def __init__(self, model: PreTrainedModel, name: str | None = None):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().__init__(model.float(), name)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._step = 0

    def start(self, args: CurriculumDistillationConfig, max_steps: int, decayed: Collection[str]) -> None:
        """Begin training: optimizer and schedule are the student's, but for `args.teacher_learning_rate`.

        Args:
            decayed: names of the parameters that weight decay applies to.
        """
        args = copy.copy(args)
        args.learning_rate = args.teacher_learning_rate or args.learning_rate
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, self.model)
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for name, p in trained if name in decayed], "weight_decay": args.weight_decay},
            {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
        ]
        self._optimizer = optimizer_class(groups, **options)
        self._learning_rate = args.learning_rate
        self._schedule = schedule_factor(
            args.lr_scheduler_type,
            max_steps,
            args.learning_rate,
            args.get_warmup_steps(max_steps),
            args.lr_scheduler_kwargs or {},
        )
        self._step = 0

    def learn(
        self,
        inputs: Mapping[str, Any],
        rows: Tensor,
        labels: Tensor,
        num_rows: Tensor,
        gather: bool,
        accelerator: Accelerator,
        args: CurriculumDistillationConfig,
    ) -> Tensor:
        """Train on a micro-batch, with an optimizer step on the last one; returns its share of the mean loss."""
        self.model.train()
        with accelerator.autocast():
            _, logits = self.partial_forward(self.model, self._known(inputs), logits=True, rows=rows, gather=gather)
        loss = losses.cross_entropy(logits, labels, args.label_smoothing_factor) / num_rows
        loss.backward()
        self.model.eval()
        if accelerator.sync_gradients:
            parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
            if args.world_size > 1:
                over = "sum" if args.average_tokens_across_devices else "mean"  # num_rows is global, or this process's
                for parameter in parameters:
                    parameter.grad = accelerator.reduce(parameter.grad, over)
            if args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate * self._schedule(self._step)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._step += 1
        return loss.detach()

    def save(self, folder: str) -> None:
        """Write the model and the optimizer's state, as safetensors both."""
        self.model.save_pretrained(folder)
        state = self._optimizer.state_dict()["state"]
        tensors = {
            f"{index}.{name}": torch.as_tensor(value).contiguous()
            for index, values in state.items()
            for name, value in values.items()
            if value is not None
        }
        save_file(tensors, os.path.join(folder, OPTIMIZER_FILE))

    def load(self, folder: str, step: int) -> None:
        """Continue from what [`save`] wrote after so many optimizer steps; [`start`] comes first."""
        if not os.path.isfile(os.path.join(folder, OPTIMIZER_FILE)):
            raise FileNotFoundError(
                f"{folder} holds no online teacher; method='online' resumes from the teacher's checkpoint beside the "
                "student's. Start a new run, or restore that folder."
            )
        self.model.load_state_dict(type(self.model).from_pretrained(folder, dtype=torch.float32).state_dict())
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(os.path.join(folder, OPTIMIZER_FILE)).items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._step = step


def prepare_teacher(
    teacher_model: TeacherModel,
    student: PreTrainedModel,
    args: CurriculumDistillationConfig,
    processing_class: Any = None,
) -> FrozenTeacher:
    """The teacher for `args.method`, loaded, checked against the student and placed on `args.device`.

    Raises:
        ValueError: it doesn't fit the student or the method, or a folder holds no checkpoints.
        OSError: there is no such model.
    """
    dtype = None if args.teacher_dtype is None else getattr(torch, args.teacher_dtype)

    def place(teacher: PreTrainedModel, name: str | None = None) -> PreTrainedModel:
        check_teacher(student, teacher, processing_class, name)
        return teacher.to(device=args.device, dtype=dtype)

    def load(name: str) -> PreTrainedModel:
        return place(load_teacher(name, student, args.teacher_dtype), name)

    if isinstance(teacher_model, PreTrainedModel):
        kind = OnlineTeacher if args.method == "online" else FrozenTeacher
        return kind(place(teacher_model))
    if isinstance(teacher_model, (str, os.PathLike)):
        name = os.fspath(teacher_model)
        if args.method == "progressive":
            return CheckpointTeacher(find_checkpoints(name), load, args.teacher_schedule)
        kind = OnlineTeacher if args.method == "online" else FrozenTeacher
        return kind(load(name), name)
    folders = list(teacher_model) if isinstance(teacher_model, Sequence) else []
    if not folders or not all(isinstance(folder, (str, os.PathLike)) for folder in folders):
        raise ValueError(
            f"teacher_model is a {type(teacher_model).__name__}; pass a PreTrainedModel, its name or folder, or, for "
            "method='progressive', a list of folders."
        )
    if args.method != "progressive":
        raise ValueError(
            f"teacher_model is a list of {len(folders)} checkpoints, but method is {args.method!r}; one teacher is "
            "needed, or method='progressive'."
        )
    return CheckpointTeacher([os.fspath(folder) for folder in folders], load, args.teacher_schedule)


def teacher_folder(checkpoint: str) -> str:
    """Where an online teacher's state lies beside a student's checkpoint folder."""
    output_dir, name = os.path.split(os.path.normpath(checkpoint))
    return os.path.join(output_dir, "_teacher", name)


def find_checkpoints(name: str) -> list[str]:
    """The `checkpoint-STEP` folders in a folder, by step; the name itself where it is one model.

    Raises:
        ValueError: the folder holds neither.
    """
    if not os.path.isdir(name):
        return [name]
    steps = {_steps_of(entry): entry for entry in os.listdir(name) if os.path.isdir(os.path.join(name, entry))}
    if checkpoints := [os.path.join(name, steps[step]) for step in sorted(step for step in steps if step is not None)]:
        return checkpoints
    if os.path.isfile(os.path.join(name, "config.json")):
        return [name]
    there = ", ".join(sorted(os.listdir(name))[:8]) or "nothing"
    raise ValueError(
        f"{name} has no {PREFIX_CHECKPOINT_DIR}-STEP folders to learn from progressively, only: {there}; pass the "
        "output_dir of the teacher's training, or a list of folders."
    )


def _steps_of(folder: str) -> int | None:
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", os.path.basename(os.path.normpath(folder)))
    return int(match[1]) if match else None
