"""A teacher is loaded for the student's task, and its logits have the same meaning as the student's."""

import itertools
import os
import shutil
import socket

import huggingface_hub
import pytest
import torch
from architectures import build
from conftest import tiny_bert
from test_trainer import train
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
    ProcessorMixin,
)

from hf_curriculum_distill.layers.weights import weights_fingerprint
from hf_curriculum_distill.teachers.loading import check_teacher, load_teacher


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "bert-classifier", "bert-tagger", "gpt2", "t5", "vit", "wav2vec2", "llama-classifier"]
)
def test_a_teacher_is_loaded_for_the_students_task(name, tmp_path):
    model, _, _ = build(name)
    model.save_pretrained(tmp_path)
    student, _, _ = build(name, seed=1)
    loaded = load_teacher(str(tmp_path), student)
    assert type(loaded) is type(model)
    assert weights_fingerprint(loaded) == weights_fingerprint(model)


def test_a_teacher_of_another_architecture_is_loaded_for_the_same_task(tmp_path):
    build("roberta")[0].save_pretrained(tmp_path)
    assert type(load_teacher(str(tmp_path), build("bert")[0])).__name__ == "RobertaForMaskedLM"


def test_a_task_without_an_auto_class_loads_the_students_class(tmp_path):
    tiny_bert(2, model_class=BertForQuestionAnswering).save_pretrained(tmp_path)
    assert type(load_teacher(str(tmp_path), tiny_bert(1, model_class=BertForQuestionAnswering))) is (
        BertForQuestionAnswering
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_teacher_is_loaded_in_the_given_dtype(dtype, tmp_path):
    tiny_bert(2).save_pretrained(tmp_path)
    loaded = load_teacher(str(tmp_path), tiny_bert(1), dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("student_class", [BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification])
def test_a_checkpoint_without_the_tasks_head_is_refused(student_class, tmp_path):
    tiny_bert(2, model_class=BertModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for c.*; as a \w+ these would be random"):
        load_teacher(str(tmp_path), tiny_bert(1, model_class=student_class))


def test_a_head_of_another_size_is_refused(tmp_path):
    model = tiny_bert(2, model_class=BertForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path)
    model.config.num_labels = 5  # only a configuration that disagrees with its weights gets here
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for .*classifier"):
        load_teacher(str(tmp_path), tiny_bert(1, model_class=BertForSequenceClassification, num_labels=5))


def test_an_online_teacher_that_cannot_learn_is_refused(config, student, teacher, examples):
    with pytest.raises(ValueError, match="No parameter of the online teacher requires gradients"):
        train(student, teacher.requires_grad_(False), config(method="online"), examples)


# ---- fit with the student ----


def classifier(**config):
    return tiny_bert(1, model_class=BertForSequenceClassification, **config)


def named(*labels):
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


@pytest.mark.parametrize(
    "student, teacher",
    [
        (tiny_bert(1), tiny_bert(3, width=32)),
        (build("gpt2")[0], build("llama")[0]),
        (classifier(num_labels=3), classifier(num_labels=3)),
        (classifier(), classifier(**named("good", "bad"))),  # LABEL_0, LABEL_1 stand for anything
        (classifier(**named("good", "bad")), classifier()),
        (classifier(**named("good", "bad")), classifier(**named("good", "bad"))),
        (build("vit")[0], build("dinov2")[0]),
    ],
)
def test_models_of_the_same_task_fit(student, teacher):
    check_teacher(student, teacher)


def test_labels_in_another_order_do_not_fit():
    with pytest.raises(ValueError, match=r"label2id is \{'good': 0, 'bad': 1\} and the teacher's \{'bad': 0"):
        check_teacher(classifier(**named("good", "bad")), classifier(**named("bad", "good")))


def with_labels(id2label, label2id):
    """A classifier whose configuration a script has changed, as the official ones do, after the model was made."""
    model = classifier()
    model.config.id2label, model.config.label2id = id2label, label2id
    return model


DEFAULT = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
NUMBERS = {  # ways to call class 0 "0", class 1 "1"
    "ints": ({0: 0, 1: 1}, {0: 0, 1: 1}),
    "as a file says it": ({0: "0", 1: "1"}, {"0": 0, "1": 1}),
    "keys of words": ({"0": "0", "1": "1"}, {"0": "0", "1": "1"}),
    "only by number": ({0: 0, 1: 1}, None),
    "only by name": (DEFAULT[0], {"0": 0, "1": 1}),
    "in another order": ({1: "1", 0: "0"}, {"1": 1, "0": 0}),
}
WORDS = {
    "upper": ({0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}),
    "lower": ({0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}),
    "keys of words": ({"0": "Negative", "1": "Positive"}, None),
    "only by name": (DEFAULT[0], {"negative": "0", "positive": "1"}),
}
SWAPPED = {
    "ints": ({0: 1, 1: 0}, {1: 0, 0: 1}),
    "words": ({0: "POSITIVE", 1: "NEGATIVE"}, None),
    "only by name": (DEFAULT[0], {"positive": 0, "negative": 1}),
}


@pytest.mark.parametrize("names", [NUMBERS, WORDS], ids=["numbers", "words"])
def test_the_same_labels_fit_however_they_are_written(names):
    for one, other in itertools.product(names.values(), repeat=2):
        check_teacher(with_labels(*one), with_labels(*other))
    for one in names.values():
        check_teacher(with_labels(*one), with_labels(*DEFAULT))
        check_teacher(with_labels(*DEFAULT), with_labels(*one))


@pytest.mark.parametrize("one, other", [(NUMBERS, WORDS), (NUMBERS, SWAPPED), (WORDS, SWAPPED)])
def test_other_labels_do_not_fit_however_they_are_written(one, other):
    for first, second in itertools.product(one.values(), other.values()):
        with pytest.raises(ValueError, match=r"class numbers must mean the same\. Load both with the same id2label"):
            check_teacher(with_labels(*first), with_labels(*second))


def test_integer_labels_of_a_csv_are_saved_and_read_as_the_same(tmp_path):
    student = with_labels(*NUMBERS["ints"])  # as the official GLUE script has it from a CSV
    with_labels(*NUMBERS["ints"]).save_pretrained(tmp_path)
    check_teacher(student, load_teacher(str(tmp_path), student))


# ---- tokenizers ----


def tokenizer(words, *more):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = BertTokenizer({token: index for index, token in enumerate([*special, *words])})
    made.add_tokens(list(more))
    return made


WORDS_A_TO_H = list("abcdefgh")


@pytest.fixture
def with_tokenizer(tmp_path):
    """A teacher from a folder that holds a tokenizer."""
    tiny_bert(2).save_pretrained(tmp_path / "teacher")
    tokenizer(WORDS_A_TO_H).save_pretrained(tmp_path / "teacher")
    return BertForMaskedLM.from_pretrained(tmp_path / "teacher")


def test_a_tokenizer_is_compared_whether_the_teacher_is_named_or_in_memory(with_tokenizer):
    for name in (None, with_tokenizer.name_or_path):
        check_teacher(tiny_bert(1), with_tokenizer, tokenizer(WORDS_A_TO_H), name)
        for other in (WORDS_A_TO_H[::-1], WORDS_A_TO_H[:-1], ["z", *WORDS_A_TO_H[1:]]):
            with pytest.raises(ValueError, match=rf"tokenizer of {with_tokenizer.name_or_path} .* different ids"):
                check_teacher(tiny_bert(1), with_tokenizer, tokenizer(other), name)


def test_tokens_may_have_been_added_to_a_model_in_memory_but_not_to_one_that_is_named(with_tokenizer):
    more = tokenizer(WORDS_A_TO_H, "[NEW]")
    check_teacher(tiny_bert(1), with_tokenizer, more)
    with pytest.raises(ValueError, match="map tokens to different ids"):
        check_teacher(tiny_bert(1), with_tokenizer, more, with_tokenizer.name_or_path)


def test_the_tokenizer_of_a_processor_is_compared(with_tokenizer):
    processor = ProcessorMixin()
    processor.tokenizer = tokenizer(WORDS_A_TO_H[::-1])
    with pytest.raises(ValueError, match="map tokens to different ids"):
        check_teacher(tiny_bert(1), with_tokenizer, processor)


@pytest.mark.parametrize("origin", ["", "gone/folder", "/gone/folder", "a/b/c/d", "no name", "org/not-in-the-cache"])
def test_a_model_that_lies_nowhere_within_reach_has_no_tokenizer_to_compare(with_tokenizer, origin, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the network was used"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with_tokenizer.config._name_or_path = origin
    check_teacher(tiny_bert(1), with_tokenizer, tokenizer(WORDS_A_TO_H[::-1]))


def test_a_model_of_the_hub_has_the_tokenizer_in_its_cache(with_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("the network was used"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub/models--org--teacher/snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "teacher", snapshot)
    with_tokenizer.config._name_or_path, with_tokenizer.config._commit_hash = "org/teacher", "0" * 40
    check_teacher(tiny_bert(1), with_tokenizer, tokenizer(WORDS_A_TO_H))
    with pytest.raises(ValueError, match=r"tokenizer of org/teacher .* different ids"):
        check_teacher(tiny_bert(1), with_tokenizer, tokenizer(WORDS_A_TO_H[::-1]))


def test_a_tokenizer_that_cannot_be_read_is_left_out_with_a_warning(with_tokenizer, caplog):
    with open(os.path.join(with_tokenizer.name_or_path, "tokenizer.json"), "w") as file:
        file.write("{}")
    check_teacher(tiny_bert(1), with_tokenizer, tokenizer(WORDS_A_TO_H))
    assert f"tokenizer of {with_tokenizer.name_or_path} cannot be read" in caplog.text
