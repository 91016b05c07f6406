"""The real entry points, as subprocesses, in seconds."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import IterableDataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hf_curriculum_distill.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
QUICKSTART = "recipes/configs/bert_large/quickstart.yaml"
TINY = "--block_size 16 --eval_blocks 8 --teacher_from bert-2-32 --teacher_steps 2 --student bert-2-16 --max_steps 8 "
TINY += (
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 4 --eval_steps 4 --save_steps 4 --logging_steps 2 "
)
TINY += "--allow_untrained_teacher --tokenizer recipes/data/bert_uncased --student_embeddings random "
TINY += "--methods curriculum one_shot --layer_order sequential --hidden_weight_in_logit_stage 0"


STUDENT, ONE_SHOT = "student/curriculum/seed-42", "student/one_shot/seed-42"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def recipe_command(folder, *options):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "recipes/bert_large.py"]
    paths = ["--config", QUICKSTART, "--teacher", str(folder / "teacher"), "--output_dir", str(folder / "student")]
    return [*launch, *paths, *TINY.split(), *options]


def recipe(folder, *options):
    return run(*recipe_command(folder, *options)[1:])


@pytest.fixture(scope="module")
def bert_large():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("bert_large", ROOT / "recipes/bert_large.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "recipes/data/bert_uncased")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    done = recipe(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_the_recipe_ends_with_table_results_plot_and_students(finished):
    folder, done = finished
    results = json.loads((folder / "student/results.json").read_text())
    assert [result["method"] for result in results] == ["curriculum", "one_shot"]
    for result in results:
        assert result["finite"] and result["steps"] == 8 and result["samples"] == 32
        assert result["student_flops"] > 0 and result["teacher_flops"] > 0 and result["seconds"] > 0
        assert 0 <= result["eval_accuracy"] <= 1 and 0 <= result["eval_agreement"] <= 1 and result["eval_kl"] >= 0
        assert Path(result["path"], "model.safetensors").is_file()
    assert results[0]["teacher_flops"] < results[1]["teacher_flops"]  # layer stages run a prefix, without heads
    table = done.stdout[done.stdout.index("method ") :].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["(teacher)", "curriculum", "one_shot"]
    assert (folder / "student/comparison.png").read_bytes()[1:4] == b"PNG"
    stages = json.loads((folder / STUDENT / "curriculum.json").read_text())["stages"]
    assert [(stage["name"], stage["until"]) for stage in stages] == [("layer 1", 2), ("layer 2", 4), ("kl", None)]
    assert any(folder.glob(f"{STUDENT}/**/events*"))


def test_the_student_is_plain_and_fills_masks_in_a_fresh_process(finished):
    folder, _ = finished
    names = load_file(folder / STUDENT / "model.safetensors").keys()
    assert not [name for name in names if "teacher" in name or "projection" in name]
    done = run("recipes/fill_mask.py", str(folder / STUDENT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([line for line in done.stdout.splitlines() if "[MASK]" in line and "->" in line]) == 3


def test_a_second_run_uses_the_teacher_that_is_there_and_resumes(finished):
    folder, _ = finished
    before = (folder / "teacher/model.safetensors").stat().st_mtime_ns
    student = load_file(folder / STUDENT / "model.safetensors")
    done = recipe(folder, "--resume_from_checkpoint", "last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "teacher/model.safetensors").stat().st_mtime_ns == before
    again = load_file(folder / STUDENT / "model.safetensors")
    assert all((again[name] == student[name]).all() for name in student)


def test_the_teacher_reads_blocks_that_are_masked_once_only_once_for_all_students(finished, tmp_path):
    folder, _ = finished
    options = ["--mask_once", "--teacher", str(folder / "teacher"), "--teacher_cache", str(tmp_path / "cache")]
    done = recipe(tmp_path, *options, "--methods", "curriculum", "one_shot", "labels")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, labels = json.loads((tmp_path / "student/results.json").read_text())
    assert [result["method"] for result in (first, second, labels)] == ["curriculum", "one_shot", "labels"]
    assert first["teacher_flops"] > 0 and second["teacher_flops"] == labels["teacher_flops"] == 0


def test_the_same_seed_gives_the_same_teacher_and_student(finished, tmp_path):
    folder, _ = finished
    done = recipe(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for model in ("teacher", STUDENT, ONE_SHOT):
        first, again = (load_file(place / model / "model.safetensors") for place in (folder, tmp_path))
        assert all(torch.equal(first[name], again[name]) for name in first), model


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--method", "two_shot"], 2, "method is 'two_shot'; use one of 'curriculum', 'one_shot'"),
        (["--student", "bert-huge"], 1, "'bert-huge' is no model"),
        (["--teacher_from", "bert-3-32"], 1, "holds a teacher with num_hidden_layers=2"),
        (["--block_size", "600"], 1, "block_size is 600, but the models have room for 512 tokens; lower it"),
        (["--evaluate_on", "train"], 2, "evaluate_on is 'train'; use 'test' or 'validation'"),
        (["--allow_untrained_teacher", "False"], 1, "so it has next to nothing to teach"),
        (["--mask_once", "--streaming"], 1, "mask_once masks the blocks before training"),
    ],
)
def test_wrong_options_are_said_before_training(finished, options, status, message):
    folder, _ = finished
    done = run("recipes/bert_large.py", "--config", QUICKSTART, *TINY.split(),
               "--teacher", str(folder / "teacher"), "--output_dir", str(folder / "wrong"), *options)  # fmt: skip
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "wrong/model.safetensors").exists()


def test_the_defaults_are_the_real_job(bert_large, tmp_path):
    recipe, args = parse_arguments([bert_large.RecipeArguments, bert_large.TrainingConfig], [])
    assert (recipe.teacher, recipe.dataset) == ("google-bert/bert-large-uncased", "wikimedia/wikipedia")
    assert (recipe.block_size, recipe.mlm_probability, recipe.student) == (512, 0.15, "bert-large")
    assert (args.method, args.layer_order, args.optim) == ("curriculum", "together", "adamw_torch_fused")
    assert args.report_to == ["tensorboard"]
    assert args.bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max_steps 2", "2 layer stages in 50 % of 2 steps"),
        ("--dataset recipes/none.txt", "recipes/none.txt is no such file"),
        ("--dataset no/set", "no/set is no file or folder here, and the Hub is out of reach"),
        ("--text_column body", "The column 'body' of recipes/data/wikipedia_excerpt is not there"),
        ("--teacher_from no/model --teacher no/teacher", "'no/model' has no configuration within reach"),
        ("--teacher no/teacher --teacher_from bert-2-32 --tokenizer no/words", "no/words"),
        ("--output_dir {finished}", "results.json is what an earlier run left"),
    ],
)
def test_what_is_missing_is_said_in_one_line_and_nothing_is_written(
    finished, bert_large, monkeypatch, tmp_path, options, message
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = ["--config", QUICKSTART, "--teacher", str(finished[0] / "teacher"), "--output_dir", str(tmp_path / "new")]
    options = options.format(finished=finished[0] / "student").split()
    monkeypatch.setattr(sys, "argv", ["bert_large.py", *paths, *TINY.split(), "--use_cpu", "true", *options])
    with pytest.raises(SystemExit, match=re.escape(message)) as exit:
        bert_large.main()
    assert len(exit.value.code.splitlines()) == 1
    assert not (tmp_path / "new").exists() and not Path("no").exists()


def test_a_teacher_that_is_there_gets_no_folder_beside_it_and_one_without_weights_is_trained(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "teacher").mkdir()
    shutil.copy(folder / "teacher/config.json", tmp_path / "teacher")  # a save that was killed
    done = recipe(tmp_path, "--methods", "one_shot", "--max_steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    first, again = (load_file(place / "teacher/model.safetensors") for place in (folder, tmp_path))
    assert all(torch.equal(first[name], again[name]) for name in first)
    shutil.rmtree(tmp_path / "teacher-training")
    done = recipe(tmp_path, "--methods", "one_shot", "--max_steps", "2", "--overwrite_output_dir")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "heads"),
    [("bert-large", 24, 1024, 16), ("bert-large-narrow", 24, 512, 8), ("bert-base", 12, 768, 12),
     ("bert-6-768", 6, 768, 12), ("bert-4-256", 4, 256, 4)],
)  # fmt: skip
def test_students_are_made_by_size(bert_large, tokenizer, size, layers, hidden, heads):
    with torch.device("meta"):
        config = bert_large.make_model(size, 0.1, tokenizer).config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, hidden, heads)
    assert (config.intermediate_size, config.vocab_size) == (4 * hidden, 30522)


def test_a_config_file_is_a_random_model_and_a_model_folder_is_its_weights(bert_large, tokenizer, finished):
    student = finished[0] / STUDENT
    again = bert_large.make_model(str(student), 0.0, tokenizer).state_dict()
    fresh = bert_large.make_model(str(student / "config.json"), 0.0, tokenizer).state_dict()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(again[name], load_file(student / "model.safetensors")[name])
    assert fresh[name].shape == again[name].shape and not torch.equal(fresh[name], again[name])


def student_of(bert_large, finished, tokenizer, *options):
    """What the options start from, beside the teacher."""
    teacher = str(finished[0] / "teacher")
    command = ["--teacher", teacher, "--dropout", "0", "--use_cpu", "true", "--bf16", "false"]
    command += ["--eval_strategy", "no", *options]
    recipe, args = parse_arguments([bert_large.RecipeArguments, bert_large.TrainingConfig], command)
    [run] = bert_large.planned_or_exit(recipe, args)
    bert_large.check_run(run)
    return bert_large.start_student(run, tokenizer), bert_large.load_model(teacher, 0.0), args


def test_a_student_is_some_of_the_teachers_blocks(bert_large, finished, tokenizer):
    student, teacher, _ = student_of(bert_large, finished, tokenizer, "--student", "teacher-1")
    own, theirs = student.state_dict(), teacher.state_dict()
    assert student.config.num_hidden_layers == 1 and student.config.hidden_size == teacher.config.hidden_size
    block = "bert.encoder.layer.{}.attention.self.query.weight"
    assert torch.equal(own[block.format(0)], theirs[block.format(1)])  # the last of two
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(own[name], theirs[name])


def test_a_teacher_is_read_from_where_its_arguments_say(bert_large, finished, tokenizer, tmp_path):
    shutil.copytree(finished[0] / "teacher", tmp_path / "best")
    for path in (tmp_path / "best").glob("*token*"):
        path.rename(tmp_path / path.name)
    where = ["--teacher", str(tmp_path), "--teacher_model_init_kwargs", '{"subfolder": "best"}']
    student, teacher, _ = student_of(bert_large, finished, tokenizer, "--student", "teacher-1", *where)
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    command = [*where, "--allow_untrained_teacher", "--use_cpu", "true", "--bf16", "false", "--eval_strategy", "no"]
    command += ["--dataloader_num_workers", "0"]
    recipe, args = parse_arguments([bert_large.RecipeArguments, bert_large.TrainingConfig], command)
    heldout = bert_large.mask_once([{"input_ids": [101, *range(2000, 2030), 102]}], tokenizer, 0.5, seed=0)
    pipeline = {"eval_dataset": heldout, "data_collator": bert_large.MaskedBlocksCollator(tokenizer)}
    assert 0 <= bert_large.find_teacher(recipe, args, pipeline)["eval_accuracy"] <= 1
    assert bert_large.load_tokenizer(recipe, args).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("on_hub", [False, True], ids=["folder", "Hub"])
def test_a_student_starts_from_weights_that_a_folder_or_the_hub_has(
    bert_large, finished, tokenizer, monkeypatch, tmp_path, on_hub
):
    saved, name = finished[0] / STUDENT, "org/student"
    if on_hub:  # downloaded before
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        shutil.copytree(saved, tmp_path / "models--org--student/snapshots" / (commit := "0" * 40))
        (tmp_path / "models--org--student/refs").mkdir()
        (tmp_path / "models--org--student/refs/main").write_text(commit)
    student, _, _ = student_of(bert_large, finished, tokenizer, "--student", name if on_hub else str(saved))
    own = student.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in load_file(saved / "model.safetensors").items())


@pytest.mark.parametrize("name", ["bert-3-16", "teacher-1-16"])
def test_a_students_embeddings_start_in_the_basis_of_its_targets(bert_large, finished, tokenizer, name):
    options = ["--student", name, "--student_embeddings", "projected", "--shared_projection", "true"]
    student, teacher, args = student_of(bert_large, finished, tokenizer, *options)
    trainer = bert_large.CurriculumDistillationTrainer(student, args, teacher_model=teacher)
    own, theirs = (model.get_input_embeddings().weight.detach() for model in (student, teacher))
    matrices = [tensor for key, tensor in trainer.projection_bank.tensors().items() if key.endswith(".weight")]
    for matrix in matrices:
        torch.testing.assert_close(own, theirs @ matrix.T)
    assert len(matrices) == student.config.num_hidden_layers


@pytest.mark.parametrize(
    "options, message",
    [
        (["--student", "bert-2"], "'bert-2' is no model: use bert-large"),
        (["--student_embeddings", "teacher"], "student_embeddings is 'teacher'; use 'random' or 'projected'"),
    ],
)
def test_a_student_that_cannot_be_is_refused(bert_large, finished, tokenizer, options, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        student_of(bert_large, finished, tokenizer, *options)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_becomes_blocks_to_train_on_and_others_that_are_masked_once(bert_large, tokenizer, tmp_path, streaming):
    (tmp_path / "some.txt").write_text("\n".join(f"document {number} is about number {number}" for number in range(40)))
    recipe = bert_large.RecipeArguments(
        dataset=str(tmp_path), block_size=10, heldout_documents=8, eval_blocks=3, streaming=streaming
    )
    train, heldout = bert_large.load_data(recipe, tokenizer)
    assert isinstance(train, IterableDataset) == streaming
    assert set(heldout.column_names) == {"input_ids", "labels"} and len(heldout) == 3
    blocks = [row["input_ids"] for row in islice(train, 80 if streaming else None)]  # a stream has no end
    assert {len(block) for block in blocks} == {10}
    numbers = {word for block in blocks for word in tokenizer.decode(block).split() if word.isdigit()}
    assert len(numbers) in (31, 32)  # the last block may leave one document's number out


def test_a_recipe_killed_and_launched_again_with_one_more_option_ends_as_if_it_had_not_been(finished, tmp_path):
    uninterrupted, _ = finished
    shutil.copytree(uninterrupted / "teacher", tmp_path / "teacher")
    launched = recipe_command(tmp_path, "--resume_from_checkpoint", "True")
    begun = subprocess.Popen(launched, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("**/checkpoint-4/trainer_state.json")):
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.communicate()
    assert not (tmp_path / "student/results.json").exists()
    done = subprocess.run(launched, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((folder / "student/results.json").read_text()) for folder in (uninterrupted, tmp_path)]
    assert len(results[0]) == len(results[1]) == 2
    for expected, actual in zip(*results, strict=True):
        timed = {"path", "seconds"}
        assert {n: v for n, v in actual.items() if n not in timed} == {
            n: v for n, v in expected.items() if n not in timed
        }
        weights = [load_file(Path(result["path"], "model.safetensors")) for result in (expected, actual)]
        assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
