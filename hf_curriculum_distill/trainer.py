"""[`CurriculumDistillationTrainer`]: a `transformers.Trainer` whose loss follows a curriculum taken from a teacher."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProgressCallback, TrainerControl, TrainingArguments
from transformers.utils import ModelOutput

from hf_curriculum_distill import losses
from hf_curriculum_distill.adapted import is_quantised, transformers_model
from hf_curriculum_distill.batches import seeded
from hf_curriculum_distill.cache import Question, TeacherCache
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
from hf_curriculum_distill.chunks import RowLogits, chunk_size, logit_losses, sum_over_chunks
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.cost import stage_flops
from hf_curriculum_distill.counting import (
    LABEL_POSITIONS,
    answers_per_example,
    answers_per_frame,
    answers_per_token,
    count,
    counted_rows,
    decodes_labels,
    label_weights,
    position_weights,
    shifted_right,
    with_label_positions,
)
from hf_curriculum_distill.layers import PartialForward, auxiliary_loss
from hf_curriculum_distill.loading import TeacherModel, check_teacher, prepare_teacher
from hf_curriculum_distill.metrics import TeacherComparison
from hf_curriculum_distill.online import OnlineTeacher
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.randomness import preserved_random_state
from hf_curriculum_distill.resume import ResumableTrainer
from hf_curriculum_distill.schedules import restarted_schedule
from hf_curriculum_distill.stages import Stage, num_frozen_layers, parse_layer_pairs

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
        teacher: the [`FrozenTeacher`] (a [`CheckpointTeacher`] or [`OnlineTeacher`] with these methods), or None.
        projection_bank: the bank, or None where no stage matches hidden states.

    Raises:
        ValueError: teacher, stages, layer map, bank, data or launch do not fit together (see each message).
        OSError: the teacher's files are missing.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *trainer_args: Any,
        teacher_model: TeacherModel | None = None,
        projection_bank: ProjectionBank | None = None,
        **trainer_kwargs: Any,
    ):
        self._cache: TeacherCache | None = None
        distils = teacher_model is not None or getattr(args, "stages", None) is not None
        if distils:
            args = TrainingArguments("tmp_trainer") if args is None else args
            if not isinstance(args, CurriculumDistillationConfig):
                args = CurriculumDistillationConfig.from_training_arguments(args)
            if model is not None and not hasattr(model, "config"):
                raise ValueError(f"model is a {type(model).__name__}; pass the student as a PreTrainedModel.")
        super().__init__(model, args, *trainer_args, **trainer_kwargs)
        if not distils:
            if projection_bank is not None:
                raise ValueError("projection_bank was given without teacher_model, so nothing is projected; pass both.")
            return
        # the loss is a sum over the whole accumulated batch already: Trainer must not divide it again
        self.model_accepts_loss_kwargs = True
        if self.args.label_names is None and "labels" in self.label_names:
            self.label_names = ["labels"]  # evaluations need those, whatever other labels a forward may take
        self._num_rows = 0  # of the micro-batch: that its logits are computed for
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
            self._cache = self._open_cache()
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
        self._balances_experts = bool(getattr(student.config.get_text_config(), "output_router_logits", False))

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
        counts = torch.stack([self._count(batch).to(device) for batch in batches]).sum(0)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return batches, counts

    def _count(self, inputs) -> Tensor:
        if not self._reads_labels:  # they may be of any kind
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return count(self.model, inputs, self.args.layer_stack)

    def _describe_step(self) -> str:
        index = self.stage_scheduler.index_at(self.state.global_step)
        stage = f"stage {index + 1} of {len(self.stages)}, {self.stages[index].name}"
        return f"step {self.state.global_step + 1} ({stage})"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The current stage's weighted sum of losses; in evaluation the student's own task loss, in every stage.

        `num_items_in_batch` is what [`get_batch_samples`] counted; without it the loss is this batch's mean.
        """
        if not self._declared_stages:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            # which Trainer adds with use_liger_kernel; the logits are compared with the teacher's
            inputs = {name: value for name, value in inputs.items() if name != "skip_logits"}
            with naming_batch("the evaluation"):
                check_batch(self.model, inputs, self._reads_labels)
            loss, outputs = super().compute_loss(model, self._for_student(inputs), return_outputs=True)
            self._compare_with_teacher(outputs, inputs)
            return (loss, outputs) if return_outputs else loss

        stage = self._enter_stage(inputs)
        rows, labels = counted_rows(self.model, inputs) if stage.needs_logits else (None, None)
        if stage.label_weight and labels is None:
            raise ValueError(f"Stage {stage.name!r} learns from labels, but the batch has none; check the collator.")
        self._num_rows = 0 if rows is None else len(rows)
        chunk_size = None if return_outputs else self._chunk_size(rows)
        ask = self._run_teacher if self._cache is None else self._ask_cache
        target_hidden, target_logits = ask(inputs, stage, rows, chunk_size)

        def sum_logit_losses(logits: Tensor | RowLogits, outputs: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
            losses_of = functools.partial(logit_losses, stage, self.args, target_logits, labels)
            return sum_over_chunks(losses_of, logits)

        reduce = sum_logit_losses if chunk_size else None  # its gradients are taken where wrappers see the head run
        if stage.label_weight and self._balances_experts:

            def reduce(logits, outputs):
                return logits, auxiliary_loss(self._student.model, outputs)

        hidden, logits = self._run_student(model, inputs, stage, rows, chunk_size, reduce)

        counts = self._count(inputs) if num_items_in_batch is None else num_items_in_batch
        num_positions, num_rows = counts.clamp(min=1)
        terms, loss = {}, 0.0
        if stage.hidden:
            num_matched = num_rows if self.args.hidden_positions == "labels" else num_positions
            errors = []
            for student_layer, teacher_layer in stage.hidden:
                if self._cache is None:
                    target = self.projection_bank.project(student_layer, target_hidden[teacher_layer])
                else:  # which keeps them projected
                    target = target_hidden[student_layer]
                weights = self._weigh(inputs, target)
                errors.append(losses.hidden_state_mse(hidden[student_layer], target, weights))
            terms["hidden_mse"] = torch.stack(errors).mean() / num_matched
            loss += stage.hidden_weight * terms["hidden_mse"]
        if stage.needs_logits:
            if stage.label_weight and self._balances_experts:
                logits, balance = logits
                terms["aux_loss"] = len(rows) * balance / num_rows  # a mean over tokens, weighted as these rows are
                loss += stage.label_weight * terms["aux_loss"]
            total, sums = logits if chunk_size else sum_logit_losses(logits)
            terms |= {name: value / num_rows for name, value in sums.items()}
            loss += total / num_rows
        if isinstance(self.teacher, OnlineTeacher):
            terms = {"teacher_loss": self._train_teacher(inputs, num_rows)} | terms  # first, for it explains the rest
        self._ledger.add_terms(terms)
        if self.args.average_tokens_across_devices:
            loss *= self.accelerator.num_processes  # gradients are averaged over processes; the counts are global
        self._computed_loss = True
        return (loss, StageOutput(logits)) if return_outputs else loss

    def _weigh(self, inputs, hidden: Tensor) -> Tensor:
        if self.args.hidden_positions == "labels":
            return label_weights(self.model, inputs, hidden)
        return position_weights(self.model, inputs, hidden, self.args.layer_stack)

    @property
    def _shards_parameters(self) -> bool:
        # processes gather them wherever a module runs, so that all must run the head equally often
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _chunk_size(self, rows: Tensor | None) -> int | None:
        """How many rows of logits to have at a time; None for all."""
        if rows is None or self._shards_parameters or self._balances_experts:
            return None
        return chunk_size(self.args, len(rows), getattr(self.model.config.get_text_config(), "vocab_size", None) or 0)

    def _run_student(self, model, inputs, stage: Stage, rows: Tensor | None, chunk_size=None, reduce=None):
        """Hidden states and logits of the stage, or what `reduce` makes of these. `model` is what wraps the student."""
        if self.args.torch_compile and rows is not None and LABEL_POSITIONS not in inputs:
            torch._dynamo.maybe_mark_dynamic(rows, 0)  # how many count differs from batch to batch: one graph for all
        return self._student(
            model,
            self._for_student(self._questions(inputs)),
            stage.student_layers,
            logits=stage.needs_logits,
            rows=rows,
            gather=rows is not None and answers_per_token(self.model, inputs),
            frozen=self._num_frozen_layers,
            truncate=self.args.truncate,
            chunk_size=chunk_size,
            reduce=reduce,
        )

    def _run_teacher(self, inputs, stage: Stage, rows: Tensor | None, chunk_size: int | None = None):
        if not stage.needs_teacher:
            return {}, None
        teacher = self.teacher.at(self.state.global_step if self.model.training else None)
        with self.accelerator.autocast():
            return teacher(
                self._questions(inputs),
                stage.teacher_layers,
                logits=bool(stage.kl_weight),
                rows=rows,
                gather=rows is not None and answers_per_token(self.model, inputs),
                truncate=self.args.truncate,
                chunk_size=chunk_size,
            )

    def _ask_cache(self, inputs, stage: Stage, rows: Tensor | None, chunk_size: int | None = None):
        """As [`_run_teacher`], but with hidden states projected, by student layer; the teacher runs where one lacks."""
        if not stage.needs_teacher:
            return {}, None
        asked = self._asked(stage)
        question = self._ask_about(inputs, asked)
        self._num_rows = self._num_rows if question.rows is None else len(question.rows)
        return self._cache.targets(question, stage, asked)

    def _asked(self, stage: Stage) -> Stage:
        """What the teacher answers when it is asked in a stage: with a cache, at once what any stage wants."""
        if self._cache is None or not stage.needs_teacher:
            return stage
        pairs = dict.fromkeys(pair for one in self.stages for pair in one.hidden)
        return Stage(hidden=pairs, kl_weight=float(any(one.kl_weight for one in self.stages)))

    def _ask_about(self, inputs, asked: Stage) -> Question:
        """What the teacher reads of a batch, the rows of logits that count, and how it is asked."""
        questions = {n: v for n, v in self._questions(inputs).items() if self.teacher.partial_forward.accepts(n)}
        answers, rows = answers_per_example(self.model, inputs), None
        if asked.kl_weight:
            rows, _ = counted_rows(self.model, inputs)
            rows = torch.arange(answers * len(inputs[self.model.main_input_name])) if rows is None else rows

        def ask():
            hidden, logits = self._run_teacher(inputs, asked, rows, self._chunk_size(rows))
            return {s: self.projection_bank.project(s, hidden[t]) for s, t in asked.hidden}, logits

        return Question(questions, rows, answers, ask)

    def _train_teacher(self, inputs, num_rows: Tensor) -> Tensor:
        rows, labels = counted_rows(self.model, inputs)
        if labels is None:
            raise ValueError("An online teacher learns from labels, but the batch has none; check the collator.")
        self._num_rows = len(rows)
        gather = answers_per_token(self.model, inputs)
        return self.teacher.learn(self._questions(inputs), rows, labels, num_rows, gather, self.accelerator, self.args)

    def _for_student(self, inputs) -> dict[str, Any]:
        """The inputs without those that only the teacher's forward names; the rest is the student's, as in Trainer."""
        teachers = self.teacher.partial_forward if self.teacher else self._student
        return {n: v for n, v in inputs.items() if self._student.accepts(n) or not teachers.accepts(n)}

    def _questions(self, inputs) -> dict[str, Any]:
        """The inputs without labels: no model computes a loss of its own here."""
        answers = {*self.label_names, LABEL_POSITIONS}
        questions = {name: value for name, value in inputs.items() if name not in answers}
        given = {"decoder_input_ids", "decoder_inputs_embeds"} & questions.keys()
        if decodes_labels(self.model) and not given and "labels" in inputs:
            questions["decoder_input_ids"] = shifted_right(self.model, inputs["labels"])
        return questions

    @property
    def _num_frozen_layers(self) -> int:
        return num_frozen_layers(
            self.stages, self._stage_index, self.args.train_prefix, self.args.freeze_matched_layers
        )

    def _enter_stage(self, inputs) -> Stage:
        """The stage of this optimizer step; on its first batch, say so and measure its cost."""
        index = self.stage_scheduler.index_at(self.state.global_step)
        stage = self.stage_scheduler.stages[index]
        if index == self._stage_index:
            return stage
        begins, self._stage_index = self._stage_index is None, index
        if begins:
            self._try_out(inputs)
        if self.args.device.type != "cpu":  # values are checked once a stage: that waits for the device
            with naming_batch(self._describe_step()):
                on_host = {n: v.cpu() if isinstance(v, Tensor) else v for n, v in inputs.items()}
                check_batch(self.model, on_host, self._reads_labels)
        first, end = self.stage_scheduler.span(index)
        logger.info("Stage %d of %d: %s (steps %d to %d)", index + 1, len(self.stages), stage.name, first + 1, end)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_description(stage.name)
        if self.args.torch_compile:
            torch._dynamo.reset()  # another stage is another graph; past its limit dynamo would silently run eagerly
        if index not in self._ledger.rates:
            self._ledger.set_rates(index, self._measure_flops(inputs, stage), self.accelerator)
        return stage

    @torch.no_grad()
    def _try_out(self, inputs) -> None:
        """Before the first step: whether two examples give every output that a later stage needs.

        Raises:
            ValueError: they do not, or the model's own loss says that its labels are no classes of the rows that this
                library compares.
        """
        core = self._core
        if self._student.model is not core:  # accelerate has wrapped or replaced it
            self._student = PartialForward(core, self.args.layer_stack)
        pairs = dict.fromkeys(pair for stage in self.stages for pair in stage.hidden)
        weights = {f"{n}_weight": float(any(getattr(s, f"{n}_weight") for s in self.stages)) for n in ("kl", "label")}
        every = Stage(hidden=pairs, **weights)
        inputs = _few_examples(inputs, self.model.main_input_name, every.needs_logits)
        packed = is_quantised(core)  # on some CPUs bitsandbytes packs anew what evaluates, and it gets no gradient then
        core.train(packed)
        try:
            with preserved_random_state(), naming_batch(self._describe_step()):
                rows, whole = None, None
                if every.needs_logits and not packed:
                    own = {n: v for n, v in inputs.items() if n != LABEL_POSITIONS}
                    own = own if self._student.accepts("labels") else self._questions(own)
                    outputs = core(**self._for_student(own))
                    whole = self._student.logits_in(outputs, has_loss="labels" in own)
                    if mismatch := self._label_loss_mismatch(inputs, outputs):
                        raise ValueError(f"{mismatch} Match hidden states only, with explicit `stages`.")
                if every.needs_logits:
                    rows, _ = counted_rows(self.model, inputs)
                hidden, logits = self._run_student(core, inputs, every, rows)
                if whole is not None and not self._are_equal(
                    logits, whole.flatten(0, -2)[... if rows is None else rows]
                ):
                    raise ValueError(
                        f"The logits of {type(core).__name__} for the rows that count alone are others than those of "
                        "all rows, so its head can't be run for a part. Match hidden states only, with explicit "
                        "`stages`."
                    )
                target_hidden, target_logits = self._run_teacher(inputs, every, rows)
                for student_layer, teacher_layer in every.hidden:
                    target = self.projection_bank.project(student_layer, target_hidden[teacher_layer])
                    losses.hidden_state_mse(hidden[student_layer], target, self._weigh(inputs, target))
                if target_logits is not None and target_logits.shape != logits.shape:
                    raise ValueError(
                        f"The student's logits have shape {tuple(logits.shape)} and the teacher's "
                        f"{tuple(target_logits.shape)} (rows, classes); use two models of one task."
                    )
        finally:
            core.train()

    def _label_loss_mismatch(self, inputs, outputs) -> str | None:
        if not isinstance(outputs, Mapping):
            outputs = dict(zip(("loss", "logits"), outputs, strict=False))
        return label_loss_mismatch(self._student.model, inputs, outputs, self._tolerance)

    def _are_equal(self, logits: Tensor, expected: Tensor) -> bool:
        largest = expected.abs().amax().item() if expected.numel() else 0.0
        tolerance = self._tolerance if expected.device.type == "cpu" else 2**-6  # products there may be rounded (TF32)
        return torch.allclose(logits.float(), expected.float(), rtol=0, atol=10 * tolerance * max(1.0, largest))

    @property
    def _tolerance(self) -> float:
        """The relative error that the precision of the computation allows."""
        half = self.args.bf16 or self.args.fp16 or self.model.dtype.itemsize < 4
        return 2**-6 if half else 1e-4

    def _measure_flops(self, inputs, stage: Stage) -> list[list[float]]:
        """Student's and teacher's operations for each of the units of [`_units`], from one batch."""
        online = isinstance(self.teacher, OnlineTeacher)
        counts = stage.needs_logits or self._asked(stage).needs_logits or online
        rows, _ = counted_rows(self.model, inputs) if counts else (None, None)
        whole, num_rows, per_row = np.array(self._count_flops(inputs, stage, rows)), 0, np.zeros(2)
        if rows is not None and len(rows) > 1:
            num_rows, with_one = len(rows), np.array(self._count_flops(inputs, stage, rows[:1]))
            per_row = (whole - with_one).sum(1) / (num_rows - 1)
        num_inputs, num_squares, _ = self._units(inputs)
        per_input, per_square = (whole[:, 0] - num_rows * per_row) / num_inputs, whole[:, 1] / num_squares
        return [per_input.tolist(), per_square.tolist(), per_row.tolist()]

    def _units(self, inputs) -> tuple[int, float, int]:
        """What a batch's operations grow with: elements of its main input, their square an example, rows of logits."""
        main = inputs[self.model.main_input_name]
        return main.numel(), main.numel() ** 2 / len(main), self._num_rows

    def _count_flops(self, inputs, stage: Stage, rows: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        chunk_size = self._chunk_size(rows)

        def run_teacher(taught: Stage, _):
            asked = self._asked(taught)
            return self._run_teacher(inputs, asked, rows if asked.needs_logits else None, chunk_size)

        return stage_flops(
            lambda *what: self._run_student(self._student.model, inputs, *what, chunk_size),
            run_teacher,
            stage,
            rows,
            self._num_frozen_layers,
            isinstance(self.teacher, OnlineTeacher),
        )

    def floating_point_ops(self, inputs) -> float:
        """Operations of student (forward and backward) and teacher (forward; online also its own training)."""
        if not self._declared_stages:
            return super().floating_point_ops(inputs)
        if not self._computed_loss:
            raise ValueError(
                f"{type(self).__name__}.compute_loss doesn't call CurriculumDistillationTrainer.compute_loss, so that "
                "no stage is trained. Call super().compute_loss(...) and change what it returns, or train without "
                "teacher_model."
            )
        self._computed_loss = False
        asked = self._cache is None or self._cache.asked
        return self._ledger.add_flops(self._stage_index, self._units(inputs), asked)

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
        self._computed_loss = False
        try:
            output = super().train(self._checkpoint, *args, **kwargs)
        finally:
            self._release_models()
            self._cache = None
        return output._replace(training_loss=output.metrics["train_loss"])

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

        def teacher(batch, layers):
            batch = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                hidden, _ = self.teacher.at(None)(self._questions(batch), layers)
            return hidden, self._weigh(batch, hidden[layers[0]])

        with preserved_random_state(self.args.projection_seed):
            if hasattr(data, "__len__"):
                chosen = random.sample(range(len(data)), min(num_samples, len(data)))
                examples = [data[i] for i in chosen]
            else:
                examples = list(itertools.islice(data, num_samples))
            self.projection_bank.fit(teacher, self._checked(self._load(examples, "calibration")), self.teacher.identity)
        for tensor in self.projection_bank.tensors().values():
            broadcast(tensor)

    def _load(self, examples: list, description: str) -> DataLoader:
        collator = self._get_collator_with_removed_columns(self.data_collator, description=description)
        return DataLoader(examples, self.args.train_batch_size, collate_fn=collator)

    def _open_cache(self) -> TeacherCache | None:
        """The cache of `args.teacher_cache`, with a forecast of what it costs and saves, from a sample of the data."""
        args, data = self.args, self.train_dataset
        if args.teacher_cache is None:
            return None
        self._cache = TeacherCache(self.teacher, self.projection_bank, args)
        step = 0 if self._resumed is None else self._resumed["step"]
        if not hasattr(data, "__len__") or step >= self.stage_scheduler.max_steps:
            return self._cache
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
        asked = self._asked(next(stage for stage in self.stages if stage.needs_teacher))
        with naming_batch("the cache's forecast"):
            questions = [[self._ask_about(self._prepare_inputs(batch), asked) for batch in load] for load in loads]
            self._cache.forecast(*questions, asked, len(data), spans, self.is_world_process_zero())
        return self._cache

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

    def _end_step(self, control: TrainerControl) -> None:
        if self.args.restart_schedule_per_stage and self.accelerator.optimizer_step_was_skipped:
            self.lr_scheduler.step()  # an fp16 step that overflowed: the stage goes on, so does its schedule
        if self.state.global_step in self.stage_scheduler.boundaries and self.args.logging_strategy != "no":
            control.should_log = True  # no logged average mixes two stages
        if control.should_save or control.should_evaluate:
            self._finite_terms()
        super()._end_step(control)

    def _end_epoch(self, control: TrainerControl) -> None:
        if self._cache is not None:
            self._cache.log_epoch(self._position["epoch"])
        super()._end_epoch(control)
        if control.should_save or control.should_evaluate:
            self._finite_terms()

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

    def _compare_with_teacher(self, outputs, inputs) -> None:
        if self._comparable is None:
            mismatch = self._label_loss_mismatch(inputs, outputs)
            self._comparable = mismatch is None
            if mismatch:
                logger.warning("%s Evaluations have no accuracy, agreement and divergence.", mismatch)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[1]
        if logits is None or not self._comparable or not ("labels" in inputs or answers_per_frame(self.model)):
            return
        rows, labels = counted_rows(self.model, inputs)
        batch_size, student_logits = len(inputs[self.model.main_input_name]), logits.flatten(0, -2)
        rows = torch.arange(len(student_logits), device=logits.device) if rows is None else rows
        examples = rows // (len(student_logits) // batch_size)
        _, teacher_logits = self._run_teacher(inputs, Stage(kl_weight=1.0), rows) if self.teacher else ({}, None)
        student_logits = student_logits[rows]
        self._comparison.update(self.accelerator, student_logits, teacher_logits, labels, examples, batch_size)

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


def _few_examples(inputs: Mapping[str, Any], main_input: str, labelled: bool, number: int = 2) -> dict[str, Any]:
    """The `number` examples of a batch with the most labels; the batch itself where it cannot be cut."""
    size, tensors = len(inputs[main_input]), [value for value in inputs.values() if isinstance(value, Tensor)]
    if len(tensors) < len(inputs) or any(not tensor.dim() or len(tensor) != size for tensor in tensors):
        return dict(inputs)
    chosen = torch.arange(min(number, size), device=tensors[0].device)
    if labelled and "labels" in inputs:
        chosen = inputs["labels"].ne(-100).view(size, -1).sum(1).topk(len(chosen)).indices
    return {name: value[chosen] for name, value in inputs.items()}
