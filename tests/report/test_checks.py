"""What is wrong with models and tokenizers is said before data are read."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_bert
from transformers import AutoTokenizer, BertConfig

from hf_curriculum_distill.report.checks import check_embeddings, check_models, check_student_tokenizer, load_tokenizer

TOKENIZER = Path(__file__).parents[2] / "recipes/data/bert_uncased"


@pytest.mark.parametrize(
    ("fields", "tokens", "length", "message"),
    [
        ({}, 51, 8, "The tokenizer has 51 tokens, but the student's vocabulary 50 entries"),
        ({}, 50, 33, "block_size is 33, but the models have room for 32 tokens; lower it"),
        ({"max_steps": 2}, 50, 8, "2 layer stages in 50 % of 2 steps"),
        ({"layer_map": [[3, 4]]}, 50, 8, "has 2 blocks"),
    ],
)
def test_models_that_make_no_run_are_refused(config, fields, tokens, length, message):
    with torch.device("meta"):
        models = tiny_bert(2), tiny_bert(4, width=24)
    check_models(config(), *models, range(50), ("block_size", 32))
    with pytest.raises(ValueError, match=message):
        check_models(config(**fields), *models, range(tokens), ("block_size", length))


@pytest.mark.parametrize(
    ("student", "fields", "message"),
    [
        ("teacher-2", {}, "the student 'teacher-2' has embeddings to start from"),
        ("teacher-2-24", {}, "'teacher-2-24' is as wide as the teacher and has its embeddings as they are"),
        ("here", {}, "the student '.*here' has embeddings to start from"),
        ("org/model", {}, "the student 'org/model' has embeddings to start from"),
        ("bert-2-16", {"shared_projection": False}, "targets of each layer have a matrix of their own"),
        ("2-16", {"shared_projection": False, "method": "hidden"}, "targets of each layer have a matrix of their own"),
        ("bert-2-16", {"projection": "pca"}, "that of a 'pca' is measured when training begins; use"),
        ("bert-2-16", {"projection": "rotated_pca"}, "that of a 'rotated_pca' is measured"),
    ],
)
def test_projected_embeddings_need_a_new_student_and_one_matrix(config, tmp_path, student, fields, message):
    (tmp_path / "here").mkdir()
    student, args = str(tmp_path / student) if student == "here" else student, {"shared_projection": True} | fields
    teacher = BertConfig(hidden_size=24)
    check_embeddings(student, "random", config(**args), teacher)
    for other in ("teacher-2-16", "bert-2-24"):
        check_embeddings(other, "projected", config(shared_projection=True), teacher)
    check_embeddings("2-16", "projected", config(method="one_shot", shared_projection=False), teacher)
    with pytest.raises(ValueError, match=message):
        check_embeddings(student, "projected", config(**args), teacher)


def test_a_student_that_starts_from_weights_has_the_tokenizer_of_the_run(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for name in ("bert-2-16", "teacher-2", str(tmp_path)):  # nothing is saved there
        check_student_tokenizer(name, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    check_student_tokenizer(str(tmp_path), tokenizer)
    tokenizer.add_tokens(["neologism"])
    with pytest.raises(ValueError, match=r"was trained with a tokenizer that maps tokens to other ids than the run's"):
        check_student_tokenizer(str(tmp_path), tokenizer)


def test_a_tokenizer_that_is_not_there_is_named(config):
    with pytest.raises(OSError, match="There is no tokenizer of 'no/words' within reach; name one with --tokenizer"):
        load_tokenizer(SimpleNamespace(tokenizer="no/words", teacher=None, teacher_from=None), config())
