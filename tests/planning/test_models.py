import runpy
from pathlib import Path

import pytest
import torch
from conftest import tiny_bert
from transformers import AutoTokenizer, ModernBertConfig

from hf_curriculum_distill import student_from_teacher
from hf_curriculum_distill.cli import main
from hf_curriculum_distill.planning import SIZES, PlanArguments, PlannedConfig, find_config, find_size, make_plan
from planning.plans import folder_of, saved, tiny_gpt

ROOT = Path(__file__).parents[2]

TOKENIZER = ROOT / "recipes/data/bert_uncased"


def test_sizes_are_the_models_that_the_recipe_makes():
    recipe, tokenizer = runpy.run_path(str(ROOT / "recipes/bert_large.py")), AutoTokenizer.from_pretrained(TOKENIZER)
    for name in [*SIZES, "bert-6-768", "bert-2-64", "bert-1-32"]:
        with torch.device("meta"):
            made = recipe["make_model"](name, 0.0, tokenizer).config.to_diff_dict()
        found = find_config(name, dropout=0.0, vocab_size=len(tokenizer)).to_diff_dict()
        assert found == {key: value for key, value in made.items() if key not in ("architectures", "dtype")}


def test_a_students_name_stands_for_its_teachers_size_unless_a_folder_has_it(tmp_path, monkeypatch):
    teacher = tiny_bert(4, width=24).config
    assert (find_size("teacher-6"), find_size("teacher-2-12")) == ((6, None), (2, 12))
    for name, hidden_size in (("teacher-2", None), ("teacher-2-12", 12)):
        expected = student_from_teacher(tiny_bert(4, width=24), 2, hidden_size=hidden_size).config.to_diff_dict()
        found = find_config(name, teacher=teacher, vocab_size=7).to_diff_dict()
        assert found == {key: value for key, value in expected.items() if key not in ("architectures", "dtype")}
    with pytest.raises(ValueError, match=r"'teacher-2' is a student .* but no teacher is given"):
        find_config("teacher-2")
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path, "teacher-2", tiny_bert(3))
    assert find_size("teacher-2") is None
    assert find_config("teacher-2", teacher=teacher).num_hidden_layers == 3


@pytest.mark.parametrize("make, task, width", [(tiny_bert, "MaskedLM", None), (tiny_gpt, "CausalLM", 12)])
def test_a_plan_of_a_student_by_its_name_is_that_of_its_configuration(tmp_path, make, task, width):
    teacher = make(4)
    options = {"teacher": saved(tmp_path / "teacher", teacher), "task": task, "block_size": 12}
    args = PlannedConfig(str(tmp_path / "out"), method="one_shot", max_steps=8, use_cpu=True)
    student = saved(tmp_path / "student", student_from_teacher(teacher, 2, hidden_size=width))
    by_name = make_plan(PlanArguments(student=f"teacher-2-{width}" if width else "teacher-2", **options), args)
    assert not by_name.errors
    assert by_name == make_plan(PlanArguments(student=student, **options), args)


def test_a_plan_refuses_what_the_run_would_refuse(tmp_path, capsys):
    config = ModernBertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, pad_token_id=0)
    config.save_pretrained(tmp_path / "teacher")
    teacher = ["--teacher", str(tmp_path / "teacher/config.json")]
    for student, given, message in (
        ("teacher-2", teacher, "layers.0.attn_norm.weight"),
        ("teacher-5", teacher, "num_layers is 5, but the teacher has 4 blocks"),
        ("teacher-2-9", teacher, "hidden_size is 9"),
        ("teacher-2", [], "no teacher is given; name it with --teacher"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", "--student", student, *given, "--max_steps", "8", "--output_dir", str(tmp_path)])
        assert message in capsys.readouterr().err
