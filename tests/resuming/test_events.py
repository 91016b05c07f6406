"""The order of Trainer's events, which resumption is built on, and the library's own callback."""

from types import SimpleNamespace

import pytest
from conftest import TEACHER_DEPTH, tiny_bert
from test_trainer_contract import stock_trainer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.resuming.events import TrainingEvents

# ---- the order of events ----


class Recorder(TrainerCallback):
    """Writes down every event, and what it finds of the trainer's running totals as the training begins."""

    def __init__(self):
        self.events, self.trainer = [], None


for event in (name for name in dir(TrainerCallback) if name.startswith("on_")):

    def record(self, args, state, control, event=event, **kwargs):
        self.events.append(event.removeprefix("on_"))
        if event == "on_train_begin" and self.trainer:
            trainer = self.trainer
            totals = trainer._tr_loss.item(), trainer._total_loss_scalar, trainer._globalstep_last_logged
            self.totals, self.step = totals, state.global_step

    setattr(Recorder, event, record)


STEP = ["step_begin", "pre_optimizer_step", "optimizer_step", "step_end"]
ACCUMULATED = ["step_begin", "substep_end", *STEP[1:]]
EVALUATION = ["prediction_step", "log", "evaluate"]


def test_the_order_of_events_is_the_one_that_resumption_is_built_on(tmp_path):
    """What a step or an epoch asks for is done after its last event; totals are set before the first event."""
    recorder = Recorder()
    each_epoch = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "steps", "logging_steps": 1}
    trainer = stock_trainer(
        tmp_path, [recorder], max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2, **each_epoch
    )
    recorder.trainer, recorder.events = trainer, []
    trainer.train()
    epoch = ["epoch_begin", *ACCUMULATED, "log", *STEP, "log", "epoch_end", *EVALUATION, "save"]
    assert recorder.events == ["train_begin", *epoch, *epoch, "log", "train_end"]
    assert recorder.totals == (0.0, 0.0, 0)

    recorder.events = []
    trainer.train(resume_from_checkpoint=True)  # a finished run: no epoch is left
    assert recorder.events == ["train_begin", "log", "train_end"]
    assert recorder.totals == (0.0, 0.0, recorder.step) and recorder.step == trainer.state.max_steps


def test_what_a_step_asks_for_is_forgotten_only_as_the_next_one_begins(tmp_path):
    found = []

    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_log = control.should_evaluate = True

        def on_evaluate(self, args, state, control, **kwargs):
            control.should_save = True

        def on_step_begin(self, args, state, control, **kwargs):
            found.append(control.should_save)

        def on_epoch_end(self, args, state, control, **kwargs):
            found.append((control.should_log, control.should_evaluate))
            control.should_save = True

        def on_save(self, args, state, control, **kwargs):
            found.append(state.global_step)

    stock_trainer(tmp_path, [Ask()], max_steps=2, logging_strategy="no").train()
    assert found == [False, 1, False, 2, (False, False), 2]


# ---- the library's own callback ----


class Stateful(TrainerCallback, ExportableState):
    """A user's callback, which checkpoints hold and give back."""

    def state(self):
        return {"args": {}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_the_own_callback_is_the_last_one_while_training_lasts_and_in_no_checkpoint(config, examples, resume):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"}
    args = config(**fields, restore_callback_states_from_checkpoint=True)
    orders = []

    def make():
        trainer = CurriculumDistillationTrainer(
            tiny_bert(2, seed=1), args, train_dataset=examples, callbacks=[Stateful()],
            teacher_model=tiny_bert(TEACHER_DEPTH, width=24, seed=2),
        )  # fmt: skip

        class Later(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                orders.append([type(callback) for callback in trainer.callback_handler.callbacks])

        trainer.add_callback(Later())
        return trainer

    trainer = make()
    trainer.train()
    if resume:
        trainer = make()
        trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    assert len(orders) == (6 if resume else 4)
    assert all(order.count(TrainingEvents) == 1 and order[-1] is TrainingEvents for order in orders)
    assert not any(isinstance(callback, TrainingEvents) for callback in trainer.callback_handler.callbacks)
    assert trainer.state.stateful_callbacks.keys() == {"Stateful", "TrainerControl"}


def test_without_a_teacher_there_is_no_callback_but_those_of_trainer(config, examples):
    seen = SimpleNamespace(callbacks=None)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.callbacks = {type(callback) for callback in trainer.callback_handler.callbacks}

    trainer = CurriculumDistillationTrainer(
        tiny_bert(1), config(max_steps=1), train_dataset=examples, callbacks=[Watch]
    )
    trainer.train()
    assert TrainingEvents not in seen.callbacks and Watch in seen.callbacks
