"""What a training is made of before its first step: stages, projection bank, objective, cache."""

from __future__ import annotations

import functools
import inspect
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_curriculum_distill.batches.batch import Batch, BatchReader
from hf_curriculum_distill.batches.checks import naming_batch
from hf_curriculum_distill.batches.positions import with_label_positions
from hf_curriculum_distill.batches.randomness import preserved_random_state
from hf_curriculum_distill.files import check_writable
from hf_curriculum_distill.layers.adapted import transformers_model
from hf_curriculum_distill.layers.blocks import describe_model
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import head_of
from hf_curriculum_distill.layers.weights import check_one_device
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.objective import Objective
from hf_curriculum_distill.preparing.calibration import (
    DRAWN_EXAMPLES,
    NUM_DRAWS,
    bank_settings,
    checked,
    make_bank,
    measure_layers,
    projected_pairs,
    sample,
)
from hf_curriculum_distill.preparing.checks import (
    check_blocks,
    check_cache,
    check_embedding_basis,
    check_launch,
    check_stages,
    check_training_data,
    warn_of_small_rate,
)
from hf_curriculum_distill.preparing.trial import try_out
from hf_curriculum_distill.progress import progress_bar
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.resuming.record import recorded_groups
from hf_curriculum_distill.resuming.trainer import ResumableTrainer
from hf_curriculum_distill.schedules import (
    restarted_schedule,
    schedule_factor,
    slowed_schedule,
    split_groups_by_layer,
)
from hf_curriculum_distill.stages import LayerPair, matched_pairs, parse_layer_pairs, rising_groups
from hf_curriculum_distill.teachers.cached import CachedTeacher
from hf_curriculum_distill.teachers.comparison import StudentComparison
from hf_curriculum_distill.teachers.loading import TeacherModel, check_head, check_teacher, prepare_teacher
from hf_curriculum_distill.teachers.target_store import TargetStore

logger = get_logger(__name__)


class PreparedTrainer(ResumableTrainer):
    """The part of [`CurriculumDistillationTrainer`] that prepares a training, from its arguments, models and data.

    What depends on arguments is fixed anew at every [`train`]: they may have been changed since the trainer was made.
    """

    def __repr__(self) -> str:
        if not self._declared_stages:
            return super().__repr__()
        student = describe_model(self._student.model, self._student.stack)
        parts = {"student": student, "teacher": self.teacher, "projection_bank": self.projection_bank}
        lines = [f"  {name}: {part}" for name, part in parts.items() if part is not None]
        lines += [f"  stage {number}: {stage}" for number, stage in enumerate(self.stages, start=1)]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    def _prepare(self, teacher_model: TeacherModel | None, projection_bank: ProjectionBank | None) -> None:
        """The end of the constructor: load the teacher, and check that everything fits together."""
        # the loss is already divided by the counts of the whole accumulated batch: Trainer must not divide it again
        self.model_accepts_loss_kwargs = True
        label_names = head_of(self.model).label_names
        if self.args.label_names is None and {*label_names} <= {*self.label_names}:
            # evaluations need these; the forward may have other inputs with "label" in their names
            self.label_names = list(label_names)
        self._given_bank = projection_bank
        self._bank_made_of: tuple | None = None
        self._has_optimizer = self.optimizer is not None or self.lr_scheduler is not None
        # before weights are loaded
        check_launch(self.args, self.compute_loss_func, False, self._has_optimizer, head_of(self.model))
        check_one_device(transformers_model(self.model), "student", self.args.device)
        self._student = PartialForward(self.model, self.args.layer_stack)
        if teacher_model is not None:
            self.teacher = prepare_teacher(teacher_model, self.model, self.args, self.processing_class)
        self._comparison = StudentComparison(self.teacher, self.accelerator, self._logits_are_comparable())
        self._who_teaches = self._describe_teacher()
        self._resolve()
        if self.train_dataset is not None:
            check_training_data(self.train_dataset, self.args)
            self._plan(self._estimate_steps())
            if self.args.measures_order:
                logger.info("Stages: layer_order='complexity' chooses them before the first step")
            else:
                logger.info("Stages: %s", "; ".join(f"{s.name} until {s.until or 'the end'}" for s in self.stages))

    def set_initial_training_values(self, args, dataloader):
        """As `Trainer`, and set up everything that depends on arguments, which may have changed since construction."""
        values = super().set_initial_training_values(args, dataloader)
        if self._declared_stages:
            warn_of_small_rate(self._core, self.args)
            self._resolve()
            self._plan(values[-1])
            if self._resumed is not None:
                self._check_resumed()
            if self.projection_bank is not None and not self.projection_bank.frozen:
                self._calibrate()
            self._prepare_teacher()  # with the bank of a checkpoint, if there is one
            if self._resumed is None and self.args.measures_order:
                self._choose_order()
                self._plan(values[-1])
            self._cached_teacher = self._open_cache()
        return values

    def _resolve(self) -> None:
        """Fix the stages and what they need for the arguments and the student of now.

        Raises:
            ValueError: they do not fit together, or name another teacher than the trainer was made with.
        """
        args = self.args
        args.check()
        check_launch(args, self.compute_loss_func, self._shards_parameters, self._has_optimizer, head_of(self._core))
        if (now := self._describe_teacher()) != self._who_teaches:
            raise ValueError(
                f"The trainer was made with {self._who_teaches}, but the arguments now say {now}: another teacher. "
                "Make a new trainer."
            )
        student = self._core
        if args.attn_implementation is not None:
            student.set_attn_implementation(args.attn_implementation)
        if student is not self._student.model or args.layer_stack != self._student.stack:
            if self.teacher is not None:
                check_teacher(student, self.teacher.model, self.processing_class, compares_logits=args.matches_logits)
            self._student.remove()
            self._student = PartialForward(student, args.layer_stack)
        teacher = self.teacher and self.teacher.partial_forward
        check_blocks(args, self._student, teacher)
        self._declare_stages()
        if self.teacher is not None:
            check_head(self.teacher.model, self._declared_stages if args.pooling is None else ())
        check_cache(self._declared_stages, args, student)
        if args.teacher_cache is not None:
            check_writable(args.teacher_cache, "teacher_cache", "the teacher's targets")
        self.projection_bank = self._make_bank()
        if self._resumed is not None and args.measures_order:
            self._declare_stages(recorded_groups(self._resumed, self._checkpoint))
        # whether any loss needs labels, for instance to know which rows count
        self._reads_labels = args.method == "online" or (
            args.pooling is None and any(stage.needs_logits for stage in self._declared_stages)
        )
        self._reads_labels |= args.hidden_positions == "labels" or args.layer_stack == "decoder"
        self._use_student(self._student)
        self._prepare_teacher()

    def _declare_stages(self, groups: Sequence[tuple[LayerPair, ...]] | None = None) -> None:
        teacher = self.teacher and self.teacher.partial_forward.depth
        self._declared_stages = self.args.resolve_stages(self._student.depth, teacher, groups)
        check_stages(self._declared_stages, self.args, self._student, self.is_deepspeed_enabled)

    def _logits_are_comparable(self) -> bool:
        """Whether evaluations can compare logits; those of two tasks, whose hidden states are matched, they can't."""
        if self.teacher is not None and not self.args.matches_logits:
            try:
                check_teacher(self._core, self.teacher.model, self.processing_class)
            except ValueError:
                return False
        return True

    def _make_bank(self) -> ProjectionBank | None:
        """The given bank, that of an earlier `train()` if nothing it depends on has changed, or a new one."""
        given, pairs = self._given_bank, parse_layer_pairs(matched_pairs(self._declared_stages))
        if self.teacher is not None and (pairs or self.args.pooling is not None):
            teacher = self.teacher.partial_forward
            dims = self._student.hidden_size, teacher.hidden_size
            check_embedding_basis(self._declared_stages, self.args, *dims)
            pairs = projected_pairs(self._declared_stages, self.args, self._student, teacher)
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
        self._student.check_training(self.args.treats_layers_apart)
        before, self._bank_made_of = self._bank_made_of, (pairs, dims, bank_settings(self.args))
        if given is None and before == self._bank_made_of:
            return self.projection_bank
        bank = make_bank(pairs, *dims, self.args) if given is None else given
        bank.check_fits(pairs, *dims, self.teacher.identity["fingerprint"])
        return bank.to(self.args.device)

    def _use_student(self, student: PartialForward) -> None:
        self._student, teacher = student, self.teacher and self.teacher.partial_forward
        self._objective = Objective(student, self.args)
        label_names = self.label_names
        if not self.args.matches_logits:  # scripts give Trainer inputs of blocks as labels, such as masks of patches
            label_names = [n for n in label_names if "label" in n or n in head_of(student.model).label_names]
        self._read = BatchReader(student, teacher, self.args, label_names, self._reads_labels, self._shards_parameters)

    def _prepare_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.prepare(self.projection_bank, self.args.truncate, self.accelerator.autocast)

    @property
    def _core(self) -> PreTrainedModel:
        """The student without wrappers."""
        return transformers_model(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _describe_teacher(self) -> str:
        args = self.args
        kind = {"progressive": f"checkpoints by teacher_schedule={args.teacher_schedule}", "online": "online"}
        kind = kind.get(args.method, "one frozen teacher")
        names = ["teacher_dtype", "attn_implementation", "layer_stack"]
        names += ["teacher_model_init_kwargs"] if args.teacher_model_init_kwargs else []
        return f"{kind}, with {', '.join(f'{name}={getattr(args, name)!r}' for name in names)}"

    def _estimate_steps(self) -> int:
        """The number of optimizer steps, estimated before there is a data loader."""
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
        """As `Trainer`; with `restart_schedule_per_stage`, the schedule begins again with each stage, and with
        `finished_layer_rate` each layer has its own."""
        if not self._declared_stages or self.lr_scheduler is not None or not self._schedules_by_stage:
            return super().create_scheduler(num_training_steps, optimizer)
        args, stages = self.args, self.stage_scheduler
        optimizer = self.optimizer if optimizer is None else optimizer
        name, peak, kwargs = args.lr_scheduler_type, optimizer.defaults["lr"], args.lr_scheduler_kwargs or {}
        if args.restart_schedule_per_stage:
            factor = restarted_schedule(stages, name, peak, args.stage_warmup_ratio, kwargs)
        else:
            warmup = args.get_warmup_steps(num_training_steps)
            factor = schedule_factor(name, num_training_steps, peak, warmup, kwargs)
        if args.finished_layer_rate != 1:
            layers = split_groups_by_layer(optimizer, self._student.layer_of_parameters())
            factor = [slowed_schedule(factor, stages, layer, args.finished_layer_rate) for layer in layers]
        self.lr_scheduler = LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    @property
    def _schedules_by_stage(self) -> bool:
        """Whether learning rates depend on the stage, so that a schedule must take every step of the training."""
        return self.args.restart_schedule_per_stage or self.args.finished_layer_rate != 1

    def _try_out(self, batch: Batch) -> None:
        """Before the first step: whether two examples give every output that a later stage needs."""
        core = self._core
        if self._student.model is not core:  # accelerate has replaced the student
            self._use_student(PartialForward(core, self.args.layer_stack))
        with preserved_random_state(), naming_batch(self._describe_step()):
            try_out(self._objective, self.teacher, self._read, batch, self.stages)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        """As `Trainer`; if every example gets the same number of labels, batches include their positions."""
        collator = super()._get_collator_with_removed_columns(data_collator, description)
        if self._declared_stages and description == "Training" and getattr(data_collator, "fixed_count", False):
            return functools.partial(with_label_positions, collator)
        return collator

    @property
    def _shards_parameters(self) -> bool:
        # processes gather the parameters whenever a module runs, so all must run the head the same number of times
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _release_models(self) -> None:
        self._student.remove()
        if self.teacher is not None:
            self.teacher.partial_forward.remove()

    def _calibrate(self) -> None:
        """Fit the bank on a seeded sample of the training data, which is the same for every process and launch."""
        args, bank = self.args, self.projection_bank
        if not args.standardize_targets and not bank.lacks_matrices:
            bank.freeze()
            return
        number, needs_logits = int(args.calibration_samples), any(stage.needs_logits for stage in self.stages)
        logger.info("Calibrating %d projections on %d examples", len(bank.layer_pairs), number)
        self.teacher.advance(None)
        with preserved_random_state(args.projection_seed):
            loader = self._load(sample(self.train_dataset, number), "calibration")
            loader = progress_bar(loader, "calibration", self.is_world_process_zero() and not args.disable_tqdm)
            batches = checked(loader, self._read, self._prepare_inputs, needs_logits)
            self.teacher.fit(bank, batches, args.standardize_targets)
        for tensor in bank.tensors().values():
            broadcast(tensor)

    def _choose_order(self) -> None:
        """Measure how hard each layer is for the student of now, and declare the stages that follow from it."""
        args, pairs = self.args, matched_pairs(self._declared_stages)
        self.teacher.advance(None)
        start = time.monotonic()
        with preserved_random_state(args.projection_seed):
            examples = sample(self.train_dataset, int(args.calibration_samples))[: NUM_DRAWS * DRAWN_EXAMPLES]
            size = max(1, len(examples) // NUM_DRAWS)  # whatever the batch size, for steps are cut in several ways
            loader = self._load(examples, "calibration", size)
            batches = checked(loader, self._read, self._prepare_inputs, needs_logits=False)
            shares = measure_layers(batches, self.teacher, pairs)
        # devices may differ in the last bits, but the stages of two processes must not
        shares = broadcast(torch.tensor([shares[pair] for pair in pairs], device=args.device))
        measured = dict(zip(pairs, shares.tolist(), strict=True))
        found = ", ".join(f"layer {layer} {min(of):.3f} to {max(of):.3f}" for (layer, _), of in measured.items())
        found = f"the targets' complexity, as a share of random targets', is {found}"
        if not (groups := rising_groups(measured)):
            raise ValueError(
                f"layer_order='complexity' has no layer to begin with, because none is easier for this student than "
                f"random targets ({found}); use another layer_order, or method='one_shot'."
            )
        self._declare_stages(groups)
        names, seconds = " -> ".join(stage.name for stage in self._declared_stages), time.monotonic() - start
        logger.info("Stages: %s; for %s (measured in %.1f s)", names, found, seconds)

    def _open_cache(self) -> CachedTeacher | None:
        """The teacher with the cache of `args.teacher_cache`, which forecasts its costs from a sample of the data."""
        args, data = self.args, self.train_dataset
        if args.teacher_cache is None:
            return None
        cached = CachedTeacher(self.teacher, TargetStore(self.teacher, self.projection_bank, args), self.stages)
        step = 0 if self._resumed is None else self._resumed["step"]
        if not hasattr(data, "__len__") or step >= self.stage_scheduler.max_steps:
            return cached
        loads = []
        for draw in range(2):  # of the same examples: what is random differs between the two
            with preserved_random_state(self._data_seed + draw):
                examples = sample(data, int(args.calibration_samples), random.Random(self._data_seed))
                loads.append(list(self._load(examples, "forecast")))
        spans = [
            (max(0, end - max(begin, step)) * self._num_examples_per_step / len(data), stage)
            for stage, (begin, end) in zip(self.stages, self.stage_scheduler.spans, strict=True)
        ]
        with naming_batch("the cache's forecast"):
            batches = [[self._read(self._prepare_inputs(inputs)) for inputs in load] for load in loads]
            cached.forecast(*batches, len(data), spans, self.is_world_process_zero())
        return cached

    def _load(self, examples: list[Any], description: str, batch_size: int | None = None) -> DataLoader:
        collator = self._get_collator_with_removed_columns(self.data_collator, description=description)
        return DataLoader(examples, batch_size or self.args.train_batch_size, collate_fn=collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.teacher is not None:
            teacher_inputs = inspect.signature(self.teacher.model.forward).parameters
            self._signature_columns += [name for name in teacher_inputs if name not in self._signature_columns]
