"""Training that can be killed at any moment: once resumed, it ends, to the bit, as if it had never been killed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from torch.utils.data import IterableDataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_curriculum_distill.batches.randomness import RandomStream
from hf_curriculum_distill.batches.seeding import SeededBatches, SeededSampler
from hf_curriculum_distill.files import check_writable
from hf_curriculum_distill.layers.adapted import transformers_model
from hf_curriculum_distill.layers.weights import load_weights, weights_fingerprint
from hf_curriculum_distill.logs import get_logger
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.resuming.checkpoints import find_last_checkpoint, list_files, read_whole, remove_unfinished
from hf_curriculum_distill.resuming.events import TrainingEvents
from hf_curriculum_distill.resuming.record import check_resumable, describe_data, make_record, resumed_at, write_record
from hf_curriculum_distill.resuming.totals import RunningTotals
from hf_curriculum_distill.stages import Stage, StageScheduler
from hf_curriculum_distill.teachers.teacher import Teacher

logger = get_logger(__name__)


class ResumableTrainer(Trainer):
    """The part of [`CurriculumDistillationTrainer`] that saves the whole state of a run and resumes from it.

    Without stages it is `Trainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._declared_stages: tuple[Stage, ...] = ()
        self.stage_scheduler: StageScheduler | None = None
        self.teacher: Teacher | None = None
        self.projection_bank: ProjectionBank | None = None
        self._stage_index: int | None = None
        self._totals = RunningTotals()
        self._base_fingerprint: str | None = None  # of the weights that checkpoints leave out
        self._checkpoint: str | None = None  # that this run resumes from
        self._resumed: dict[str, Any] | None = None  # its record
        self._loading = RandomStream()
        self._position = {"epoch": 0, "batches": 0}
        self._save_waits = False  # for the end of the epoch
        self._total_loss_scalar = 0.0
        super().__init__(*args, **kwargs)

    # ---- where the run is ----

    @property
    def stages(self) -> list[Stage]:
        return list(self.stage_scheduler.stages if self.stage_scheduler else self._declared_stages)

    @property
    def stage(self) -> Stage | None:
        return self.stage_scheduler.stage_at(self.state.global_step) if self.stage_scheduler else None

    @property
    def _last_stage_index(self) -> int:
        """The stage of the last completed optimizer step, to which logs and evaluations belong."""
        return self.stage_scheduler.index_at(self.state.global_step - 1)

    def _describe_step(self) -> str:
        index = self.stage_scheduler.index_at(self.state.global_step)
        stage = f"stage {index + 1} of {len(self.stages)}, {self.stages[index].name}"
        return f"step {self.state.global_step + 1} ({stage})"

    @property
    def _num_examples_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, *args: Any, **kwargs: Any):
        """As `Trainer`, but what a batch draws at random depends on the batch alone: see [`SeededBatches`]."""
        if not self._declared_stages:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, *args, **kwargs)
        if isinstance(dataset, IterableDataset):
            # a persistent worker goes on drawing from epoch to epoch, and no checkpoint knows how far it has come
            persistent, self.args.dataloader_persistent_workers = self.args.dataloader_persistent_workers, False
            try:
                return super()._get_dataloader(dataset, description, batch_size, sampler_fn, *args, **kwargs)
            finally:
                self.args.dataloader_persistent_workers = persistent
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description=description)
        batches = SeededBatches(dataset, self._data_seed)

        def seeded_sampler(_) -> Sampler | None:
            sampler = sampler_fn(dataset)
            # Trainer looks for this class, whose order is seeded already
            keeps_its_class = sampler is None or isinstance(sampler, BatchRebalanceSampler)
            return sampler if keeps_its_class else SeededSampler(sampler, batches, self._data_seed)

        return super()._get_dataloader(batches, description, batch_size, sampler_fn and seeded_sampler, *args, **kwargs)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def train(self, *args: Any, **kwargs: Any):
        """As `Trainer`."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.remove_callback(TrainingEvents)
            self._totals.stop_clock()

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        """As `Trainer`, which calls it again where `auto_find_batch_size` starts the training again."""
        epoch, batches = super()._init_training_state(*args)
        if not self._declared_stages:
            return epoch, batches
        self._totals, self._stage_index, self._save_waits = RunningTotals(), None, False
        self.remove_callback(TrainingEvents)
        self.add_callback(TrainingEvents(self))  # the last one, even after callbacks that a checkpoint restores
        if self.teacher is not None:
            decayed = self.get_decay_parameter_names(self.teacher.model)
            self.teacher.start(self.args, self.stage_scheduler.max_steps, decayed)
        if self._resumed is not None:
            *_, checkpoint, trial = args
            if self.teacher is not None:
                self.teacher.load(checkpoint, self._resumed["step"])
            best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            best = os.path.join(self._get_output_dir(trial), best)
            if os.path.isdir(best):  # the run's folder may have been moved
                self.state.best_model_checkpoint = best
            if not hasattr(self.train_dataset, "__len__") and not self.args.ignore_data_skip:
                # a stream may have ended and begun again since the run's first step, which Trainer cannot know
                epoch, batches = resumed_at(self._resumed, self.args.gradient_accumulation_steps, checkpoint)
        self._position = {"epoch": epoch, "batches": batches}
        if self._resumed is not None and self.state.global_step >= self.state.max_steps:
            return self.state.num_train_epochs, 0  # the run is finished: Trainer might take a step more
        return epoch, batches

    def _evaluate(self, *args: Any, skip_scheduler: bool = False, **kwargs: Any) -> dict[str, float]:
        """As `Trainer`, but `eval_on_start` is for the start of the run, not of its resumption."""
        if skip_scheduler and self._resumed is not None:
            return {}
        return super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)

    def _begin_training(self) -> None:
        """Start the clock; after a resume, go on with the averages that the next log will write."""
        self._totals.start_clock()
        if self._resumed is not None:
            with self._reading(self._checkpoint):
                self._tr_loss += self._totals.restore(self._resumed, self.accelerator)
            self._total_loss_scalar = self._resumed["unlogged"]["total_loss"]
            self._globalstep_last_logged = self._resumed["unlogged"]["first_step"]

    def _begin_epoch(self) -> int:
        """Start the random draws of loading anew; returns the epoch's number, from 0."""
        self._loading.restart(self._data_seed, self._position["epoch"])
        return self._position["epoch"]

    def _end_step(self, control: TrainerControl) -> None:
        """Let a checkpoint that is due at an epoch's last step wait, so that it holds what the epoch's end logs, too.

        Args:
            control: what is due after this step, to be changed in place.
        """
        ends_epoch = control.should_training_stop or control.should_epoch_stop
        ends_epoch = ends_epoch or self.accelerator.gradient_state.end_of_dataloader
        self._save_waits = control.should_save and ends_epoch
        control.should_save = control.should_save and not ends_epoch

    def _end_epoch(self, control: TrainerControl) -> None:
        """Go on to the next epoch, unless the training ends here.

        Args:
            control: what is due after this epoch, to be changed in place.
        """
        control.should_save |= self._save_waits
        self._save_waits = False
        if not control.should_training_stop:
            self._position = {"epoch": self._position["epoch"] + 1, "batches": 0}

    # ---- what it logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`, with the stage, its loss terms and the operations so far next to the training loss.

        `train_loss`, at the end, is the mean loss of the last stage's steps: that of a hidden loss and a divergence
        would say nothing.
        """
        if self._declared_stages and self.is_in_train and ("loss" in logs or "train_loss" in logs):
            terms, flops = self._finite_terms(), self._totals.reduce_flops(self.accelerator)
            logs |= flops
            index = self._last_stage_index
            if "train_loss" in logs:
                first, _ = self.stage_scheduler.span(index)
                logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step - first)
            if "loss" in logs:
                logs |= {"stage": index, "stage_name": self.stages[index].name} | terms
                self._totals.start(self.state.global_step)
        super().log(logs, start_time)

    def _forget_losses(self) -> None:
        """Begin the mean of `train_loss` anew, at the first step of a stage."""
        self._total_loss_scalar = 0.0
        self._tr_loss.zero_()  # is so already, unless nothing is logged while training

    def _finite_terms(self) -> dict[str, float]:
        terms = self._totals.terms(self.accelerator, self.state.global_step)
        if not self.args.average_tokens_across_devices:  # each process divides by its own counts
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

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`, with `projection_bank.safetensors` and `curriculum.json` beside the plain student."""
        self._save_beside(output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)

    def _save_beside(self, folder: str) -> None:
        """Write what is saved beside the student into a folder."""
        if self._declared_stages and self.stage_scheduler and self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            write_record(folder, self._record())
            if self.projection_bank is not None:
                self.projection_bank.save_pretrained(folder)

    def _save_checkpoint(self, model, trial) -> None:
        """As `Trainer`. If it fails, the checkpoint before stays, and what was written is not resumed from.

        Raises:
            OSError: the disk is full or broken; names the last complete checkpoint.
        """
        if self._declared_stages:
            self._totals.collect(self.accelerator, self._tr_loss)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not self._declared_stages:
                raise
            last = find_last_checkpoint(self._get_output_dir(trial))
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {self.args.output_dir} "
                f"({error}); the last whole one is {last}. Make room, or check the disk, and resume from there."
            ) from error
        if self.teacher is not None and self.args.should_save:
            self.teacher.remove_old_files(self._get_output_dir(trial=trial))

    def _save_rng_state(self, output_dir: str) -> None:
        """As `Trainer`. Once the random state is on disk, record every file and its size: that marks the checkpoint
        as complete; Trainer writes its own state after it."""
        if self._declared_stages:
            with self._loading:
                pass  # a change of streams forgets a number of NumPy's, and the state that is saved must be without it
        super()._save_rng_state(output_dir)
        if not self._declared_stages:
            return
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with suppress(FileNotFoundError):  # left by an earlier run, it would make this checkpoint look complete
                os.remove(os.path.join(output_dir, TRAINER_STATE_NAME))
            beside = [] if self.teacher is None else self.teacher.save(output_dir)
            write_record(output_dir, self._record() | {"files": list_files(output_dir, *beside)})

    def _record(self) -> dict[str, Any]:
        return make_record(
            self.args,
            self.stage_scheduler,
            self.teacher,
            self.projection_bank,
            data=describe_data(self.args, self.train_dataset, self._data_seed),
            step=self.state.global_step,
            **self._position,
            unlogged=self._totals.unlogged | {"total_loss": self._total_loss_scalar},
            samples_per_step=self._num_examples_per_step,
            **self._totals.total_flops,
            train_seconds=self._totals.seconds,
            flop_rates=self._totals.rates,
            base_model=self._base_fingerprint,
        )

    # ---- resumption ----

    def _start_from(self, resume_from_checkpoint: str | os.PathLike | bool | None) -> str | bool | None:
        """Find the checkpoint to resume from and read its record, before any time is spent.

        Args:
            resume_from_checkpoint: as for [`train`].

        Returns:
            The folder of a complete checkpoint; None or False to start from the beginning.

        Raises:
            OSError: `output_dir` cannot be written, or the checkpoint lacks files.
            ValueError: the checkpoint is not complete.
        """
        self._resumed = None
        if transformers_model(self.model) is not self.model:  # its checkpoints hold the adapters alone
            trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            self._base_fingerprint = weights_fingerprint(self.model, leave_out=trained)
        if self.args.should_save:
            check_writable(self.args.output_dir, "output_dir", "checkpoints")
        if isinstance(resume_from_checkpoint, os.PathLike):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning("%s has no whole checkpoint; training starts from the beginning", self.args.output_dir)
        if isinstance(resume_from_checkpoint, str):
            self._resumed = read_whole(resume_from_checkpoint)
        return resume_from_checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As `Trainer`, which would skip a weight that the file has under another name than the model."""
        with self._reading(resume_from_checkpoint):
            if (student := self._plain_student) is not None:
                load_weights(student, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As `Trainer`; for weights, see [`_load_from_checkpoint`]."""
        with self._reading(self.state.best_model_checkpoint, "loaded as the best model", "load"):
            if (student := self._plain_student) is not None:
                load_weights(student, self.state.best_model_checkpoint)
            else:
                super()._load_best_model()

    @property
    def _plain_student(self) -> PreTrainedModel | None:
        """The student, if `save_pretrained` writes all of it: not for FSDP, DeepSpeed, or adapters."""
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        plain = isinstance(student, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        return student if self._declared_stages and plain else None

    def _load_optimizer_and_scheduler(self, checkpoint):
        with self._reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with self._reading(checkpoint):
            super()._load_rng_state(checkpoint)

    @contextmanager
    def _reading(self, checkpoint: str | None, what="resumed from", then="resume from") -> Iterator[None]:
        """Say of any error inside the block, as an `OSError`, that the checkpoint cannot be read."""
        try:
            yield
        except Exception as error:
            if not self._declared_stages or isinstance(error, torch.OutOfMemoryError):
                raise
            raise OSError(
                f"{checkpoint} cannot be {what}: {error!r}. Its files are damaged, or those of another model; "
                f"{then} another checkpoint."
            ) from error

    def _check_resumed(self) -> None:
        """Check that this run is the one that wrote the checkpoint, and take over the checkpoint's bank.

        Raises:
            ValueError: the run's settings, data or bank are not those that the checkpoint was written with.
        """
        checkpoint, record = self._checkpoint, self._resumed
        check_resumable(record, self._record(), checkpoint, same_data=not self.args.ignore_data_skip)
        if self.args.should_save:
            remove_unfinished(self.args.output_dir, record["step"])
        if self.projection_bank is not None:
            bank = ProjectionBank.from_pretrained(checkpoint).to(self.args.device)
            if bank.fingerprint != record["projection_bank"]:
                raise ValueError(
                    f"{checkpoint} has projection bank {bank.fingerprint[:12]}, but was written with "
                    f"{record['projection_bank'][:12]}; restore the file, or resume from another checkpoint."
                )
            if self.projection_bank.frozen and self.projection_bank.fingerprint != bank.fingerprint:
                raise ValueError(
                    f"{checkpoint} was written with projection bank {bank.fingerprint[:12]}, but projection_bank is "
                    f"{self.projection_bank.fingerprint[:12]}; pass the original bank, or none to use that one."
                )
            self.projection_bank = bank
