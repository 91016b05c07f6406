"""The text classification recipe as a subprocess, in seconds, and its parts."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.report.launch import plan_runs

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes/configs/text_classification"
TINY = "--teacher_steps 2 --teacher_batch_size 4 --student bert-1-16 --max_steps 2 --per_device_train_batch_size 4 "
TINY += "--save_steps 1 --save_total_limit 5 --eval_steps 1 --logging_steps 1 --calibration_samples 16 --dropout 0.0 "
TINY += "--seeds 0 --use_cpu true --allow_untrained_teacher"
METHODS = ["labels", "one_shot", "curriculum", "other text", "two layers"]
MOODS = {"good": "a fine film", "bad": 'a "dull film', "mixed": "null"}  # neither quotes nor null mean anything


@pytest.fixture(scope="module")
def classification():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("text_classification", ROOT / "recipes/text_classification.py")
    module = sys.modules["text_classification"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder without a head, a task as TSV with string labels, and other text."""
    folder = tmp_path_factory.mktemp("classification")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/data/bert_uncased")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    (folder / "task").mkdir()
    for split, number in (("train", 12), ("validation", 3), ("test", 6)):
        rows = [f"{text} {index}\t{mood}" for index in range(number // 3) for mood, text in MOODS.items()]
        (folder / f"task/{split}.tsv").write_text("\n".join(["sentence\tmood", *rows]) + "\n")
    texts = [{"text": f"the river number {number} flows to the sea"} for number in range(5)]
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


def options(folder, *more):
    return [*TINY.split(), "--dataset", str(folder / "task"), "--teacher", str(folder / "teacher"),
            "--teacher_from", str(folder / "encoder"), "--output_dir", str(folder / "students"), *more]  # fmt: skip


def recipe(folder, *more):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "recipes/text_classification.py", *options(folder, *more)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def comparison(folder):
    variants = {"other text": {"unlabelled_text": str(folder / "other.jsonl")}, "two layers": {"student": "teacher-2"}}
    variants["two layers"] |= {"method": "one_shot"}
    return ["--variants", json.dumps(variants), "--methods", *METHODS]


@pytest.fixture(scope="module")
def finished(folder):
    done = recipe(folder, *comparison(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_results_table_and_students_are_complete(finished):
    folder, done = finished
    results = json.loads((folder / "students/results.json").read_text())
    assert [result["method"] for result in results] == METHODS
    for result in results:
        assert result["finite"] and result["steps"] == 2 and result["samples"] == 8
        assert result["eval_kl"] >= 0 and (result["teacher_flops"] > 0) == (result["method"] != "labels")
        config = AutoModelForSequenceClassification.from_pretrained(result["path"]).config
        assert config.id2label == {0: "bad", 1: "good", 2: "mixed"}
        assert config.hidden_size == (32 if result["method"] == "two layers" else 16)
    assert "on the test set of 6 texts, whose most frequent class is 0.3333 of all" in done.stderr
    table = done.stdout[done.stdout.index("method ") :].splitlines()
    assert len([line for line in table if line.startswith(tuple(METHODS))]) == len(METHODS)


@pytest.mark.parametrize("student", ["bert-1-16", "teacher-1-16"])
def test_a_students_embeddings_start_in_the_basis_of_its_targets(finished, classification, student):
    more = [
        "--methods",
        "curriculum",
        "--student",
        student,
        "--student_embeddings",
        "projected",
        "--eval_strategy",
        "no",
    ]
    command = options(finished[0], *more)
    parsed = parse_arguments([classification.RecipeArguments, classification.TrainingConfig], command)
    [run] = plan_runs(*parsed)
    teacher = AutoModelForSequenceClassification.from_pretrained(finished[0] / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "teacher")
    student = classification.start_student(run, tokenizer, teacher.config.id2label)
    trainer = classification.CurriculumDistillationTrainer(student, run.args, teacher_model=teacher)
    matrix = trainer.projection_bank.tensors()["layer_1_2.weight"]
    own, theirs = (model.get_input_embeddings().weight.detach() for model in (student, teacher))
    torch.testing.assert_close(own, theirs @ matrix.T)


def test_the_layer_stage_on_other_text_is_a_part_of_one_training(finished):
    folder, _ = finished
    task, other = (
        json.loads((folder / f"students/{method}/seed-0/curriculum.json").read_text())
        for method in ("curriculum", "other_text")
    )
    assert task["stages"] == other["stages"] and [stage["until"] for stage in task["stages"]] == [1, None]
    assert task["data"]["num_examples"] == 12 and other["data"]["num_examples"] == 8
    assert task["projection_matrices"] == other["projection_matrices"]


def test_a_second_launch_keeps_the_teacher_and_goes_on_where_the_first_was_killed(finished, tmp_path):
    folder, _ = finished
    teacher, students = folder / "teacher/model.safetensors", folder / "students"
    before = teacher.stat().st_mtime_ns
    for run in ("curriculum", "other_text"):
        shutil.copytree(students / run / "seed-0/checkpoint-1", tmp_path / run / "seed-0/checkpoint-1")
    options = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "last", *comparison(folder)[:3]]
    done = recipe(folder, *options, "curriculum", "other text")
    assert done.returncode == 0, done.stderr[-3000:]
    assert teacher.stat().st_mtime_ns == before
    for run in ("curriculum", "other_text"):
        whole, resumed = (load_file(place / run / "seed-0/model.safetensors") for place in (students, tmp_path))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_one_json_file_with_numbers_as_labels_is_enough(folder, tmp_path):
    rows = [{"text": f"{text} {index}", "label": 3 * number} for index in range(10) for number, text in
            enumerate(MOODS.values())]  # fmt: skip
    (tmp_path / "all.json").write_text(json.dumps(rows))
    more = ["--dataset", str(tmp_path / "all.json"), "--teacher", str(tmp_path / "teacher"), "--output_dir",
            str(tmp_path / "student"), "--methods", "curriculum", "--student", "teacher-1-16"]  # fmt: skip
    done = recipe(folder, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    teacher, student = (AutoConfig.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
    assert teacher.id2label == student.id2label == {0: "0", 1: "3", 2: "6"}
    assert (student.hidden_size, student.num_hidden_layers) == (16, 1)
    record = json.loads((tmp_path / "student/curriculum.json").read_text())
    assert record["data"]["num_examples"] == 25  # 10 % of 30 are the test set, 10 % of the rest the validation set


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--student", "bert-huge"], 2, "'bert-huge' is no student"),
        (["--student_embeddings", "some"], 1, "student_embeddings is 'some'; use 'random' or 'projected'"),
        (
            ["--student", "teacher-1-32", "--student_embeddings", "projected"],
            1,
            "'teacher-1-32' is as wide as the teacher and has its embeddings as they are",
        ),
        (["--student", "teacher-3"], 1, "num_layers is 3, but the teacher has 2 blocks"),
        (["--variants", '{"deep": {"student": "teacher-9"}}', "--methods", "deep"], 1, "num_layers is 9"),
        (["--variants", '{"deep": {"student": "bert-9"}}', "--methods", "deep"], 1, "'bert-9' is no student"),
        (["--evaluate_on", "train"], 2, "evaluate_on is 'train'; use 'validation' or 'test'"),
        (["--max_length", "2"], 2, "max_length is 2"),
        (["--max_length", "600"], 1, "max_length is 600, but the models have room for 512 tokens; lower it"),
        (["--label_colum", "mood"], 2, "did you mean label_column?"),
        (["--label_column", "label"], 1, "the labels can't be 'label'; name one of sentence (string), mood (string)"),
        (["--text_column", "word"], 1, "holds the texts can't be 'word'; name one of sentence (string) with --text_c"),
        (["--dataset", "none.tsv"], 1, "none.tsv is no such file; name files, or a folder, of one of .tsv, .csv"),
        (["--teacher_from", "no/encoder"], 1, "'no/encoder' has no configuration within reach"),
    ],
)
def test_wrong_options_are_said_before_training(folder, classification, monkeypatch, capsys, more, status, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = ["--teacher", str(folder / "wrong"), "--output_dir", str(folder / "wrong")]
    monkeypatch.setattr(sys, "argv", ["text_classification.py", *options(folder), *paths, *more])
    with pytest.raises(SystemExit) as exit:
        classification.main()
    assert exit.value.code == 2 if status == 2 else len(exit.value.code.splitlines()) == 1
    assert message in str(exit.value.code) + capsys.readouterr().err
    assert not (folder / "wrong").exists()


def test_a_teacher_is_read_from_where_its_arguments_say(finished, classification, monkeypatch, tmp_path):
    shutil.copytree(finished[0] / "teacher", tmp_path / "teacher/best")
    for path in (tmp_path / "teacher/best").glob("*token*"):
        path.rename(tmp_path / "teacher" / path.name)
    more = ["--teacher", str(tmp_path / "teacher"), "--teacher_model_init_kwargs", '{"subfolder": "best"}']
    more += ["--output_dir", str(tmp_path / "student"), "--methods", "curriculum", "--student", "teacher-1"]
    command = [*options(finished[0], *more), "--projection", "identity", "--learning_rate", "0"]
    monkeypatch.setattr(sys, "argv", ["text_classification.py", *command])
    with pytest.raises(SystemExit, match=r"has 'subfolder': 'best', but teacher_from trains a teacher into .* itself"):
        classification.main()
    at = command.index("--teacher_from")
    monkeypatch.setattr(sys, "argv", ["text_classification.py", *command[:at], *command[at + 2 :]])
    classification.main()
    name = "bert.embeddings.word_embeddings.weight"
    student, teacher = (
        load_file(place / "model.safetensors")[name] for place in (tmp_path / "student", finished[0] / "teacher")
    )
    assert torch.equal(student, teacher)


def test_a_teacher_that_always_says_the_same_is_refused(finished, classification, monkeypatch):
    folder, _ = finished
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    torch.nn.init.zeros_(teacher.classifier.weight)
    teacher.save_pretrained(folder / "ignorant")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(folder / "ignorant")
    more = ["--teacher", str(folder / "ignorant"), "--allow_untrained_teacher", "false"]
    more += ["--output_dir", str(folder / "other students")]
    monkeypatch.setattr(sys, "argv", ["text_classification.py", *options(folder, *more)])
    with pytest.raises(SystemExit, match=r"ignorant is right on 33.3% of the test set, 33.3% of which are of one"):
        classification.main()


def test_other_text_comes_first_and_counts_no_label(folder, classification):
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder")
    arguments = classification.RecipeArguments(
        dataset="some", teacher="some", unlabelled_text=str(folder / "other.jsonl"), max_length=6
    )
    args = classification.TrainingConfig(str(folder), max_steps=3, per_device_train_batch_size=4, use_cpu=True)
    task = Dataset.from_dict({"input_ids": [[7]] * 3, "token_type_ids": [[0]] * 3, "attention_mask": [[1]] * 3})
    rows = classification.in_order(arguments, args, tokenizer, 2, task.add_column("labels", [0, 1, 2]))
    assert len(rows) == 12 and rows["labels"][:8] == [-100] * 8 and sorted(rows["labels"][8:11]) == [0, 1, 2]
    assert {len(ids) for ids in rows["input_ids"][:8]} == {6} and rows["input_ids"][8:] == [[7]] * 4


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_read_and_their_methods_exist(classification, monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    for student in re.findall(r"student: (runs/[^,}\s]+)", path.read_text()):  # that another recipe trains
        os.makedirs(student, exist_ok=True)
    kinds = [classification.RecipeArguments, classification.TrainingConfig]
    arguments, args = parse_arguments(kinds, ["--config", str(path)])
    assert len(plan_runs(arguments, args)) == len(arguments.methods) * len(arguments.seeds)
