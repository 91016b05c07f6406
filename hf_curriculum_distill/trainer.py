"""[`CurriculumDistillationTrainer`]: a `transformers.Trainer` whose loss follows a curriculum taken from a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerControl, TrainingArguments
from transformers.utils import ModelOutput

from hf_curriculum_distill.batches.batch import Batch
from hf_curriculum_distill.batches.checks import check_batch, naming_batch
from hf_curriculum_distill.batches.randomness import preserved_random_state
from hf_curriculum_distill.batches.seeding import seeded
from hf_curriculum_distill.config import CurriculumDistillationConfig, extended
from hf_curriculum_distill.cost import flop_rates, flop_units
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.preparing.trial import relative_error
from hf_curriculum_distill.progress import name_stage
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.report.trainer import PublishedTrainer
from hf_curriculum_distill.stages import Stage, matched_pairs
from hf_curriculum_distill.teachers.cached import CachedTeacher
from hf_curriculum_distill.teachers.loading import TeacherModel
from hf_curriculum_distill.teachers.teacher import Targets, Teacher

if TYPE_CHECKING:
    import datasets
    from transformers import (
        BaseImageProcessor,
        DataCollator,
        EvalPrediction,
        FeatureExtractionMixin,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
    )

logger = get_logger(__name__)


@dataclass
class StageOutput(ModelOutput):
    """What [`CurriculumDistillationTrainer.compute_loss`] returns next to the loss in training.

    Args:
        logits: the rows that count, `[rows, classes]`; None in a stage that matches only hidden states.
    """

    logits: Tensor | None = None


class CurriculumDistillationTrainer(PublishedTrainer):
    """Distils a teacher into `model`, stage by stage; everything else is [`~transformers.Trainer`].

    Args:
        model, args, ...: as for `transformers.Trainer`, in the same order. `args` of another class than
            [`CurriculumDistillationConfig`] get its fields, with their defaults, and keep their own.
        teacher_model: a trained model for the student's task, or its name or folder. With `args.method="progressive"`,
            also the output folder of the teacher's training, or a list of checkpoint folders; with `"online"`, an
            untrained model. Without a teacher and explicit `args.stages`, this class *is* `transformers.Trainer`.
        projection_bank: a [`ProjectionBank`] to use instead of a new one drawn from `args.projection_seed`.

    Attributes:
        stages: the list of [`Stage`]; each `until` is a number of optimizer steps once their number is known.
        stage: the stage of the current optimizer step.
        teacher: the [`Teacher`] (a [`CheckpointTeacher`] or [`OnlineTeacher`] with these methods), or None.
        projection_bank: the [`ProjectionBank`], or None if no stage matches hidden states.

    Raises:
        ValueError: teacher, stages, layer map, bank, data or launch do not fit together (see each message).
        OSError: the teacher's files are missing.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | datasets.Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | datasets.Dataset | None = None,
        processing_class: PreTrainedTokenizerBase
        | BaseImageProcessor
        | FeatureExtractionMixin
        | ProcessorMixin
        | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        teacher_model: TeacherModel | None = None,
        projection_bank: ProjectionBank | None = None,
    ):
        self._cached_teacher: CachedTeacher | None = None
        distils = teacher_model is not None or getattr(args, "stages", None) is not None
        if distils:
            args = extended(TrainingArguments("tmp_trainer") if args is None else args)
            if model is not None and not hasattr(model, "config"):
                raise ValueError(f"model is a {type(model).__name__}; pass the student as a PreTrainedModel.")
        # by name and only if it was given, for Seq2SeqTrainer, which may be the next class, lacks it
        of_optimizer = {"optimizer_cls_and_kwargs": optimizer_cls_and_kwargs} if optimizer_cls_and_kwargs else {}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            **of_optimizer,
        )
        if not distils:
            if projection_bank is not None:
                raise ValueError("projection_bank was given without teacher_model, so nothing is projected; pass both.")
            if isinstance(args, CurriculumDistillationConfig) and args.class_weights is not None:
                raise ValueError(
                    "class_weights was given without teacher_model and stages, so that the model's own loss is "
                    'trained, which has no weights; set stages=[{"label_weight": 1.0}].'
                )
            return
        self._last: tuple[Batch, Stage, bool] | None = None  # micro-batch, and whether the teacher ran, until booked
        self._prepare(teacher_model, projection_bank)

    # ---- one batch ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As `Trainer`, but count the positions and rows that losses are divided by, over all processes."""
        if not self._declared_stages:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._position["batches"]:
            torch.empty(
                (), dtype=torch.int64
            ).random_()  # draw what a DataLoader draws at its start, so that dropout is as in Trainer
        with naming_batch(self._describe_step()):
            with self._loading:
                batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if len(batches) < num_batches:  # a stream has ended within an accumulated batch, for which no step is taken
                return [], None
            self._position["batches"] += len(batches)
            for batch in batches:
                check_batch(self.model, batch, self._reads_labels)
        counts = sum(self._read(batch).counts.to(device) for batch in batches)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return batches, counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The current stage's weighted sum of losses; in evaluation the student's own task loss, in every stage.

        `num_items_in_batch` is what [`get_batch_samples`] counted; without it the loss is this batch's mean.
        """
        if not self._declared_stages:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            loss, outputs = self._evaluate_batch(model, inputs)
            return (loss, outputs) if return_outputs else loss

        batch = self._read(inputs, whole_logits=return_outputs)
        batch.noise  # noqa: B018  drawn here: measurements at the start of a stage restore the random state
        stage = self._enter_stage(batch)
        counts = batch.counts if num_items_in_batch is None else num_items_in_batch
        targets = self._target_source.targets(batch, stage) if stage.needs_teacher else Targets()
        loss = self._objective(model, batch, stage, targets, counts, self._frozen_layer)
        learnt = {} if self.teacher is None else self.teacher.learn(batch, counts, self.accelerator)
        self._totals.add_terms(learnt | loss.terms)  # the teacher's first, for it explains the rest
        self._last = batch, stage, targets.computed
        total = loss.total
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # gradients are averaged over processes, but the counts are of all of them
            total = total * self.args.world_size
        return (total, StageOutput(loss.logits)) if return_outputs else total

    def _evaluate_batch(self, model, inputs):
        """The student's own loss and outputs, which are compared with the teacher's."""
        # Trainer adds it with use_liger_kernel, but the logits are compared with the teacher's
        inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}
        batch = self._read(inputs, whole_logits=True)
        with naming_batch("the evaluation"):
            check_batch(self.model, batch.inputs, self._reads_labels)
        own = batch.for_student(batch.inputs)
        loss, outputs = super().compute_loss(model, own, return_outputs=True)
        has_loss = all(name in own for name in batch.head.label_names)  # Trainer takes out labels that it smooths
        self._comparison.update(batch, outputs, relative_error(self.args, self.model), has_loss)
        self._compare_layers(batch, model)
        return loss, outputs

    def _compare_layers(self, batch: Batch, model: nn.Module) -> None:
        if self.args.evaluate_layers and self.projection_bank is not None and self.projection_bank.frozen:
            with torch.no_grad():
                self._comparison.update_layers(batch, self._student, model, matched_pairs(self.stages))

    def _compare_embeddings(self, batch: Batch, model: nn.Module) -> None:
        bank = self.projection_bank
        if batch.pool is not None and self.teacher is not None and (bank is None or not bank.lacks_matrices):
            with torch.no_grad(), self.compute_loss_context_manager():
                self._comparison.update_embeddings(batch, self._student, model)

    @property
    def _target_source(self) -> Teacher | CachedTeacher | None:
        return self._cached_teacher or self.teacher

    def _enter_stage(self, batch: Batch) -> Stage:
        """The stage of this optimizer step; at its first batch, log it and measure its operations."""
        index = self.stage_scheduler.index_at(self.state.global_step)
        stage = self.stage_scheduler.stage_at(self.state.global_step)
        if stage.needs_teacher:
            self.teacher.advance(self.state.global_step)
        if index == self._stage_index:
            return stage
        begins, self._stage_index = self._stage_index is None, index
        self._frozen_layer = self.args.frozen_layer(self.stages, index)
        if begins:
            self._try_out(batch)
        if self.args.device.type != "cpu":  # check values once a stage, because this waits for the device
            with naming_batch(self._describe_step()):
                on_host = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in batch.inputs.items()}
                check_batch(self.model, on_host, self._reads_labels)
        first, end = self.stage_scheduler.span(index)
        if index and self.state.global_step == first:  # also after a resume from this step, as of the stage before
            self._forget_losses()
            if not self.args.carry_optimizer:
                self.optimizer.state.clear()
        logger.info("Stage %d of %d: %s (steps %d to %d)", index + 1, len(self.stages), stage.name, first + 1, end)
        name_stage(self.callback_handler.callbacks, stage.name)
        if self.args.torch_compile:
            torch.compiler.reset()  # a stage is another graph; after a number of them dynamo no longer compiles
        if index not in self._totals.rates:
            rates = flop_rates(self._objective, self._target_source, batch, stage, self._frozen_layer)
            self._totals.set_rates(index, rates, self.accelerator)
        return stage

    def floating_point_ops(self, inputs) -> float:
        """Operations of the student (forward and backward) and the teacher (forward and, if online, its training)."""
        if not self._declared_stages:
            return super().floating_point_ops(inputs)
        if self._last is None:
            own = type(self).compute_loss is not CurriculumDistillationTrainer.compute_loss
            name = "compute_loss" if own else "training_step"
            raise ValueError(
                f"{type(self).__name__}.{name} doesn't call CurriculumDistillationTrainer.compute_loss, so that no "
                f"stage is trained. Call super().{name}(...) and change what it returns, or train without "
                "teacher_model."
            )
        (batch, stage, computed), self._last = self._last, None
        units = flop_units(self._target_source, batch, stage)
        return self._totals.add_flops(self._stage_index, units, computed)

    # ---- the whole run ----

    @property
    def train_seconds(self) -> float:
        """Seconds for which the run has trained, evaluations along the way included, in all parts of a resumed run."""
        return self._totals.seconds

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As `Trainer`. Calibrates the projection bank first, or reads it from the checkpoint to resume from.

        `resume_from_checkpoint=True` goes on from the last checkpoint that was written to its end or, where there is
        none yet, starts from the beginning.
        """
        if not self._declared_stages:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self._checkpoint = self._start_from(resume_from_checkpoint)
        if (
            self._resumed is not None and not self.args.auto_find_batch_size
        ):  # otherwise the number of steps is not known yet
            self._resolve()
            self._plan(self._estimate_steps())
            self._check_resumed()  # before weights of another model are loaded
        if getattr(self.data_collator, "seed", None) is not None:
            logger.warning(
                "The data collator has a seed and so a random state of its own, which no checkpoint holds: a resumed "
                "run draws other masks. Leave its seed out; batches are drawn from args.seed."
            )
        self._last = None
        try:
            output = super().train(self._checkpoint, *args, **kwargs)
        finally:
            self._release_models()
            self._cached_teacher = None
        return output._replace(training_loss=output.metrics["train_loss"])

    def _end_step(self, control: TrainerControl) -> None:
        if self._schedules_by_stage and self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()  # an fp16 step that overflowed: the stage continues, and so must its schedule
        if self.state.global_step in self.stage_scheduler.boundaries and self.args.logging_strategy != "no":
            control.should_log = True  # so that no logged average mixes two stages
        if control.should_save or control.should_evaluate:
            self._finite_terms()
        super()._end_step(control)

    def _end_epoch(self, control: TrainerControl) -> None:
        if self._cached_teacher is not None:
            self._cached_teacher.log_epoch(self._position["epoch"])
        super()._end_epoch(control)
        if control.should_save or control.should_evaluate:
            self._finite_terms()

    # ---- evaluation ----

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        """As `Trainer`; compares with the teacher also where another class, such as `Seq2SeqTrainer`, computes the loss
        without [`compute_loss`]."""
        if not self._declared_stages:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        before = self._comparison.num_batches
        output = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        if output[0] is None:  # the model has no loss, and compute_loss was not called
            batch = self._read(self._prepare_inputs(inputs))
            self._compare_layers(batch, model)
            self._compare_embeddings(batch, model)
        elif self._comparison.num_batches == before:
            with torch.no_grad(), self.compute_loss_context_manager():
                self._evaluate_batch(model, self._prepare_inputs(inputs))
        return output

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        """As `Trainer`, with the accuracy on the labels that count and, with a teacher, agreement and divergence."""
        arguments = dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        if not self._declared_stages:
            return super().evaluation_loop(*arguments)
        self._comparison.start()
        # all evaluations draw the same numbers, and training draws the same as without evaluations
        with preserved_random_state(self._data_seed), seeded(dataloader, epoch=0):
            output = super().evaluation_loop(*arguments)
        # otherwise accelerate keeps each evaluation's loader, and an open file of shared memory, until the end
        self.accelerator._dataloaders[:] = [kept for kept in self.accelerator._dataloaders if kept is not dataloader]
        compared = self._comparison.compute(metric_key_prefix)
        if not self._comparison.num_batches and f"{metric_key_prefix}_loss" in output.metrics:
            logger.warning(
                "%s.prediction_step doesn't call CurriculumDistillationTrainer.prediction_step, so that the evaluation "
                "has no accuracy, agreement and divergence; call super().prediction_step(...) for these.",
                type(self).__name__,
            )
        output.metrics.update({name: value for name, value in compared.items() if name not in output.metrics})
        loss = {name: value for name, value in output.metrics.items() if name == f"{metric_key_prefix}_loss"}
        self._check_finite(loss | compared)
        if not self.is_in_train:
            self._release_models()
        return output

    def _determine_best_metric(self, metrics, trial) -> bool:
        """As `Trainer`, in the last stage only: before it the head is untrained, and training could stop early."""
        if self._declared_stages and self._last_stage_index != len(self.stages) - 1:
            return False
        return super()._determine_best_metric(metrics, trial)
