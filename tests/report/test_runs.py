"""Which runs a comparison consists of, and what each leaves in `results.json`."""

import dataclasses
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

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer, ProjectionBank
from hf_curriculum_distill.cli import main
from hf_curriculum_distill.options import ComparisonOptions
from hf_curriculum_distill.report.results import write_results
from hf_curriculum_distill.report.runs import (
    LABELS_ALONE,
    Run,
    compare_methods,
    keep_teacher,
    plan_runs,
    planned_or_exit,
    start_embeddings,
    summarize,
    teacher_arguments,
    train_student,
)
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.tasks.parity import ParityMLPConfig, ParityMLPForSequenceClassification, SparseParity, stack
from hf_curriculum_distill.tasks.pcfg import pcfg_tokenizer

# ---- the plan ----


@dataclasses.dataclass
class Options(ComparisonOptions):
    seeds: list[int] | None = None
    student: str = "bert-2-16"


def test_every_method_has_a_run_for_each_seed_in_a_folder_of_its_own(config):
    args = config("all", learning_rate=0.25, max_steps=100)
    variants = {"last layer": {"layer_order": "last", "max_steps": 50}, "one_shot": {"temperature": 2.0}}
    runs = plan_runs(Options(["curriculum", "last layer", "one_shot"], variants, seeds=[3, 5]), args)
    assert [(run.method, run.args.seed, os.path.relpath(run.args.output_dir, args.output_dir)) for run in runs] == [
        (method, seed, os.path.join(folder, f"seed-{seed}"))
        for method, folder in (("curriculum", "curriculum"), ("last layer", "last_layer"), ("one_shot", "one_shot"))
        for seed in (3, 5)
    ]
    chosen = {
        (run.method, run.args.method, run.args.layer_order, run.args.max_steps, run.args.temperature) for run in runs
    }
    assert chosen == {
        ("curriculum", "curriculum", "sequential", 100, 1.0),
        ("last layer", "curriculum", "last", 50, 1.0),
        ("one_shot", "one_shot", "sequential", 100, 2.0),
    }


def test_a_run_has_the_shared_arguments_but_for_what_its_variant_changes(config):
    args = config("all", lr_scheduler_type="cosine", warmup_steps=3, logging_steps=0.1, eval_steps=5, seed=9)
    before = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    [_, run] = plan_runs(Options(["labels", "slow"], {"slow": {"learning_rate": 1e-5, "method": "online"}}), args)
    run = run.args
    differing = {n for n, value in before.items() if getattr(run, n) != value and n not in ("distributed_state",)}
    assert differing - {"logging_dir", "deepspeed_plugin"} == {"method", "learning_rate", "output_dir"}
    assert (run.method, run.learning_rate, run.seed) == ("online", 1e-5, 9)
    assert {name: getattr(args, name) for name in before} == before


def test_a_variant_sets_options_of_the_recipe_too(config):
    options = Options(["one_shot", "wide"], {"wide": {"student": "bert-2-32", "max_steps": 3}})
    narrow, wide = plan_runs(options, config(max_steps=5))
    assert [(run.recipe.student, run.args.max_steps) for run in (narrow, wide)] == [("bert-2-16", 5), ("bert-2-32", 3)]
    assert options.student == "bert-2-16"


def test_a_single_run_is_the_output_folder_itself(config):
    args = config("here")
    [run] = plan_runs(Options(["one_shot"]), args)
    assert run.args.output_dir == args.output_dir
    assert plan_runs(Options([]), args) == []


def test_a_single_run_joins_a_comparison_that_is_there(config):
    args = config("here")
    [alone] = plan_runs(Options(["one_shot"]), args)
    write_results(args.output_dir, [{"method": "one_shot", "path": args.output_dir, "finite": False, "error": "NaN"}])
    assert plan_runs(Options(["one_shot"]), args) == [alone]
    other = {"method": "labels", "path": os.path.join(args.output_dir, "labels", "seed-0"), "finite": False}
    write_results(args.output_dir, [other | {"error": "NaN"}])
    [joined] = plan_runs(Options(["one_shot"]), args)
    assert joined.args.output_dir == os.path.join(args.output_dir, "one_shot", f"seed-{args.seed}")


def test_a_method_without_a_lasting_teacher_is_compared_with_others_that_read_a_cache(config):
    methods = ["curriculum", "one_shot", "progressive", "online", "labels", "more labels"]
    options = Options(methods, {"more labels": {"method": "labels", "max_steps": 9}})
    runs = plan_runs(options, config(teacher_cache="cache"))
    assert [run.args.teacher_cache for run in runs] == ["cache", "cache", None, None, None, None]


def test_a_variant_without_changes_is_its_method_and_a_name_twice_is_one_run(config):
    runs = plan_runs(
        Options(["labels", "labels", "online"], {"labels": {}, "online": None, "unused": {"max_steps": 1}}), config()
    )
    assert [(run.method, run.args.method) for run in runs] == [("labels", "labels"), ("online", "online")]


@pytest.mark.parametrize(
    "methods, variants, message",
    [
        (
            ["two_shot"],
            {},
            r"methods names 'two_shot'; use curriculum, one_shot, progressive, online, labels, hidden, or desc",
        ),
        (["lst"], {"last": {}}, r"methods names 'lst'; use last, curriculum"),
        (["a"], {"a": {"learning_rat": 1.0}}, r"variants.a sets 'learning_rat', .* did you mean learning_rate\?"),
        (["labels"], {"a": {"hiden_weight": 1.0}}, r"variants.a sets 'hiden_weight', .* did you mean hidden_weight\?"),
        (["labels"], {"a": {"studnt": 1.0}}, r"variants.a sets 'studnt', .* did you mean student\?"),
        (["a"], {"a": {"seed": 1}}, r"variants.a sets 'seed', which is no option of a run"),
        (["a"], {"a": {"methods": ["b"]}}, r"variants.a sets 'methods', which is no option of a run"),
        (["a b", "a_b"], {"a b": {}, "a_b": {}}, "methods are a b, a_b; two of these would share a folder"),
        (["a"], {"a": {"qqqqq": 1.0}}, r"variants.a sets 'qqqqq', which is no option of a run\."),
        (["a"], {"a": {"method": "curiculum"}}, r"method is 'curiculum'; use one of 'curriculum'"),
        (["a"], {"a": {"temperature": -1.0}}, r"temperature is -1.0"),
        (["a"], '{"a": ', r"variants is '{\"a\": ', which is no valid JSON"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(config, methods, variants, message):
    with pytest.raises(ValueError, match=message):
        plan_runs(Options(methods, variants), config())


def test_several_students_are_not_pushed_to_one_repository(config):
    args = config(push_to_hub=True)
    assert len(plan_runs(Options(["one_shot"]), args)) == 1
    with pytest.raises(ValueError, match="push_to_hub pushes one student, but methods and seeds ask for 2"):
        plan_runs(Options(["one_shot"], seeds=[1, 2]), args)


@pytest.mark.parametrize("field", ["seed", "output_dir"])
def test_a_variant_cannot_set_what_the_plan_sets(config, field):
    with pytest.raises((ValueError, TypeError), match=field):
        plan_runs(Options(["a"], {"a": {field: 3}}), config())


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


def test_a_subclass_of_the_configuration_stays_one(tmp_path):
    @dataclasses.dataclass
    class Own(CurriculumDistillationConfig):
        extra: int = 3

    args = Own(str(tmp_path), use_cpu=True, report_to="none")
    [run] = plan_runs(Options(["a"], {"a": {"extra": 5}}), args)
    run = run.args
    assert type(run) is Own and run.extra == 5 and args.extra == 3
    assert torch.device("cpu") == run.device


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


# ---- before the data are read ----


@pytest.mark.parametrize("left", ["results.json", "one_shot/seed-0/config.json"])
def test_a_finished_run_is_written_over_only_if_the_user_says_so(config, left):
    args = config("all")
    options = Options(["one_shot"], seeds=[0, 1])
    assert len(planned_or_exit(options, args)) == 2
    assert not os.listdir(args.output_dir) if os.path.exists(args.output_dir) else True
    path = os.path.join(args.output_dir, left)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "x") as file:
        file.write("[]")
    with pytest.raises(SystemExit, match=f"{left} is what a finished run left; name another --output_dir") as exit:
        planned_or_exit(options, args)
    assert len(exit.value.code.splitlines()) == 1
    for told in (
        (dataclasses.replace(options, overwrite_output_dir=True), args),
        (options, dataclasses.replace(args, resume_from_checkpoint="last")),
    ):
        assert len(planned_or_exit(*told)) == 2


def test_damaged_results_of_an_earlier_launch_are_not_written_over(config):
    args = config("all")
    os.makedirs(args.output_dir)
    with open(os.path.join(args.output_dir, "results.json"), "x") as file:
        file.write('[{"method"')
    with pytest.raises(SystemExit, match=r"results\.json is damaged: Expecting"):
        planned_or_exit(Options(["one_shot"], overwrite_output_dir=True), args)


def test_a_folder_that_cannot_be_written_is_refused_and_none_is_made(config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"output_dir .*file cannot be written"):
        planned_or_exit(Options(["one_shot"]), dataclasses.replace(config(), output_dir=str(tmp_path / "file/run")))
    planned_or_exit(Options(["one_shot"]), dataclasses.replace(config(), output_dir=str(tmp_path / "new/run")))
    assert not (tmp_path / "new").exists()


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
