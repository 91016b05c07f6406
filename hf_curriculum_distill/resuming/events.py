"""Where a training is, told by the events of [`~transformers.TrainerCallback`]."""

from __future__ import annotations

from transformers import Trainer, TrainerCallback

from hf_curriculum_distill.batches.seeding import seed_batches
from hf_curriculum_distill.progress import name_stage_in_table


class TrainingEvents(TrainerCallback):
    """Tells a [`ResumableTrainer`] where its training is.

    It is the last of the callbacks: the others have said by then what they want logged, evaluated and saved, and
    whether training goes on.

    Args:
        trainer: the [`ResumableTrainer`] whose training it is.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin_training()

    def on_epoch_begin(self, args, state, control, *, train_dataloader, **kwargs):
        seed_batches(train_dataloader, self._trainer._begin_epoch())

    def on_step_end(self, args, state, control, **kwargs):
        self._trainer._end_step(control)

    def on_log(self, args, state, control, **kwargs):
        if args.eval_strategy == "no":  # otherwise evaluations make the lines of a notebook's table
            self._name_stage_in_table()

    def on_evaluate(self, args, state, control, **kwargs):
        self._name_stage_in_table()

    def _name_stage_in_table(self) -> None:
        trainer = self._trainer
        name_stage_in_table(trainer.callback_handler.callbacks, trainer.stages[trainer._last_stage_index].name)

    def on_epoch_end(self, args, state, control, *, train_dataloader, **kwargs):
        seed_batches(train_dataloader, None)
        self._trainer._end_epoch(control)
