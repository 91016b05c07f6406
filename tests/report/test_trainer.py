"""What a run publishes: a model card in every folder of a student, and no path of the teacher in any file."""

import json
import re
from pathlib import Path

import pytest
from conftest import masked_lm_examples, tiny_bert
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

from hf_curriculum_distill import CURRICULUM_EXTRACTION, CurriculumDistillationConfig, CurriculumDistillationTrainer

SAVED = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}


def card(folder):
    return ModelCard.load(Path(folder, "README.md"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A run with a teacher from a local folder, resumed in its middle and saved at its end."""
    folder = tmp_path_factory.mktemp("published")
    tiny_bert(4, width=24, seed=2, initializer_range=0.3).save_pretrained(folder / "secret-place" / "big-teacher")
    data = masked_lm_examples(16)
    fields = {"per_device_train_batch_size": 4, "report_to": "tensorboard", "disable_tqdm": True, "use_cpu": True}
    fields |= CURRICULUM_EXTRACTION | SAVED | {"max_steps": 8}
    for resume in (False, True):
        args = CurriculumDistillationConfig(str(folder / "student"), **fields)
        trainer = CurriculumDistillationTrainer(
            tiny_bert(2, seed=1),
            args,
            train_dataset=data,
            eval_dataset=data[:8],
            teacher_model=str(folder / "secret-place" / "big-teacher"),
        )
        trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-4" if resume else None)
    trainer.save_model()
    return trainer


def test_every_saved_student_has_a_card_of_its_own_step(published):
    folder = Path(published.args.output_dir)
    for place, step in ("", 8), ("checkpoint-4", 4), ("checkpoint-8", 8):
        written, record = card(folder / place), json.loads((folder / place / "curriculum.json").read_text())
        (evaluation,) = (e for e in published.state.log_history if "eval_loss" in e and e["step"] == step)
        metrics = {f"eval_{r.metric_type}": r.metric_value for r in written.data.eval_results}
        assert {"eval_loss", "eval_accuracy", "eval_agreement", "eval_kl"} <= metrics.keys()
        assert metrics == {name: pytest.approx(evaluation[name], rel=1e-5) for name in metrics}
        assert written.data.pipeline_tag == "fill-mask" and written.data.model_name == "student"
        assert (
            published.projection_bank.fingerprint in written.text and record["teacher"]["fingerprint"] in written.text
        )
        assert ("This is step 4 of 8" in written.text) == (step == 4)
        assert f"{record['student_flops']:.3g}" in written.text
        AutoModelForMaskedLM.from_pretrained(folder / place)


def test_nothing_that_is_written_names_the_teachers_folder(published):
    assert published.teacher.name.endswith("/secret-place/big-teacher")  # what messages say
    files = [path for path in Path(published.args.output_dir).rglob("*") if path.is_file()]
    assert any("events.out" in path.name for path in files)
    assert [path for path in files if b"secret-place" in path.read_bytes()] == []
    record = json.loads(Path(published.args.output_dir, "curriculum.json").read_text())
    assert record["teacher"]["name"] == "big-teacher" and record["teacher"]["revision"] is None
    assert "`big-teacher`, which is not on the Hub" in card(published.args.output_dir).text


def test_the_time_of_a_resumed_run_is_that_of_its_parts(published):
    folder = Path(published.args.output_dir)
    paths = [folder / "checkpoint-4" / "curriculum.json", folder / "curriculum.json"]
    first, last = (json.loads(path.read_text())["train_seconds"] for path in paths)
    assert 0 < first < last == published._totals.seconds


def test_a_card_can_be_given_more_and_keeps_what_a_user_wrote(published):
    path = Path(published.args.output_dir, "README.md")
    path.write_text(path.read_text() + "\nMine.\n")
    published.create_model_card(license="mit", tags="bees", dataset_tags="nyu-mll/glue", dataset_args="cola")
    published.save_model()
    data, text = card(path.parent).data, card(path.parent).text
    assert data.license == "mit" and data.datasets == ["nyu-mll/glue"] and "bees" in data.tags
    assert text.endswith("\nMine.\n") and text.count("## Stages") == 1


def test_a_student_that_was_not_trained_has_a_card(config, student, teacher, examples, tmp_path):
    trainer = CurriculumDistillationTrainer(student, config(), train_dataset=examples, teacher_model=teacher)
    trainer.save_model(tmp_path / "there")
    assert "The student was not evaluated." in card(tmp_path / "there").text


def test_an_adapters_card_has_pefts_metadata_and_ours(config, student, teacher, examples):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(student, peft.LoraConfig(target_modules=["query"], r=2))
    trainer = CurriculumDistillationTrainer(student, config(), train_dataset=examples, teacher_model=teacher)
    for _ in range(2):
        trainer.save_model()
        data, text = card(trainer.args.output_dir).data, card(trainer.args.output_dir).text
        assert data.library_name == "peft" and {"distillation", "lora"} <= {*data.tags}
        assert text.count("- PEFT") == 1 and text.count("## Stages") == 1


def test_without_a_teacher_the_card_is_trainers(tmp_path, student, examples):
    cards = []
    for number, cls in enumerate([Trainer, CurriculumDistillationTrainer]):
        args = TrainingArguments(str(tmp_path / str(number) / "out"), report_to="none", use_cpu=True)
        trainer = cls(student, args, train_dataset=examples)
        trainer.save_model()
        assert not Path(args.output_dir, "README.md").exists()
        trainer.create_model_card(license="mit", tags=["bees"], model_name="me", finetuned_from=None)
        cards.append(Path(args.output_dir, "README.md").read_text())
    assert cards[0] == cards[1] and re.search("generated automatically", cards[0])
