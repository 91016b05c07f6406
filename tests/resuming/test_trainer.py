"""A run that is killed and resumed, however often and wherever, is the run that was never interrupted, to the bit."""

import copy
import json
import os
import random
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, build
from conftest import VOCAB_SIZE, assert_same_weights, in_fork, start_fork, tiny_bert, wait_for_fork, weights
from safetensors.torch import load_file, save_file
from test_families import examples, labelled
from transformers import Trainer, TrainerCallback, TrainerState

from hf_curriculum_distill import (
    CURRICULUM_EXTRACTION,
    CurriculumDistillationConfig,
    CurriculumDistillationTrainer,
    ProjectionBank,
)

STEPS, SAVED = 12, {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
LAYERS = {"stages": [{"hidden": [[1, 2]], "until": 4}, {"hidden": [[2, 4]], "until": 8}, {"kl_weight": 1.0}]}
# LAYERS, its last stage with a hidden term that is annealed; and segments apart
ANNEALED = [*LAYERS["stages"][:2], {"hidden": [[2, 4]], "kl_weight": 1.0, "hidden_weight_at_end": 0.0}]
SEGMENTS = [{"hidden": [[1, 2], [2, 4]], "until": 4}, {"hidden": [[2, 4]], "until": 8}, {"kl_weight": 1.0}]
NEW_STATE = {"carry_optimizer": False, "freeze_embeddings_in_layer_stages": True}
BETWEEN_STAGES = {
    "annealed, slowed": {"stages": ANNEALED, "finished_layer_rate": 0.3, "restart_schedule_per_stage": True},
    "independent": {"stages": SEGMENTS, "train_prefix": "independent", "finished_layer_rate": 0.3},
}
# chosen at the start, and again it would be for another student
BETWEEN_STAGES["measured"] = {"layer_order": "complexity", "layer_stage_fraction": 2 / 3, "calibration_samples": 4}
BETWEEN_STAGES = {name: NEW_STATE | fields for name, fields in BETWEEN_STAGES.items()}
METHODS = {
    "curriculum": LAYERS,
    "one_shot": {"method": "one_shot"},
    "progressive": {"method": "progressive", "teacher_schedule": [5]},
    "online": {"method": "online", "label_loss_weight": 0.5},
}


def tokens(index):
    return torch.randint(5, VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(index))


class Augmented(torch.utils.data.Dataset):
    """Examples that are different each time they are read."""

    def __len__(self):
        return 36

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return {"input_ids": tokens(index).roll(random.randrange(12)).roll(np.random.randint(12))}


def rolled(example):
    return {"input_ids": np.roll(example["input_ids"], np.random.randint(12)).tolist()}


def stream():
    """Fewer examples than the training has steps for: it begins again, in another order."""
    data = datasets.Dataset.from_list([{"input_ids": tokens(index).tolist()} for index in range(24)])
    return data.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=8).map(rolled).with_format("torch")


def mask(examples):
    """A collator that masks at random, as those of masked language models do."""
    ids = torch.stack([torch.as_tensor(example["input_ids"]) for example in examples])
    chosen = torch.rand(ids.shape) < 0.3
    chosen[:, 0] = True
    return {"input_ids": torch.where(chosen, 4, ids), "labels": torch.where(chosen, ids, -100)}


EACH_EPOCH = {"logging_strategy": "epoch", "eval_strategy": "epoch"}
DATA = {
    "plain": (Augmented, {"logging_steps": 5}),
    "accumulated": (Augmented, {"logging_steps": 3, "gradient_accumulation_steps": 2}),
    "workers": (Augmented, {"logging_steps": 5, "dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
    "grouped": (Augmented, {"logging_steps": 5, "train_sampling_strategy": "group_by_length"}),
    "stream": (stream, {"logging_steps": 5}),
    "epochs": (Augmented, {"max_steps": -1, "num_train_epochs": 2, "save_steps": 3} | EACH_EPOCH),
    "stream saved each epoch": (
        stream,
        {"gradient_accumulation_steps": 4, "save_strategy": "epoch"} | EACH_EPOCH,
    ),
    "stream with a worker that stays": (
        stream,
        {"logging_steps": 5, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ),
    "stream with a worker": (stream, {"logging_steps": 5, "dataloader_num_workers": 1}),
}


# ---- a run that can be killed ----


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(TrainerCallback):
    """Kills its process at an event of a step."""

    def __init__(self, event, step):
        def at(args, state, control, **kwargs):
            if state.global_step == step:
                die()

        setattr(self, f"on_{event}", at)


class Drawing(TrainerCallback):
    """Draws random numbers while training, of a kind that NumPy makes two at a time."""

    def on_step_end(self, args, state, control, **kwargs):
        self.drawn = random.random(), np.random.randn(), torch.rand(()).item()

    def on_log(self, args, state, control, **kwargs):
        if state.log_history[-1].keys() & {"loss", "eval_loss"}:
            state.log_history[-1]["drawn"] = list(self.drawn)


def killed_while_saving(part, step):
    """Make this process die before a part of a checkpoint is written, or in the middle of a file."""

    def before(owner, name):
        original = getattr(owner, name)

        def method(self, *args, **kwargs):
            state = self if isinstance(self, TrainerState) else self.state
            if state.global_step == step:
                die()
            return original(self, *args, **kwargs)

        setattr(owner, name, method)

    def cut(owner, name, file):
        original = getattr(owner, name)

        def method(self, folder, *args, **kwargs):
            original(self, folder, *args, **kwargs)
            state = self if isinstance(self, TrainerState) else self.state
            path = os.path.join(folder, file) if file else folder
            if state.global_step == step and os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        setattr(owner, name, method)

    if part == "half the model":
        cut(CurriculumDistillationTrainer, "save_model", "model.safetensors")
    elif part == "half the optimizer":
        cut(Trainer, "_save_optimizer_and_scheduler", "optimizer.pt")
    elif part == "half the state":
        cut(TrainerState, "save_to_json", "")
    elif part == "calibration":
        ProjectionBank.fit = lambda *args: die()
    else:
        owners = {"save_to_json": TrainerState}
        before(owners.get(part, Trainer), part)


CALLBACK_EVENTS = (
    "step_begin",
    "substep_end",
    "optimizer_step",
    "step_end",
    "log",
    "evaluate",
    "save",
    "epoch_end",
    "train_end",
)


def train(folder, method, data, event=None, step=None):
    make_data, fields = DATA[data]
    teachers = [tiny_bert(4, width=24, seed=seed, initializer_range=0.3) for seed in (2, 3)]
    if method == "progressive":
        checkpoints = [str(folder.parent / f"teacher_{number}") for number in range(2)]
        for teacher, path in zip(teachers, checkpoints, strict=True):
            teacher.save_pretrained(path)
        teachers = [checkpoints]
    args = CurriculumDistillationConfig(
        str(folder), per_device_train_batch_size=4, learning_rate=1e-3, weight_decay=0.1,
        eval_steps=4, report_to="none", disable_tqdm=True, use_cpu=True,
        lr_scheduler_type="cosine",
        **CURRICULUM_EXTRACTION | {"max_steps": STEPS, "eval_strategy": "steps"} | SAVED
        | (METHODS | BETWEEN_STAGES)[method] | fields,
    )  # fmt: skip
    callbacks = [Killer(event, step)] if event in CALLBACK_EVENTS else []
    if event and not callbacks:
        killed_while_saving(event, step)
    trainer = CurriculumDistillationTrainer(
        tiny_bert(2, dropout=0.1, seed=1), args, data_collator=mask, train_dataset=make_data(),
        eval_dataset=Augmented(), teacher_model=teachers[0],
        callbacks=[Drawing(), *callbacks],
    )  # fmt: skip
    result = trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    trainer.save_state()
    assert result.training_loss == trainer.state.log_history[-1]["train_loss"]
    if method == "online":
        trainer.teacher.model.save_pretrained(folder / "teacher")


def outcome(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    timed = ("runtime", "per_second")
    logs = [{n: v for n, v in log.items() if not n.endswith(timed)} for log in state["log_history"]]
    names = ("model.safetensors", "projection_bank.safetensors", "teacher/model.safetensors")
    tensors = {
        f"{file} {name}": t
        for file in names
        if (folder / file).exists()
        for name, t in load_file(folder / file).items()
    }
    return tensors, logs, state["global_step"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run without interruption ends in, once a method and kind of data."""
    outcomes = {}

    def get(method, data):
        if (method, data) not in outcomes:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            assert in_fork(train, folder, method, data) == 0
            outcomes[method, data] = outcome(folder)
        return outcomes[method, data]

    return get


def assert_same_outcome(folder, expected):
    tensors, logs, step = outcome(folder)
    assert step == expected[2]
    assert logs == expected[1]
    assert_same_weights(tensors, expected[0])


# ---- the truth ----

# In every stage, at both stage boundaries (4, 8) and in every part of a checkpoint.
CHAIN = [
    ("calibration", 0),
    ("step_begin", 1),
    ("_save_optimizer_and_scheduler", 2),
    ("optimizer_step", 2),
    ("half the model", 4),
    ("log", 4),
    ("step_begin", 4),
    ("_save_rng_state", 6),
    ("step_end", 7),
    ("save_to_json", 8),
    ("evaluate", 8),
    ("half the state", 8),
    ("save", 8),
    ("half the optimizer", 10),
    ("step_end", 11),
    ("step_end", 12),
    ("save", 12),
]
SHORT = [("step_begin", 1), ("_save_rng_state", 4), ("step_begin", 5), ("half the model", 8), ("step_end", 11)]


@pytest.mark.parametrize(
    "method, data",
    [(method, data) for method in METHODS for data in ("plain", "accumulated", "workers", "stream")]
    + [
        ("curriculum", "grouped"),
        ("curriculum", "stream with a worker"),
        ("curriculum", "stream with a worker that stays"),
    ],
)
def test_a_run_killed_again_and_again_is_one_that_was_never_interrupted(tmp_path, uninterrupted, method, data):
    folder = tmp_path / "run"
    for event, step in CHAIN if data == "plain" else SHORT:
        if event == "calibration" and method != "curriculum":
            continue
        assert in_fork(train, folder, method, data, event, step) == -signal.SIGKILL, (event, step)
    assert in_fork(train, folder, method, data) == 0
    assert_same_outcome(folder, uninterrupted(method, data))


@pytest.mark.parametrize("knobs", BETWEEN_STAGES)
def test_what_changes_between_stages_is_the_same_after_a_kill_on_either_side(tmp_path, uninterrupted, knobs):
    folder = tmp_path / "run"
    sides = [("optimizer_step", 3), ("half the model", 4), ("save", 4), ("optimizer_step", 4), ("step_end", 5)]
    for event, step in [*sides, ("save_to_json", 8), ("step_begin", 8), ("step_end", 9), ("save", 10)]:
        assert in_fork(train, folder, knobs, "plain", event, step) == -signal.SIGKILL, (event, step)
    assert in_fork(train, folder, knobs, "plain") == 0
    assert_same_outcome(folder, uninterrupted(knobs, "plain"))


@pytest.mark.parametrize(
    "data, kills",
    [
        (
            "epochs",
            [("evaluate", 9), ("save_to_json", 9), ("save", 9), ("epoch_end", 18), ("save", 18), ("train_end", 18)],
        ),
        (
            "stream saved each epoch",
            [("evaluate", 1), ("save", 1), ("step_end", 3), ("half the model", 4), ("save", 12)],
        ),
    ],
)
def test_the_end_of_an_epoch_is_logged_evaluated_and_saved_once(tmp_path, uninterrupted, data, kills):
    for event, step in kills:
        assert in_fork(train, tmp_path / "run", "curriculum", data, event, step) == -signal.SIGKILL, (event, step)
    assert in_fork(train, tmp_path / "run", "curriculum", data) == 0
    assert_same_outcome(tmp_path / "run", uninterrupted("curriculum", data))


@pytest.mark.parametrize("data", ["plain", "stream", "epochs"])
def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path, uninterrupted, data):
    for _ in range(2):
        assert in_fork(train, tmp_path / "run", "curriculum", data) == 0
    tensors, logs, step = outcome(tmp_path / "run")
    expected = uninterrupted("curriculum", data)
    assert step == expected[2]
    assert (
        logs[: len(expected[1])] == expected[1] and logs[-1] == expected[1][-1]
    )  # Trainer says once more how it ended
    assert_same_weights(tensors, expected[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_at_random_moments_is_one_that_was_never_interrupted(tmp_path, uninterrupted, method):
    begin = time.monotonic()
    assert in_fork(train, tmp_path / "timed", method, "plain") == 0
    seconds = time.monotonic() - begin
    moments, kills = random.Random(method), 0
    while True:
        child = start_fork(train, tmp_path / "run", method, "plain")
        time.sleep(seconds * moments.uniform(0, 1.1) if kills < 10 else 0)
        if kills < 10:
            os.kill(child, signal.SIGKILL)
        status = wait_for_fork(child)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        kills += 1
    assert_same_outcome(tmp_path / "run", uninterrupted(method, "plain"))


# ---- every family, whatever names transformers saves its weights under ----


@pytest.fixture
def train_family(config):
    """Train a model of a family, from a checkpoint or from the start; returns its trainer."""

    def train_family(name, checkpoint=None, folder="run", callbacks=(), **fields):
        student, _, batch = build(name, seed=1)
        stages = [{"hidden": [[1, 2]], "until": 1}, {"kl_weight": 1.0}]
        saved = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
        args = config(folder, **{"stages": stages, "logging_strategy": "no"} | saved | fields)
        data = labelled(student, examples(batch, 8))
        trainer = CurriculumDistillationTrainer(
            student, args, train_dataset=data, eval_dataset=data, teacher_model=build(name, seed=2)[0],
            callbacks=list(callbacks),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    return train_family


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_is_resumed_to_the_bit(train_family, name):
    expected = train_family(name)
    checkpoint = os.path.join(expected.args.output_dir, "checkpoint-1")
    resumed = train_family(name, checkpoint, "resumed", save_strategy="no")
    assert_same_weights(weights(resumed.model), weights(expected.model))


class AfterEachStep(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights(model)


BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_steps": 6,
    "learning_rate": 1e-2,
}


@pytest.mark.parametrize("name", ["bert", "vit", "mixtral", "nomic-bert", "gpt-neox"])
def test_the_best_model_is_the_one_of_its_step(train_family, name):
    watch = AfterEachStep()
    metric = {"metric_for_best_model": "eval_kl", "greater_is_better": True}  # the worst, which is not the last
    trainer = train_family(name, callbacks=[watch], **BEST, **metric)
    best = trainer.state.best_global_step
    assert 1 < best < 6
    assert_same_weights(weights(trainer.model), watch.weights[best])
    assert trainer.evaluate()["eval_kl"] == trainer.state.best_metric


def lose_a_weight(checkpoint):
    path = os.path.join(checkpoint, "model.safetensors")
    tensors = load_file(path)
    del tensors["classifier.bias"]
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_weight_that_a_checkpoint_cannot_give_back_is_an_error_that_names_it(train_family):
    checkpoint = os.path.join(train_family("vit").args.output_dir, "checkpoint-1")
    lose_a_weight(checkpoint)
    path = Path(checkpoint, "curriculum.json")
    record = json.loads(path.read_text())
    record["files"]["model.safetensors"] = os.path.getsize(os.path.join(checkpoint, "model.safetensors"))
    path.write_text(json.dumps(record))
    with pytest.raises(OSError, match=r"checkpoint-1 cannot be resumed from: .*no value for classifier\.bias"):
        train_family("vit", checkpoint, "resumed")


def test_so_is_one_of_the_best_model(train_family):
    class DamageBeforeLoading(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                lose_a_weight(state.best_model_checkpoint)

    with pytest.raises(OSError, match=r"cannot be loaded as the best model: .*no value for classifier\.bias"):
        train_family("vit", callbacks=[DamageBeforeLoading()], **BEST)


def test_progress_of_the_wrong_shape_is_refused_before_the_first_step(train_family):
    checkpoint = os.path.join(train_family("bert").args.output_dir, "checkpoint-1")
    path = Path(checkpoint, "curriculum.json")
    record = json.loads(path.read_text())
    for change in ({"flop_rates": {"first": []}}, {"unlogged": record["unlogged"] | {"terms": ["kl", "more"]}}):
        path.write_text(json.dumps(record | change))
        with pytest.raises(OSError, match="checkpoint-1 cannot be resumed from: ValueError"):
            train_family("bert", checkpoint, "resumed")


@pytest.mark.parametrize("strategy", ["steps", "no"])
@pytest.mark.parametrize("step", [2, 3, None])
def test_train_loss_is_the_mean_loss_of_the_last_stage(config, student, teacher, examples, strategy, step):
    stages = [{"hidden": [[1, 2]], "until": 2}, {"kl_weight": 1.0}]
    args = config(
        max_steps=5, stages=stages, logging_steps=2, logging_strategy=strategy, save_strategy="steps", save_steps=1
    )
    losses = []

    class Watched(CurriculumDistillationTrainer):
        def training_step(self, *inputs, **others):
            losses.append(super().training_step(*inputs, **others))
            return losses[-1]

    def made():
        return Watched(copy.deepcopy(student), args, train_dataset=examples, teacher_model=teacher)

    output = made().train()
    expected = float(torch.stack(losses[2:]).mean())
    assert output.training_loss == pytest.approx(expected)
    if step is not None:
        checkpoint = os.path.join(args.output_dir, f"checkpoint-{step}")
        assert made().train(resume_from_checkpoint=checkpoint).training_loss == output.training_loss
