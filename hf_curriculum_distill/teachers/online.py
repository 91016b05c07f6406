"""A teacher that trains alongside the student: its optimizer, its steps, its checkpoints."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Collection, Sequence

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.files import replacing
from hf_curriculum_distill.layers.heads import auxiliary_loss
from hf_curriculum_distill.layers.weights import load_weights
from hf_curriculum_distill.schedules import schedule_factor
from hf_curriculum_distill.teachers.teacher import Teacher

OPTIMIZER_FILE = "optimizer.safetensors"
_FOLDER = "_teacher"  # Trainer does not push folders that begin with an underscore


class OnlineTeacher(Teacher):
    """A teacher that learns the task from labels while it teaches (Harutyunyan et al., 2023, arXiv 2301.12245).

    For each micro-batch it first computes targets in eval mode without gradients, and then trains, with an optimizer of
    its own. This class reduces its gradients over processes, because nothing wraps the model.

    Args:
        model, name, stack: see [`Teacher`]. Parameters that require gradients are trained, in float32.

    Raises:
        ValueError: no parameter requires gradients.
    """

    learns = True

    def __init__(self, model: PreTrainedModel, name: str | None = None, stack: str = "encoder"):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError(
                "No parameter of the online teacher requires gradients, so it would learn nothing; call its "
                "requires_grad_(True), or take one of the methods for a trained teacher."
            )
        is_float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
        super().__init__(model if is_float32 else model.float(), name, stack)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._step = 0

    def start(self, args: CurriculumDistillationConfig, max_steps: int, decayed: Collection[str]) -> None:
        """Make optimizer and schedule: those of the student, except for `args.teacher_learning_rate`.

        Args:
            max_steps: the student's number of optimizer steps.
            decayed: names of the parameters with weight decay.
        """
        self._args, args = args, copy.copy(args)
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

    def task_loss(
        self,
        batch: Batch,
        num_rows: Tensor | int,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> Tensor:
        """The model's own loss on a micro-batch, in training mode: a sum over its rows, divided by `num_rows`.

        Args:
            num_rows: the number of rows that count in the whole accumulated batch.

        Raises:
            ValueError: the batch has no labels.
        """
        if batch.labels is None:
            raise ValueError("An online teacher learns from labels, but the batch has none; check the collator.")
        self.model.train()
        with self._autocast():
            _, (logits, balance) = self.partial_forward(
                self.model,
                self.known(batch.model_inputs),
                logits=True,
                rows=batch.rows,
                gather=batch.row_per_token,
                reduce=lambda logits, outputs: (logits, auxiliary_loss(self.model, outputs)),
            )
        of_labels = batch.head.label_loss(logits, batch.labels, label_smoothing, class_weights)
        return (of_labels + batch.num_rows * balance) / num_rows  # the routers' loss is a mean over tokens

    def learn(self, batch: Batch, counts: Tensor, accelerator: Accelerator) -> dict[str, Tensor]:
        """Train on a micro-batch, and take an optimizer step after the last one of an accumulated batch.

        Args:
            counts: `[number of positions, number of rows]` that count in the whole accumulated batch.

        Returns:
            the micro-batch's part of the mean loss, as `teacher_loss`.
        """
        args = self._args
        loss = self.task_loss(batch, counts[1].clamp(min=1), args.label_smoothing_factor, args.class_weights)
        loss.backward()
        self.model.eval()
        if accelerator.sync_gradients:
            parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if args.world_size > 1:
                # num_rows counts the rows of all processes, or of this one
                over = "sum" if args.average_tokens_across_devices else "mean"
                for parameter in parameters:  # all: with layer drop, processes differ in which ones have a gradient
                    own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad = accelerator.reduce(own, over)
            if args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate * self._schedule(self._step)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._step += 1
        return {"teacher_loss": loss.detach()}

    def save(self, checkpoint: str) -> list[str]:
        """Write the model and the optimizer's state, as safetensors both."""
        folder = _teacher_folder(checkpoint)
        self.model.save_pretrained(folder)
        state = self._optimizer.state_dict()["state"]
        tensors = {
            f"{index}.{name}": torch.as_tensor(value).contiguous()
            for index, values in state.items()
            for name, value in values.items()
            if value is not None
        }
        with replacing(os.path.join(folder, OPTIMIZER_FILE)) as partial:
            save_file(tensors, partial)
        return [folder]

    def load(self, checkpoint: str, step: int) -> None:
        folder = _teacher_folder(checkpoint)
        load_weights(self.model, folder)
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in load_file(os.path.join(folder, OPTIMIZER_FILE)).items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._step = step

    def remove_old_files(self, output_dir: str) -> None:
        teachers = os.path.join(output_dir, _FOLDER)
        old = set(os.listdir(teachers)) - set(os.listdir(output_dir)) if os.path.isdir(teachers) else ()
        for name in old:
            shutil.rmtree(os.path.join(teachers, name), ignore_errors=True)


def _teacher_folder(checkpoint: str) -> str:
    """The folder of an online teacher's state that belongs to a student's checkpoint folder."""
    output_dir, name = os.path.split(os.path.normpath(checkpoint))
    return os.path.join(output_dir, _FOLDER, name)
