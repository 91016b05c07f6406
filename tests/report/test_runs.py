"""How the runs of a comparison are trained, and what each leaves in `results.json`."""

import dataclasses
import glob
import json
import logging
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_weights, tiny_bert, weights
from transformers import TrainerCallback, set_seed

from hf_curriculum_distill import CurriculumDistillationTrainer, ProjectionBank
from hf_curriculum_distill.cli import main
from hf_curriculum_distill.options import ComparisonOptions
from hf_curriculum_distill.report.launch import Run, planned_or_exit
from hf_curriculum_distill.report.runs import (
    LABELS_ALONE,
    compare_methods,
    keep_teacher,
    start_embeddings,
    summarize,
    teacher_arguments,
    train_all,
    train_student,
)
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.tasks.parity import ParityMLPConfig, ParityMLPForSequenceClassification, SparseParity, stack
from hf_curriculum_distill.tasks.pcfg import pcfg_tokenizer


@dataclasses.dataclass
class Options(ComparisonOptions):
    seeds: list[int] | None = None
    student: str = "bert-2-16"


# ---- one run ----

KEYS = ["method", "seed", "path", "eval_loss", "eval_accuracy", "eval_agreement", "eval_kl", "samples", "steps"]
KEYS += ["student_flops", "teacher_flops", "seconds", "finite"]


def mlp(width, seed):
    set_seed(seed)
    return ParityMLPForSequenceClassification(ParityMLPConfig(input_size=10, hidden_size=width))


@pytest.fixture
def make(config):
    def make(folder="run", teacher=True, callbacks=(), **fields):
        defaults = {"optim": "sgd", "learning_rate": 0.1, "remove_unused_columns": False, "seed": 4}
        return CurriculumDistillationTrainer(
            mlp(8, 1),
            config(folder, **defaults | fields),
            train_dataset=SparseParity(400, 10, [0, 3], seed=1),
            eval_dataset=SparseParity(32, 10, [0, 3], seed=2),
            data_collator=stack,
            teacher_model=mlp(32, 2) if teacher else None,
            callbacks=list(callbacks),
        )

    return make


@pytest.mark.parametrize("method", ["curriculum", "one_shot", "online", "labels"])
def test_a_finished_run_is_its_metrics_and_its_cost(make, method):
    trainer = make(method=method, gradient_accumulation_steps=2)
    result = train_student(trainer, "some name")
    assert list(result) == KEYS
    assert json.loads(json.dumps(result)) == result
    assert (result["method"], result["seed"], result["path"]) == ("some name", 4, trainer.args.output_dir)
    assert (result["steps"], result["samples"], result["finite"]) == (8, 64, True)
    metrics = trainer.evaluate()
    assert all(result[name] == metrics[name] for name in KEYS[3:7])
    last = [log for log in trainer.state.log_history if "student_flops" in log][-1]
    assert last["step"] == 8
    assert (result["student_flops"], result["teacher_flops"]) == (last["student_flops"], last["teacher_flops"])
    assert result["seconds"] > 0
    assert {"model.safetensors", "config.json", "curriculum.json", "trainer_state.json"} <= set(
        os.listdir(result["path"])
    )
    saved = ParityMLPForSequenceClassification.from_pretrained(result["path"])
    assert_same_weights(weights(saved), weights(trainer.model))


@pytest.mark.parametrize(
    "fields",
    [
        {"logging_steps": 1},
        {"logging_steps": 100},
        {"logging_steps": 100, "eval_strategy": "steps", "eval_steps": 2},
        {"logging_steps": 1, "max_steps": 1},  # every loss was finite, and the last step broke the weights
    ],
    ids=["found by a log", "found at the end", "found by an evaluation", "found by the last evaluation"],
)
def test_a_run_that_is_not_finite_is_said_to_be_and_has_no_metrics(make, fields):
    trainer = make(method="one_shot", learning_rate=1e30, max_grad_norm=0.0, **fields)
    result = train_student(trainer, "one_shot")
    assert list(result) == ["method", "seed", "path", "finite", "error"]
    assert result["finite"] is False
    assert "is nan" in result["error"] or "is inf" in result["error"]
    assert not os.path.exists(os.path.join(trainer.args.output_dir, "model.safetensors"))


class Counted(TrainerCallback):
    """The steps that a run trained."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.fixture
def train(make):
    """Train in a folder; returns the result, the weights and the steps that were trained."""

    def train(folder, resume=None):
        counted = Counted()
        saved = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
        trainer = make(folder, callbacks=[counted], resume_from_checkpoint=resume, **saved)
        result = train_student(trainer, "curriculum")
        same = ("eval_loss", "eval_kl", "steps", "samples", "student_flops", "teacher_flops", "finite")
        return {name: result[name] for name in same}, weights(trainer.model), counted.steps

    return train


def test_a_run_resumes_from_a_folder_or_its_own_last_checkpoint_or_starts(config, train):
    result, expected, _ = train("whole")
    folder = config("whole").output_dir
    shutil.copytree(folder, config("stopped").output_dir, ignore=lambda *_: ["checkpoint-6", "checkpoint-8"])
    for name, resume, steps in (
        ("fresh", "last", range(8)),
        ("plain", None, range(8)),
        ("stopped", "last", range(3, 8)),
        ("elsewhere", os.path.join(folder, "checkpoint-6"), range(6, 8)),
    ):
        actual = train(name, resume)
        assert actual[2] == list(steps), name
        assert actual[0] == result, name
        assert_same_weights(actual[1], expected)


def test_a_finished_run_that_is_resumed_trains_no_more(train):
    result, expected, _ = train("whole")
    actual = train("whole", "last")
    assert actual[2] == []
    assert actual[0] == result
    assert_same_weights(actual[1], expected)


# ---- several launches ----


def launch(make, args, methods, **options):
    """What a recipe does; returns the table."""

    def distil(run, _):
        fields = {n: getattr(run.args, n) for n in ("method", "seed", "learning_rate", "resume_from_checkpoint")}
        trainer = make(run.args.output_dir, eval_strategy="steps", eval_steps=4, max_grad_norm=0.0, **fields)
        return train_student(trainer, run.method)

    return compare_methods(Options(methods, **options), args, lambda *_: None, distil, logging.getLogger("launch"))


def lines_of(table):
    """Method and number of runs of each line of a table."""
    lines = table[table.index("method ") :].split("\n\n")[0].splitlines()[2:]
    return [tuple(re.split(r"\s{2,}", line)[:2]) for line in lines]


def test_a_folder_of_several_launches_is_compared_whole(make, config, capsys):
    args = config("all")
    launch(make, args, ["curriculum", "one_shot"], seeds=[1])
    with open(os.path.join(args.output_dir, "results.json")) as file:
        first = json.load(file)
    args.resume_from_checkpoint = "last"
    variants = {"last layer": {"layer_order": "last"}, "broken": {"method": "labels", "learning_rate": 1e30}}
    table = launch(make, args, ["one_shot", *variants], seeds=[2, 3], variants=variants)
    with open(os.path.join(args.output_dir, "results.json")) as file:
        results = json.load(file)
    assert results[:2] == first and [(result["method"], result["seed"]) for result in results[2:]] == [
        (method, seed) for method in ("one_shot", *variants) for seed in (2, 3)
    ]
    summary = summarize({"method": "(teacher)", "eval_accuracy": 0.9}, args, "title").splitlines()
    assert [line.split("  ")[0] for line in summary[2:-2]] == ["(teacher)", *(result["method"] for result in results)]
    wanted = [("curriculum", "1"), ("one_shot", "3"), ("last layer", "2"), ("broken", "0 of 2 finite")]
    assert lines_of(table) == wanted
    with open(os.path.join(args.output_dir, "comparison.svg")) as file:
        drawn = re.findall(r"<!-- (.*?) -->", file.read())
    assert {"curriculum", "one-shot (3 runs)", "last layer (2 runs)"} <= {*drawn} and "broken (2 runs)" not in drawn
    main(["compare", args.output_dir])
    assert lines_of(capsys.readouterr().out) == wanted
    with open(os.path.join(args.output_dir, "comparison.html")) as file:
        page = file.read()
    assert all(result["path"] in page for result in results)


@pytest.fixture
def results_of(config):
    """What `results.json` says of the runs in `all`."""

    def read():
        with open(os.path.join(config("all").output_dir, "results.json")) as file:
            return json.load(file)

    return read


def test_a_launch_that_writes_over_runs_leaves_nothing_of_theirs_to_resume(make, config, results_of):
    args = config("all")
    saved = {"save_strategy": "steps", "save_steps": 4}

    def distil(run):
        return train_student(make(run.args.output_dir, method=run.args.method, **saved), run.method)

    train_all(planned_or_exit(Options(["curriculum", "one_shot", "labels"]), args), distil, args)
    kept = results_of()[2]
    options = Options(["curriculum", "one_shot"], overwrite_output_dir=True)
    runs = planned_or_exit(options, args)

    def killed(run):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(runs, killed, args)
    assert results_of() == [kept]
    left = glob.glob(f"{args.output_dir}/*/seed-*/checkpoint-*")
    assert left and {os.path.dirname(checkpoint) for checkpoint in left} == {kept["path"]}


def test_a_launch_that_resumes_leaves_finished_runs_as_they_are(make, config, results_of):
    args = config("all", save_strategy="no")
    launch(make, args, ["curriculum", "one_shot"])
    first, trained = results_of(), []
    args.resume_from_checkpoint = "last"
    runs = planned_or_exit(Options(["one_shot", "labels", "curriculum"]), args)

    def distil(run):
        trained.append(run.method)
        assert results_of()[:1] == first[:1]  # until its turn comes
        return train_student(make(run.args.output_dir, method=run.args.method), run.method)

    results = train_all(runs, distil, args)
    assert trained == ["labels"] and [results[0], results[2]] == [first[1], first[0]] and results_of() == results


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(make, config):
    saved = {"save_strategy": "steps", "save_steps": 4}
    whole = train_student(make("whole", **saved), "curriculum")
    again = make("whole", resume_from_checkpoint="last", **saved)
    assert again.train_seconds == 0
    result = train_student(again, "curriculum")
    assert result["seconds"] == again.train_seconds > whole["seconds"] / 2


def test_a_teacher_is_kept_whole_with_its_configuration_last(config, tmp_path, monkeypatch):
    trainer = CurriculumDistillationTrainer(tiny_bert(1), config("training", **LABELS_ALONE))
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (moved.append(os.path.basename(paths[1])), replace(*paths)))
    folder = str(tmp_path / "teacher")
    keep_teacher(trainer, folder)
    moved = [name for name in moved if os.path.isfile(os.path.join(folder, name))]
    assert {*moved} == {*os.listdir(folder)} > {"model.safetensors", "config.json"} and moved[-1] == "config.json"
    assert not os.path.exists(os.path.join(trainer.args.output_dir, "model"))
    assert_same_weights(weights(type(trainer.model).from_pretrained(folder)), weights(trainer.model))


def test_embeddings_start_as_those_of_a_teacher_whose_vocabulary_is_padded(config):
    student, teacher = tiny_bert(1, seed=1), tiny_bert(1, width=24, vocab_size=56)
    run = Run("some name", SimpleNamespace(student_embeddings="projected"), config(projection_seed=3))
    with pytest.raises(ValueError, match="vocabulary has 50 entries and the teacher's 56"):
        start_embeddings(student, teacher, run, None)
    assert start_embeddings(student, teacher, run, pcfg_tokenizer()) is student
    matrix = ProjectionBank.create([(1, 1)], [16], [24], seed=3, shared=True).tensors()["layer_1_1.weight"]
    ours, theirs = (model.get_input_embeddings().weight for model in (student, teacher))
    torch.testing.assert_close(ours, theirs[:50] @ matrix.T)


@pytest.mark.parametrize(
    "fields", [{"teacher_entropy_threshold": 0.5, "label_loss_weight": 1.0}, {"teacher_cache": "cache"}], ids=str
)
def test_a_teacher_learns_from_labels_alone_whatever_its_students_do(config, tmp_path, examples, fields):
    args = config(max_steps=1, teacher_learning_rate=1e-3, **fields)
    for own in (dataclasses.replace(args, **LABELS_ALONE), teacher_arguments(args, str(tmp_path / "teacher"), 1, 4, 1)):
        trainer = CurriculumDistillationTrainer(tiny_bert(1), own, train_dataset=examples, eval_dataset=examples[:4])
        trainer.train()
        assert trainer.stages == [Stage(label_weight=1.0)]
