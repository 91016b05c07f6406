"""[`CurriculumDistillationTrainer`]: a `transformers.Trainer` whose loss follows a curriculum taken from a teacher."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, ProgressCallback, TrainingArguments
from transformers.utils import ModelOutput

from hf_curriculum_distill.adapted import transformers_model
from hf_curriculum_distill.batch import Batch, BatchReader
from hf_curriculum_distill.batches import seeded
from hf_curriculum_distill.cached import CachedTeacher
from hf_curriculum_distill.checks import (
    check_batch,
    check_cache,
    check_launch,
    check_stages,
    check_training_data,
    label_loss_mismatch,
    make_cache_folder,
    naming_batch,
)
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.cost import flop_rates, flop_units
from hf_curriculum_distill.counting import is_ctc, with_label_positions
from hf_curriculum_distill.layers import PartialForward
from hf_curriculum_distill.loading import TeacherModel, check_teacher, prepare_teacher
from hf_curriculum_distill.metrics import TeacherComparison
from hf_curriculum_distill.objective import Objective
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.randomness import preserved_random_state
from hf_curriculum_distill.resume import ResumableTrainer
from hf_curriculum_distill.schedules import restarted_schedule
from hf_curriculum_distill.stages import Stage, num_frozen_layers, parse_layer_pairs
from hf_curriculum_distill.target_store import TargetStore
from hf_curriculum_distill.teachers import Targets, Teacher
from hf_curriculum_distill.trial import relative_error, try_out

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

logger = logging.getLogger(__name__)


@dataclass
class StageOutput(ModelOutput):
    """What [`CurriculumDistillationTrainer.compute_loss`] returns beside the loss while it trains.

    Args:
        logits: `[rows, classes]`, the rows that count; None in a stage that matches hidden states only.
    """

    logits: Tensor | None = None


class CurriculumDistillationTrainer(ResumableTrainer):
    """Distils a teacher into `model`, stage by stage; everything else is [`~transformers.Trainer`].

    Args:
        model, args, ...: as `transformers.Trainer`, in the same order. A plain `TrainingArguments` stands for a
            [`CurriculumDistillationConfig`] with this library's defaults.
        teacher_model: a trained model for the student's task, or the name or folder of one. With
            `args.method="progressive"` also the output folder of the teacher's own training, or a list of checkpoint
            folders; with `"online"` an untrained one. Without it (and without explicit `args.stages`) this class *is*
            `transformers.Trainer`.
        projection_bank: a [`ProjectionBank`] to use in place of one drawn from `args.projection_seed`.

    Attributes:
        stages: the resolved list of [`Stage`].
        stage: the stage of the current optimizer step.
        teacher: the [`Teacher`] (a [`CheckpointTeacher`] or [`OnlineTeacher`] with these methods), or None.
        projection_bank: the bank, or None where no stage matches hidden states.

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
            args = TrainingArguments("tmp_trainer") if args is None else args
            if not isinstance(args, CurriculumDistillationConfig):
                args = CurriculumDistillationConfig.from_training_arguments(args)
            if model is not None and not hasattr(model, "config"):
                raise ValueError(f"model is a {type(model).__name__}; pass the student as a PreTrainedModel.")
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            model_init,
            compute_loss_func,
            compute_metrics,
            callbacks,
            optimizers,
            optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics,
        )
        if not distils:
            if projection_bank is not None:
                raise ValueError("projection_bank was given without teacher_model, so nothing is projected; pass both.")
            return
        # the loss is a sum over the whole accumulated batch already: Trainer must not divide it again
        self.model_accepts_loss_kwargs = True
        if self.args.label_names is None and "labels" in self.label_names:
            self.label_names = ["labels"]  # evaluations need those, whatever other labels a forward may take
        self._last: tuple[Batch, Stage, bool] | None = None  # micro-batch, and whether the teacher ran, until booked
        self._comparison: TeacherComparison | None = None
        self._comparable: bool | None = None  # whether evaluations know the rows of the logits; None: not seen yet
        self._given_bank = projection_bank
        self._bank_made_of: tuple | None = None
        check_launch(self.args, self.compute_loss_func)  # before weights are read
        self._student = PartialForward(self.model, self.args.layer_stack)
        if teacher_model is not None:
            self.teacher = prepare_teacher(teacher_model, self.model, self.args, self.processing_class)
        self._who_teaches = self._describe_teacher()
        self._resolve()
        if self.train_dataset is not None:
            check_training_data(self.train_dataset, self.args)
            self._plan(self._forecast_steps())
            logger.info("Stages: %s", "; ".join(f"{s.name} until {s.until or 'the end'}" for s in self.stages))

    # ---- which stage ----

    @property
    def stages(self) -> list[Stage]:
        return list(self.stage_scheduler.stages if self.stage_scheduler else self._declared_stages)

    @property
    def stage(self) -> Stage | None:
        return self.stage_scheduler.stage_at(self.state.global_step) if self.stage_scheduler else None

    @property
    def _last_stage_index(self) -> int:
        """Of the optimizer step before: what is logged and evaluated belongs to it."""
        return self.stage_scheduler.index_at(self.state.global_step - 1)

    def set_initial_training_values(self, args, dataloader):
        """As `Trainer`. All of a training that depends on arguments, which may have been set since, begins here."""
        values = super().set_initial_training_values(args, dataloader)
        if self._declared_stages:
            self._resolve()
            self._plan(values[-1])
            if self._resumed is not None:
                self._check_resumed()
            if self.projection_bank is not None and not self.projection_bank.frozen:
                self._calibrate()
            self._prepare_teacher()  # with the bank of a checkpoint, if there is one
            self._cached_teacher = self._open_cache()
        return values

    def _resolve(self) -> None:
        """Fix the stages and what they need for the arguments and the student of now.

        Raises:
            ValueError: they do not fit together, or ask for another teacher than the trainer was made with.
        """
        args = self.args
        args.check()
        check_launch(args, self.compute_loss_func)
        if args.logit_chunk_size and self._shards_parameters:
            raise ValueError(
                f"logit_chunk_size is {args.logit_chunk_size}, but FSDP and DeepSpeed need all logits at once; "
                "leave it out, or launch with DDP."
            )
        if (now := self._describe_teacher()) != self._who_teaches:
            raise ValueError(
                f"The arguments ask for {now} since the trainer was made, which was {self._who_teaches}: another "
                "teacher. Make a new trainer."
            )
        student = self._core
        if student is not self._student.model or args.layer_stack != self._student.stack:
            if self.teacher is not None:
                check_teacher(student, self.teacher.model, self.processing_class)
            self._student.remove()
            self._student = PartialForward(student, args.layer_stack)
        teacher = self.teacher and self.teacher.partial_forward
        self._declared_stages = args.resolve_stages(self._student.depth, teacher and teacher.depth)
        check_stages(self._declared_stages, args, self._student, self.is_deepspeed_enabled)
        check_cache(self._declared_stages, args, student)
        make_cache_folder(args)
        self.projection_bank = self._make_bank()
        # whether any loss needs the labels, if only to know which rows count
        self._reads_labels = any(stage.needs_logits for stage in self._declared_stages) or args.method == "online"
        self._reads_labels |= args.hidden_positions == "labels" or args.layer_stack == "decoder"
        self._use_student(self._student)
        self._prepare_teacher()

    def _use_student(self, student: PartialForward) -> None:
        self._student, teacher = student, self.teacher and self.teacher.partial_forward
        self._objective = Objective(student, self.args)
        self._read = BatchReader(
            student, teacher, self.args, self.label_names, self._reads_labels, self._shards_parameters
        )

    def _prepare_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.prepare(self.projection_bank, self.args.truncate, self.accelerator.autocast)

    @property
    def _core(self) -> PreTrainedModel:
        """The student without what wraps it."""
        return transformers_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _describe_teacher(self) -> str:
        args = self.args
        kind = {"progressive": f"checkpoints by teacher_schedule={args.teacher_schedule}", "online": "online"}
        kind = kind.get(args.method, "one frozen teacher")
        return f"{kind}, with teacher_dtype={args.teacher_dtype} and layer_stack={args.layer_stack!r}"

    def _forecast_steps(self) -> int:
        """The number of optimizer steps, as far as it is known before there is a data loader."""
        args = self.args
        if args.max_steps >= 0:
            return args.max_steps
        samples = len(self.train_dataset) / (self._train_batch_size * args.world_size)
        batches = max(1, math.floor(samples) if args.dataloader_drop_last else math.ceil(samples))
        return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))

    def _plan(self, max_steps: int) -> None:
        self.stage_scheduler = self.args.schedule(self._declared_stages, max_steps)
        if self.teacher is not None:
            self.teacher.plan(max_steps)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As `Trainer`; with `restart_schedule_per_stage`, one warm-up and decay in each stage."""
        if self._declared_stages and self.args.restart_schedule_per_stage and self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            factor = restarted_schedule(
                self.stage_scheduler,
                self.args.lr_scheduler_type,
                optimizer.defaults["lr"],
                self.args.stage_warmup_ratio,
                self.args.lr_scheduler_kwargs or {},
            )
            self.lr_scheduler = LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- one batch ----

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        """As `Trainer`; where each example gets equally many labels, a training batch says where they are."""
        collator = super()._get_collator_with_removed_columns(data_collator, description)
        if self._declared_stages and description == "Training" and getattr(data_collator, "fixed_count", False):
            return functools.partial(with_label_positions, collator)
        return collator

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As `Trainer`, but counts what the losses are divided by over all micro-batches and processes."""
        if not self._declared_stages:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._position["batches"]:
            torch.empty((), dtype=torch.int64).random_()  # a DataLoader's draw at its start: dropout stays Trainer's
        with naming_batch(self._describe_step()):
            with self._loading:
                batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if len(batches) < num_batches:  # a stream has ended; with less than a whole window no step would be taken
                return [], None
            self._position["batches"] += len(batches)
            for batch in batches:
                check_batch(self.model, batch, self._reads_labels)
        counts = torch.stack([self._read(batch).counts.to(device) for batch in batches]).sum(0)
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
            # which Trainer adds with use_liger_kernel; the logits are compared with the teacher's
            batch = self._read({name: value for name, value in inputs.items() if name != "skip_logits"})
            with naming_batch("the evaluation"):
                check_batch(self.model, batch.inputs, self._reads_labels)
            loss, outputs = super().compute_loss(model, batch.for_student(batch.inputs), return_outputs=True)
            self._compare_with_teacher(outputs, batch)
            return (loss, outputs) if return_outputs else loss

        batch = self._read(inputs, whole_logits=return_outputs)
        stage = self._enter_stage(batch)
        counts = batch.counts if num_items_in_batch is None else num_items_in_batch
        targets = self._target_source.targets(batch, stage) if stage.needs_teacher else Targets()
        loss = self._objective(model, batch, stage, targets, counts, self._num_frozen_layers)
        learnt = {} if self.teacher is None else self.teacher.learn(batch, counts[1].clamp(min=1), self.accelerator)
        self._ledger.add_terms(learnt | loss.terms)  # the teacher's first, for it explains the rest
        self._last = batch, stage, targets.computed
        total = loss.total
        if self.args.average_tokens_across_devices:
            total *= self.accelerator.num_processes  # gradients are averaged over processes; the counts are global
        return (total, StageOutput(loss.logits)) if return_outputs else total

    @property
    def _target_source(self) -> Teacher | CachedTeacher | None:
        return self._cached_teacher or self.teacher

    @property
    def _shards_parameters(self) -> bool:
        # processes gather them wherever a module runs, so that all must run the head equally often
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    @property
    def _num_frozen_layers(self) -> int:
        return num_frozen_layers(
            self.stages, self._stage_index, self.args.train_prefix, self.args.freeze_matched_layers
        )

    def _enter_stage(self, batch: Batch) -> Stage:
        """The stage of this optimizer step; on its first batch, say so and measure its cost."""
        index = self.stage_scheduler.index_at(self.state.global_step)
        stage = self.stage_scheduler.stages[index]
        if stage.needs_teacher:
            self.teacher.advance(self.state.global_step)
        if index == self._stage_index:
            return stage
        begins, self._stage_index = self._stage_index is None, index
        if begins:
            self._try_out(batch)
        if self.args.device.type != "cpu":  # values are checked once a stage: that waits for the device
            with naming_batch(self._describe_step()):
                on_host = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in batch.inputs.items()}
                check_batch(self.model, on_host, self._reads_labels)
        first, end = self.stage_scheduler.span(index)
        logger.info("Stage %d of %d: %s (steps %d to %d)", index + 1, len(self.stages), stage.name, first + 1, end)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(stage.name)
        if self.args.torch_compile:
            torch.compiler.reset()  # another stage is another graph; past its limit dynamo would silently run eagerly
        if index not in self._ledger.rates:
            rates = flop_rates(self._objective, self._target_source, batch, stage, self._num_frozen_layers)
            self._ledger.set_rates(index, rates, self.accelerator)
        return stage

    def _try_out(self, batch: Batch) -> None:
        """Before the first step: whether two examples give every output that a later stage needs."""
        core = self._core
        if self._student.model is not core:  # accelerate has wrapped or replaced it
            self._use_student(PartialForward(core, self.args.layer_stack))
        with preserved_random_state(), naming_batch(self._describe_step()):
            try_out(self._objective, self.teacher, self._read, batch, self.stages)

    def _describe_step(self) -> str:
        index = self.stage_scheduler.index_at(self.state.global_step)
        stage = f"stage {index + 1} of {len(self.stages)}, {self.stages[index].name}"
        return f"step {self.state.global_step + 1} ({stage})"

    def floating_point_ops(self, inputs) -> float:
        """Operations of student (forward and backward) and teacher (forward; online also its own training)."""
        if not self._declared_stages:
            return super().floating_point_ops(inputs)
        if self._last is None:
            raise ValueError(
                f"{type(self).__name__}.compute_loss doesn't call CurriculumDistillationTrainer.compute_loss, so that "
                "no stage is trained. Call super().compute_loss(...) and change what it returns, or train without "
                "teacher_model."
            )
        (batch, stage, computed), self._last = self._last, None
        units = flop_units(self._target_source, batch, stage)
        return self._ledger.add_flops(self._stage_index, units, computed)

    # ---- the whole run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As `Trainer`. Calibrates the projection bank first, or reads it from the checkpoint to resume from.

        `resume_from_checkpoint=True` goes on from the last checkpoint that was written to its end or, where there is
        none yet, starts from the beginning.
        """
        if not self._declared_stages:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self._checkpoint = self._start_from(resume_from_checkpoint)
        if self._resumed is not None and not self.args.auto_find_batch_size:  # else it is known later how many steps
            self._resolve()
            self._plan(self._forecast_steps())
            self._check_resumed()  # before weights of another model are read
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

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        super()._run_epoch(*args, **kwargs)
        if self._cached_teacher is not None:
            self._cached_teacher.log_epoch(kwargs["epoch"])

    def _release_models(self) -> None:
        self._student.remove()
        if self.teacher is not None:
            self.teacher.partial_forward.remove()

    def _calibrate(self) -> None:
        """Measure the bank on a seeded sample of the training data: the same on every process and every launch."""
        if not self.args.standardize_targets:
            self.projection_bank.freeze()
            return
        num_samples, data = int(self.args.calibration_samples), self.train_dataset
        logger.info("Calibrating %d projections on %d examples", len(self.projection_bank.layer_pairs), num_samples)
        with preserved_random_state(self.args.projection_seed):
            if hasattr(data, "__len__"):
                chosen = random.sample(range(len(data)), min(num_samples, len(data)))
                examples = [data[i] for i in chosen]
            else:
                examples = list(itertools.islice(data, num_samples))
            batches = map(self._read_on_device, self._checked(self._load(examples, "calibration")))
            self.teacher.advance(None)
            self.teacher.fit(self.projection_bank, batches)
        for tensor in self.projection_bank.tensors().values():
            broadcast(tensor)

    def _load(self, examples: list, description: str) -> DataLoader:
        collator = self._get_collator_with_removed_columns(self.data_collator, description=description)
        return DataLoader(examples, self.args.train_batch_size, collate_fn=collator)

    def _read_on_device(self, inputs) -> Batch:
        return self._read(self._prepare_inputs(inputs))

    def _open_cache(self) -> CachedTeacher | None:
        """The teacher with the cache of `args.teacher_cache`, which forecasts its costs from a sample of the data."""
        args, data = self.args, self.train_dataset
        if args.teacher_cache is None:
            return None
        cached = CachedTeacher(self.teacher, TargetStore(self.teacher, self.projection_bank, args), self.stages)
        step = 0 if self._resumed is None else self._resumed["step"]
        if not hasattr(data, "__len__") or step >= self.stage_scheduler.max_steps:
            return cached
        chosen = random.Random(self._data_seed).sample(range(len(data)), min(len(data), int(args.calibration_samples)))
        loads = []
        for draw in range(2):  # what depends on chance differs between them
            with preserved_random_state(self._data_seed + draw):
                loads.append(list(self._load([data[i] for i in chosen], "forecast")))
        epochs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size / len(data)  # a step
        depth, spans = self.teacher.partial_forward.depth, []
        for number, stage in enumerate(self.stages):
            begin, end = self.stage_scheduler.span(number)
            share = 1.0 if stage.kl_weight else max(stage.teacher_layers, default=0) / depth
            spans.append((max(0, end - max(begin, step)) * epochs, share))
        with naming_batch("the cache's forecast"):
            batches = [[self._read_on_device(inputs) for inputs in load] for load in loads]
            cached.forecast(*batches, len(data), spans, self.is_world_process_zero())
        return cached

    def _checked(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of the calibration sample, still in host memory, if they can be learnt from."""
        labelled = []
        with naming_batch("the calibration sample"):
            for batch in loader:
                check_batch(self.model, batch, self._reads_labels)
                if self._reads_labels and "labels" in batch:
                    labelled.append(bool((batch["labels"] != -100).any()))
                yield batch
        if labelled and not any(labelled) and any(stage.needs_logits for stage in self.stages):
            raise ValueError(
                "In the whole calibration sample no label counts (all are -100), so the stages that match logits or "
                "labels would learn nothing. Check the collator; layer stages alone need none."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`, with the stage, its loss terms and the operations so far beside the training loss."""
        if self._declared_stages and self.is_in_train and ("loss" in logs or "train_loss" in logs):
            terms, flops = self._finite_terms(), self._ledger.reduce_flops(self.accelerator)
            logs |= flops
            if "train_loss" in logs:  # of the whole run, resumed or not
                logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step)
            if "loss" in logs:
                logs |= {"stage": self._last_stage_index} | terms
                self._ledger.start(self.state.global_step)
        super().log(logs, start_time)

    def _finite_terms(self) -> dict[str, float]:
        terms = self._ledger.terms(self.accelerator, self.state.global_step)
        if not self.args.average_tokens_across_devices:  # each process's terms are means already
            terms = {name: value / self.args.world_size for name, value in terms.items()}
        self._check_finite(terms)
        return terms

    def _check_finite(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                index = self._last_stage_index if self.stage_scheduler else 0
                raise FloatingPointError(
                    f"{name} is {value} in stage {index + 1} of {len(self.stages)} ({self.stages[index].name}) at step "
                    f"{self.state.global_step}. Lower the learning rate, check the data, or use bf16 in place of fp16; "
                    "the checkpoints before this step are sound."
                )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._declared_stages:
            if self.args.restart_schedule_per_stage and self.accelerator.optimizer_step_was_skipped:
                self.lr_scheduler.step()  # an fp16 step that overflowed: the stage goes on, so does its schedule
            if self.state.global_step in self.stage_scheduler.boundaries and self.args.logging_strategy != "no":
                self.control.should_log = True  # no logged average mixes two stages
            if self.control.should_save or self.control.should_evaluate:
                self._finite_terms()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # ---- evaluation ----

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        """As `Trainer`, with accuracy on the labels that count and, given a teacher, agreement and divergence."""
        self._comparison = TeacherComparison()
        # every evaluation draws the same, and training draws what it would without evaluations
        own_randomness = preserved_random_state(self._data_seed) if self._declared_stages else nullcontext()
        with own_randomness, seeded(dataloader, epoch=0):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        # accelerate would keep every evaluation's loader, and its shared memory's open file, until the run ends
        self.accelerator._dataloaders[:] = [kept for kept in self.accelerator._dataloaders if kept is not dataloader]
        compared = {f"{metric_key_prefix}_{name}": value for name, value in self._comparison.compute().items()}
        output.metrics.update({name: value for name, value in compared.items() if name not in output.metrics})
        if self._declared_stages:
            loss = {name: value for name, value in output.metrics.items() if name == f"{metric_key_prefix}_loss"}
            self._check_finite(loss | compared)
            if not self.is_in_train:
                self._release_models()
        return output

    def _compare_with_teacher(self, outputs, batch: Batch) -> None:
        if self._comparable is None:
            mismatch = label_loss_mismatch(batch, outputs, relative_error(self.args, self.model))
            self._comparable = mismatch is None
            if mismatch:
                logger.warning("%s Evaluations have no accuracy, agreement and divergence.", mismatch)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[1]
        if logits is None or not self._comparable or not ("labels" in batch.inputs or is_ctc(self.model)):
            return
        student_logits = logits.flatten(0, -2)
        rows = torch.arange(len(student_logits), device=logits.device) if batch.rows is None else batch.rows
        examples, teacher_logits = rows // (len(student_logits) // len(batch)), None
        if self.teacher is not None:
            self.teacher.advance(None)
            whole = self._read(batch.inputs, whole_logits=True).with_rows(rows)
            _, teacher_logits = self.teacher.forward(whole, Stage(kl_weight=1.0))
        self._comparison.update(
            self.accelerator, student_logits[rows], teacher_logits, batch.labels, examples, len(batch)
        )

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Only the last stage competes: before it the head is untrained, and early stopping would end the run."""
        if self._declared_stages and self._last_stage_index != len(self.stages) - 1:
            return False
        return super()._determine_best_metric(metrics, trial)

    # ---- set-up ----

    def _make_bank(self) -> ProjectionBank | None:
        """The given bank, the one of a training before where it is still the right one, or a new one."""
        args, given = self.args, self._given_bank
        pairs = parse_layer_pairs(dict.fromkeys(pair for stage in self._declared_stages for pair in stage.hidden))
        if not pairs:
            if given is not None:
                raise ValueError("projection_bank was given, but no stage matches hidden states; leave it out.")
            self._bank_made_of = None
            return None
        if not isinstance(given, ProjectionBank | None):
            raise ValueError(
                f"projection_bank is a {type(given).__name__}; pass a ProjectionBank, which "
                "ProjectionBank.from_pretrained reads from a folder."
            )
        self._student.check_training(args.freeze_matched_layers or args.train_prefix == "block")
        dims = self._student.hidden_size, self.teacher.partial_forward.hidden_size
        made_of = pairs, dims, args.projection, args.projection_seed, args.shared_projection
        made_of += args.standardize_targets, args.calibration_samples, args.hidden_positions, args.layer_stack
        if given is None and made_of == self._bank_made_of:
            return self.projection_bank
        if given is None:
            each = [[dim] * len(pairs) for dim in dims]
            kind, seed, shared = args.projection, args.projection_seed, args.shared_projection
            given = ProjectionBank.create(pairs, *each, kind=kind, seed=seed, shared=shared)
        given.check_fits(pairs, *dims, self.teacher.identity["fingerprint"])
        self._bank_made_of = made_of
        return given.to(args.device)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.teacher is not None:
            teacher_inputs = inspect.signature(self.teacher.model.forward).parameters
            self._signature_columns += [name for name in teacher_inputs if name not in self._signature_columns]
