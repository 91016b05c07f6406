"""A teacher's checkpoints teach in turn: which one at each step, what evaluations compare with, what is refused."""

import copy
import os
import shutil

import pytest
import torch
from conftest import TEACHER_DEPTH, assert_same_weights, masked_lm_examples, tiny_bert, weights
from torch.utils.data import default_collate
from transformers import BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.teachers.checkpoints import find_checkpoints

STEPS = (3, 9, 10)  # sorted as names, checkpoint-10 would come first


def step_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def untimed(log_history):
    timed = ("runtime", "per_second", "train_loss")
    return [{name: value for name, value in log.items() if not name.endswith(timed)} for log in log_history]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """The output folder of a teacher's training with the stock Trainer."""
    folder = tmp_path_factory.mktemp("teacher")
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS[-1],
        learning_rate=0.02,
        per_device_train_batch_size=8,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    teacher = tiny_bert(TEACHER_DEPTH, width=24, seed=2, initializer_range=0.3)
    Trainer(teacher, args, train_dataset=masked_lm_examples(64)).train()
    for step in set(range(1, STEPS[-1] + 1)) - set(STEPS):
        shutil.rmtree(folder / f"checkpoint-{step}")
    # what else may lie around in such a folder
    (folder / "runs").mkdir()
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-7").write_text("not a folder")
    return folder


@pytest.fixture(scope="module")
def checkpoints(training):
    return [str(training / f"checkpoint-{step}") for step in STEPS]


@pytest.fixture(scope="module")
def teachers(checkpoints):
    return [BertForMaskedLM.from_pretrained(checkpoint).eval() for checkpoint in checkpoints]


@pytest.fixture
def make(config, training, examples):
    """A trainer whose student learns from the checkpoints: `make(teacher_schedule=[4])`."""

    def make(teacher=training, student=None, **fields):
        fields = {"method": "progressive", "max_steps": 12, "train_sampling_strategy": "sequential"} | fields
        return CurriculumDistillationTrainer(
            tiny_bert(2, seed=1) if student is None else student,
            config(**fields),
            train_dataset=examples,
            eval_dataset=examples[:8],
            teacher_model=teacher,
        )

    return make


def slow_kl(student, teacher, examples):
    """Mean KL(teacher || student) over the tokens with a label, one by one in float64."""
    batch = default_collate(examples)
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch).logits.double().softmax(-1) for model in (student, teacher))
    divergences = [
        (theirs[b, i] * (theirs[b, i] / ours[b, i]).log()).sum().item()
        for b, labels in enumerate(batch["labels"].tolist())
        for i, label in enumerate(labels)
        if label != -100
    ]
    return sum(divergences) / len(divergences)


class Witness(TrainerCallback):
    """Keeps the student as it was before each step, and the teacher's weights after it."""

    def __init__(self, trainer):
        self.trainer, self.students, self.teachers = trainer, [], []
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.students.append(weights(model))

    def on_step_end(self, args, state, control, **kwargs):
        self.teachers.append(weights(self.trainer.teacher.model))


# ---- which one teaches ----


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, [0] * 3 + [1] * 6 + [2] * 3),
        ({"eval_strategy": "steps", "eval_steps": 2}, [0] * 3 + [1] * 6 + [2] * 3),  # evaluations compare with the last
        ({"max_steps": 5}, [0] * 3 + [1] * 2),
        ({"teacher_schedule": "fraction"}, [0] * 4 + [1] * 7 + [2]),  # 12/10 of 3 and of 9
        ({"teacher_schedule": [2, 5]}, [0] * 2 + [1] * 3 + [2] * 7),
        ({"teacher_schedule": [0.25, 7]}, [0] * 3 + [1] * 4 + [2] * 5),
        ({"teacher": (1, 2), "teacher_schedule": [0.5]}, [1] * 6 + [2] * 6),
        ({"teacher": (2, 0), "teacher_schedule": [4]}, [2] * 4 + [0] * 8),
        ({"teacher": (0, 2)}, [0] * 3 + [2] * 9),
    ],
    ids=str,
)
def test_the_schedule_says_which_checkpoint_teaches_each_step(make, checkpoints, teachers, examples, fields, expected):
    if "teacher" in fields:
        fields = fields | {"teacher": [checkpoints[index] for index in fields["teacher"]]}
    trainer = make(**fields)
    witness = Witness(trainer)
    trainer.train()

    student = tiny_bert(2, seed=1)
    assert len(step_logs(trainer)) == len(expected)
    for step, log in enumerate(step_logs(trainer)):
        student.load_state_dict(witness.students[step])
        batch = [examples[(4 * step + i) % len(examples)] for i in range(4)]
        divergences = [slow_kl(student, teacher, batch) for teacher in teachers]
        fits = [index for index, kl in enumerate(divergences) if log["kl"] == pytest.approx(kl, rel=1e-4)]
        assert fits == [expected[step]], (step, log["kl"], divergences)
        assert log["loss"] == pytest.approx(log["kl"], rel=1e-6)
        if "eval_steps" not in fields:
            assert_same_weights(witness.teachers[step], weights(teachers[expected[step]]))


def test_fractions_of_epochs_are_resolved_to_steps(make, checkpoints, teachers):
    trainer = make(checkpoints[:2], teacher_schedule=[0.25], max_steps=-1, num_train_epochs=0.5)
    witness = Witness(trainer)
    trainer.train()
    first = weights(teachers[0])
    assert [all(torch.equal(one[n], t) for n, t in first.items()) for one in witness.teachers] == [True] * 2 + [
        False
    ] * 6


def test_a_trainers_folder_is_its_checkpoints_by_number(training, checkpoints):
    assert find_checkpoints(str(training)) == checkpoints
    assert find_checkpoints(checkpoints[1]) == [checkpoints[1]]
    assert find_checkpoints("some/repository") == ["some/repository"]


def test_evaluations_compare_with_the_last_checkpoint_whoever_teaches(make, teachers, examples):
    trainer = make(learning_rate=0.0, eval_strategy="steps", eval_steps=2)
    before = trainer.evaluate()
    trainer.train()
    untrained = tiny_bert(2, seed=1)
    expected = slow_kl(untrained, teachers[-1], examples[:8])
    assert slow_kl(untrained, teachers[0], examples[:8]) != pytest.approx(expected, rel=1e-2)
    evaluations = [before, *(log for log in trainer.state.log_history if "eval_kl" in log), trainer.evaluate()]
    assert len(evaluations) == 8
    for evaluation in evaluations:
        assert evaluation["eval_kl"] == pytest.approx(expected, rel=1e-4)
        assert evaluation["eval_agreement"] == before["eval_agreement"]


def test_the_checkpoints_never_learn(make, checkpoints, teachers):
    trainer = make(learning_rate=0.1, weight_decay=0.5)
    witness = Witness(trainer)
    trainer.train()
    held = [weights(teacher) for teacher in teachers]
    for tensors in witness.teachers:
        assert any(all(torch.equal(tensors[name], tensor) for name, tensor in one.items()) for one in held)
    teacher = trainer.teacher.model
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in trainer.model.parameters()}
    for checkpoint, tensors in zip(checkpoints, held, strict=True):
        assert_same_weights(weights(BertForMaskedLM.from_pretrained(checkpoint)), tensors)


def test_the_checkpoints_have_the_given_dtype(make):
    trainer = make(teacher_dtype="bfloat16")
    witness = Witness(trainer)
    trainer.train()
    assert {tensor.dtype for tensors in witness.teachers for tensor in tensors.values()} == {torch.bfloat16}
    name = "bert.encoder.layer.0.output.dense.weight"
    assert len({tensors[name].float().sum().item() for tensors in witness.teachers}) == 3


# ---- 7 ----


def test_one_checkpoint_is_one_shot_to_the_bit(make, checkpoints, teachers, tmp_path):
    shutil.copytree(checkpoints[2], tmp_path / "training" / "checkpoint-10")
    fields = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}
    expected = make(checkpoints[2], method="one_shot", **fields)
    expected.train()
    for given, schedule in (
        (copy.deepcopy(teachers[2]), "step"),
        (checkpoints[2], "fraction"),
        ([checkpoints[2]], []),
        (tmp_path / "training", "step"),
    ):
        actual = make(given, teacher_schedule=schedule, **fields)
        actual.train()
        assert_same_weights(weights(actual.model), weights(expected.model))
        assert untimed(actual.state.log_history) == untimed(expected.state.log_history)


# ---- resume ----

SAVED = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "weight_decay": 0.1}


def test_a_resumed_run_is_one_that_was_never_interrupted(make):
    def run(resume_from=None):
        trainer = make(student=tiny_bert(2, dropout=0.1, seed=1), teacher_schedule=[2, 4], max_steps=6, **SAVED)
        trainer.train(resume_from_checkpoint=resume_from)
        return weights(trainer.model), untimed(trainer.state.log_history), trainer.args.output_dir

    expected = run()
    for step in (5, 4, 3, 2):
        actual = run(os.path.join(expected[2], f"checkpoint-{step}"))
        assert_same_weights(actual[0], expected[0])
        assert actual[1] == expected[1], step


def test_resuming_with_another_schedule_or_other_checkpoints_says_so(make, checkpoints, training, tmp_path):
    first = make(save_strategy="steps", save_steps=4, max_steps=11)
    first.train()
    interrupted = os.path.join(first.args.output_dir, "checkpoint-8")
    for schedule, shown in (("fraction", "'fraction'"), ([4, 5], r"\[4, 5\]")):
        with pytest.raises(ValueError, match=rf"settings\.teacher_schedule changed from 'step' to {shown}"):
            make(teacher_schedule=schedule, max_steps=11).train(resume_from_checkpoint=interrupted)
    for others in ((0, 2), (0, 1, 1), (1, 0, 2)):  # fewer, another last, another order
        folders = [tmp_path / str(others) / f"checkpoint-{step}" for step in STEPS[: len(others)]]
        for folder, index in zip(folders, others, strict=True):
            shutil.copytree(checkpoints[index], folder)
        with pytest.raises(ValueError, match=r"teacher\.fingerprint changed from '\w+' to '\w+'"):
            make(folders, max_steps=11).train(resume_from_checkpoint=interrupted)
    moved = shutil.copytree(training, tmp_path / "moved")
    make(moved, max_steps=11).train(resume_from_checkpoint=interrupted)  # the same weights elsewhere


# ---- refused ----


def test_a_folder_without_checkpoints_is_refused_with_what_is_there(make, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"empty has no checkpoint-STEP folders .* only: nothing; pass the output_dir"):
        make(folder)
    for name in ("runs", "checkpoint-best", "notes"):
        (folder / name).mkdir()
    with pytest.raises(ValueError, match="only: checkpoint-best, notes, runs; pass the output_dir"):
        make(folder)


@pytest.mark.parametrize("method", ["curriculum", "one_shot", "online", "labels"])
def test_a_list_of_checkpoints_needs_the_method(make, checkpoints, method):
    with pytest.raises(ValueError, match=rf"list of 3 checkpoints, but method is '{method}'; one teacher is needed"):
        make(checkpoints, method=method)


@pytest.mark.parametrize("teacher", [[], [3], {"a": 1}, torch.nn.Linear(1, 1)], ids=str)
def test_what_is_no_teacher_is_refused(make, teacher):
    with pytest.raises(ValueError, match=rf"teacher_model is a {type(teacher).__name__}; pass a PreTrainedModel"):
        make(teacher)


@pytest.mark.parametrize("schedule", [[4], [2, 4, 6], []], ids=str)
def test_a_schedule_of_another_length_is_refused(make, schedule):
    with pytest.raises(ValueError, match=rf"teacher_schedule has {len(schedule)} ends for 3 checkpoints; give one end"):
        make(teacher_schedule=schedule)


@pytest.mark.parametrize(
    "schedule, steps",
    [
        ([5, 5], "5, 5"),
        ([7, 3], "7, 3"),
        ([0.5, 0.25], "6, 3"),
        ([6, 0.5], "6, 6"),
        ([4, 12], "4, 12"),
        ([4, 100], "4, 100"),
        ([0.01, 4], "0, 4"),
    ],
    ids=str,
)
def test_ends_that_do_not_increase_towards_max_steps_are_refused(make, schedule, steps):
    with pytest.raises(
        ValueError, match=rf"teacher_schedule is .* \(steps \[{steps}\] of 12\); each checkpoint must stop"
    ):
        make(teacher_schedule=schedule)


@pytest.mark.parametrize("schedule", ["step", "fraction"])
def test_names_without_steps_need_a_list_of_ends(make, checkpoints, tmp_path, schedule):
    named = [shutil.copytree(checkpoints[index], tmp_path / name) for index, name in enumerate(("early", "late"))]
    for unusable in (named, checkpoints[::-1], [checkpoints[0], checkpoints[0]], [checkpoints[0], named[1]]):
        with pytest.raises(
            ValueError, match=rf"teacher_schedule='{schedule}' needs folders named checkpoint-STEP in inc"
        ):
            make(unusable, teacher_schedule=schedule)
    assert make(named, teacher_schedule=[0.5]).teacher.name == ", ".join(map(str, named))


def test_checkpoints_of_different_sizes_are_refused(make, checkpoints, tmp_path):
    tiny_bert(TEACHER_DEPTH, width=16, seed=2).save_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 and .*checkpoint-3 .*sizes"):
        make([tmp_path / "checkpoint-2", checkpoints[0]])
    tiny_bert(TEACHER_DEPTH - 1, width=24, seed=2).save_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 and .*checkpoint-3 .*sizes"):
        make([tmp_path / "checkpoint-2", checkpoints[0]])


def test_a_missing_checkpoint_is_an_oserror(make, checkpoints, tmp_path):
    with pytest.raises(OSError, match="checkpoint-99"):
        make([*checkpoints[:2], tmp_path / "checkpoint-99"])
