"""`hf-curriculum-distill fidelity`: from two folders and a text to numbers and a page."""

import random

import pytest
import torch
from conftest import tiny_bert
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer
from hf_curriculum_distill.cli import main
from hf_curriculum_distill.options import TextOptions
from hf_curriculum_distill.report.fidelity_run import report_fidelity
from hf_curriculum_distill.tasks.documents import load_documents
from hf_curriculum_distill.tasks.text import MaskedBlocksCollator, pack_blocks
from report.test_page import Reader

WORDS = [f"w{number}" for number in range(30)]


@pytest.fixture
def tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="[SEP]", **dict(zip(names, special, strict=True)), model_max_length=32
    )


@pytest.fixture
def text(tmp_path):
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=20)) for _ in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return str(tmp_path / "text.txt")


def saved(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_distilled_students_report_is_its_evaluation(tmp_path, text, tokenizer, capsys):
    options = TextOptions(dataset=text, block_size=16, eval_blocks=8)
    train, heldout = (pack_blocks(each, tokenizer, 16) for each in load_documents(options))
    teacher = saved(tiny_bert(4, width=24, seed=2, initializer_range=0.3), tmp_path / "teacher", tokenizer)
    args = CurriculumDistillationConfig(
        str(tmp_path / "student"), max_steps=4, evaluate_layers=True, report_to="none", disable_tqdm=True, use_cpu=True
    )
    collator = MaskedBlocksCollator(tokenizer, fixed_count=True)
    trainer = CurriculumDistillationTrainer(
        tiny_bert(2), args, collator, train, heldout.select(range(8)), tokenizer, teacher_model=teacher
    )
    trainer.train()
    trainer.save_model()
    metrics, page = report_fidelity(
        TextOptions(student=args.output_dir, teacher=teacher, dataset=text, block_size=16, eval_blocks=8), 8, 3
    )
    evaluated = trainer.evaluate()
    names = [name for name in evaluated if name.endswith(("loss", "accuracy", "agreement", "kl", "_mse"))]
    assert len(names) == 6 and {name: metrics[name] for name in names} == pytest.approx(
        {name: evaluated[name] for name in names}, rel=1e-4
    )
    assert page.count(b'<div class="example">') == 3 and b"<mark" in page and not Reader(page).foreign
    html = tmp_path / "page.html"
    options = ["--dataset", text, "--length", "16", "--examples", "8", "--html", str(html)]
    main(["fidelity", args.output_dir, teacher, *options])
    printed = capsys.readouterr().out
    assert f"{evaluated['eval_kl']:.4f}" in printed and f"page: {html}" in printed and b"<mark" in html.read_bytes()


def test_a_causal_model_and_a_classifier_have_reports_too(tmp_path, text, tokenizer):
    def gpt(layers):
        torch.manual_seed(layers)
        return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=layers, n_head=2))

    names = {0: "bad", 1: "good"}
    (tmp_path / "labelled.csv").write_text(
        "text,label\n" + "".join(f"w{n % 30} w{n % 7},{names[n % 2]}\n" for n in range(60))
    )
    classifier = {"model_class": BertForSequenceClassification, "id2label": names, "label2id": {"bad": 0, "good": 1}}
    for models_of, data in (
        (gpt, text),
        (lambda layers: tiny_bert(layers, seed=layers, **classifier), str(tmp_path / "labelled.csv")),
    ):
        student, teacher = (saved(models_of(n), tmp_path / f"{data.rpartition('.')[2]}{n}", tokenizer) for n in (2, 4))
        options = TextOptions(student=student, teacher=teacher, dataset=data, block_size=16, eval_blocks=4)
        metrics, page = report_fidelity(options)
        assert {"eval_agreement", "eval_kl", "eval_ece", "eval_teacher_ece"} <= metrics.keys()
        assert page.count(b'<div class="example">') == 4 and (b"<mark" in page) == (data == text)


def test_other_tasks_are_refused_with_what_to_do(tmp_path, tokenizer):
    from transformers import BertForTokenClassification

    student = saved(tiny_bert(2, model_class=BertForTokenClassification), tmp_path / "student", tokenizer)
    with pytest.raises(ValueError, match=r"is a BertForTokenClassification, .*; of another model, measure_fidelity"):
        report_fidelity(TextOptions(student=student, teacher=student, dataset="none"))


def test_counts_are_checked(capsys):
    with pytest.raises(SystemExit):
        main(["fidelity", "a", "b", "--dataset", "c", "--examples", "0"])
    assert "--examples is 0; it must be at least 1." in capsys.readouterr().err


def test_a_student_that_is_not_there_is_said_to_be_the_student(tmp_path):
    path = str(tmp_path / "none")
    with pytest.raises(OSError, match=f"The student '{path}' cannot be loaded; name a model's folder or repository."):
        report_fidelity(TextOptions(student=path, teacher=path, dataset="none"))
