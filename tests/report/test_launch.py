"""Which runs a launch consists of, where each is written, and what is not written over."""

import dataclasses
import os

import pytest
import torch

from hf_curriculum_distill import CurriculumDistillationConfig
from hf_curriculum_distill.options import ComparisonOptions
from hf_curriculum_distill.report.launch import plan_runs, planned_or_exit
from hf_curriculum_distill.report.results import write_results


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


def test_runs_that_are_added_to_a_single_one_leave_it_where_it_is(config):
    args = config("here", seed=3)
    left = {"method": "curriculum", "seed": 3, "path": args.output_dir, "finite": False, "error": "NaN"}
    write_results(args.output_dir, [left])
    [added] = plan_runs(Options(["one_shot"]), args)
    [other_seed] = plan_runs(Options(["curriculum"], seeds=[4]), args)
    again, also = plan_runs(Options(["curriculum", "one_shot"]), args)
    assert [os.path.relpath(run.args.output_dir, args.output_dir) for run in (added, other_seed, again, also)] == [
        "one_shot/seed-3", "curriculum/seed-4", ".", "one_shot/seed-3"
    ]  # fmt: skip


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


@pytest.mark.parametrize(
    "methods, variants, fields, message",
    [
        (
            ["a"],
            {"a": {"student": "bert-2-8"}},
            {},
            "variants.a sets 'student', which all runs of a launch share; set it",
        ),
        (
            ["labels"],
            {},
            {"method": "one_shot"},
            "method is 'one_shot', but methods asks for labels alone; use --methods o",
        ),
        (
            ["one_shot", "labels"],
            {},
            {"stages": [{"kl_weight": 1.0}]},
            "stages says what .* names one_shot, labels, which",
        ),
    ],
)
def test_what_no_run_would_follow_is_refused(config, methods, variants, fields, message):
    @dataclasses.dataclass
    class Shared(Options):
        shared_by_runs = frozenset({"student"})

    with pytest.raises(ValueError, match=message):
        plan_runs(Shared(methods, variants), config(**fields))


def test_several_students_are_not_pushed_to_one_repository(config):
    args = config(push_to_hub=True)
    assert len(plan_runs(Options(["one_shot"]), args)) == 1
    with pytest.raises(ValueError, match="push_to_hub pushes one student, but methods and seeds ask for 2"):
        plan_runs(Options(["one_shot"], seeds=[1, 2]), args)


@pytest.mark.parametrize("field", ["seed", "output_dir"])
def test_a_variant_cannot_set_what_the_plan_sets(config, field):
    with pytest.raises((ValueError, TypeError), match=field):
        plan_runs(Options(["a"], {"a": {field: 3}}), config())


def test_a_subclass_of_the_configuration_stays_one(tmp_path):
    @dataclasses.dataclass
    class Own(CurriculumDistillationConfig):
        extra: int = 3

    args = Own(str(tmp_path), use_cpu=True, report_to="none")
    [run] = plan_runs(Options(["a"], {"a": {"extra": 5}}), args)
    run = run.args
    assert type(run) is Own and run.extra == 5 and args.extra == 3
    assert torch.device("cpu") == run.device


# ---- before the data are read ----


@pytest.mark.parametrize("left", ["results.json", "one_shot/seed-0/config.json", "one_shot/seed-1/checkpoint-2/"])
def test_what_a_run_left_is_written_over_only_if_the_user_says_so(config, left):
    args = config("all")
    options = Options(["one_shot"], seeds=[0, 1])
    assert len(planned_or_exit(options, args)) == 2
    assert not os.listdir(args.output_dir) if os.path.exists(args.output_dir) else True
    path = os.path.join(args.output_dir, left)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not left.endswith("/"):
        with open(path, "x") as file:
            file.write("[]")
    with pytest.raises(
        SystemExit, match=f"{left.rstrip('/')} is what an earlier run left; name another --output_dir"
    ) as exit:
        planned_or_exit(options, args)
    assert len(exit.value.code.splitlines()) == 1
    for told in (
        (dataclasses.replace(options, overwrite_output_dir=True), args),
        (options, dataclasses.replace(args, resume_from_checkpoint="last")),
    ):
        assert len(planned_or_exit(*told)) == 2


def test_a_checkpoint_that_is_not_there_is_refused(config):
    args = config("all", resume_from_checkpoint="all/checkpoint-3")
    with pytest.raises(SystemExit, match="resume_from_checkpoint is 'all/checkpoint-3', which is no folder; name a ch"):
        planned_or_exit(Options(["one_shot"]), args)


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
