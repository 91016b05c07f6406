"""The teacher only answers: frozen, in eval mode, without gradients, its own inputs alone."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, build
from conftest import tiny_bert
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from hf_curriculum_distill.loading import check_teacher, load_teacher
from hf_curriculum_distill.teachers import FrozenTeacher, weights_fingerprint


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "wav2vec2", "mixtral"])
def test_a_frozen_teacher_answers_as_the_model_in_eval_mode(name):
    model, _, batch = build(name)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(**batch).logits
    teacher = FrozenTeacher(model.train())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    hidden, logits = teacher(batch, [1, 3], logits=True)
    torch.testing.assert_close(logits, expected.flatten(0, -2), rtol=1e-5, atol=1e-6)
    assert hidden.keys() == {1, 3}
    assert not any(tensor.requires_grad for tensor in (*hidden.values(), logits))
    assert teacher(batch, [1])[1] is None


def test_an_answer_can_be_the_target_of_a_loss():
    model, _, batch = build("bert")
    hidden, _ = FrozenTeacher(model)(batch, [1])
    student = torch.zeros_like(hidden[1], requires_grad=True)
    ((student - hidden[1]) ** 2).sum().backward()
    assert torch.equal(student.grad, -2 * hidden[1])


def test_a_teacher_that_someone_puts_into_training_mode_meanwhile_is_refused_until_it_is_put_back():
    model, _, batch = build("bert")
    teacher = FrozenTeacher(model)
    expected = teacher(batch, [1])[0][1]
    model.train()
    with pytest.raises(RuntimeError, match=r"put into training mode after the trainer had got it.* call its eval\(\)"):
        teacher(batch, [1])
    model.eval()
    assert torch.equal(teacher(batch, [1])[0][1], expected)


def test_inputs_the_teacher_lacks_are_dropped():
    model, _, batch = build("distilbert")
    teacher = FrozenTeacher(model)
    extra = batch | {"token_type_ids": torch.ones_like(batch["input_ids"]), "anything": torch.ones(1)}
    assert torch.equal(teacher(extra, [3])[0][3], teacher(batch, [3])[0][3])


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_the_teacher_keeps_no_cache(name):
    model, _, batch = build(name)
    caches = []

    def watch(module, args, out):
        caches.append(out.cache if hasattr(out, "cache") else out.past_key_values)  # the new name, the old one

    model.get_decoder().register_forward_hook(watch)
    FrozenTeacher(model)(batch, logits=True)
    assert caches == [None]
    model(**batch, use_cache=True)
    assert caches[1] is not None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fingerprint_changes_with_any_parameter_and_nothing_else(name):
    model, _, batch = build(name)
    before = weights_fingerprint(model)
    model.eval()(**batch)
    assert weights_fingerprint(copy.deepcopy(model).requires_grad_(False)) == before
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.01)  # what a training step does: every entry moves
        assert weights_fingerprint(model) != before
        parameter.data = kept
    assert weights_fingerprint(model) == before


def test_a_teacher_is_known_by_name():
    model = tiny_bert(2)
    assert FrozenTeacher(model, "folder").name == "folder"
    assert FrozenTeacher(model).name == "BertForMaskedLM"
    model.config._name_or_path = "somewhere"
    assert FrozenTeacher(model).name == "somewhere"


# ---- loading ----


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
def test_a_teacher_is_loaded_in_the_dtype_asked_for(dtype, tmp_path):
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
def test_models_that_answer_the_same_question_fit(student, teacher):
    check_teacher(student, teacher)


def test_labels_in_another_order_do_not_fit():
    with pytest.raises(ValueError, match=r"label2id is \{'good': 0, 'bad': 1\} and the teacher's \{'bad': 0"):
        check_teacher(classifier(**named("good", "bad")), classifier(**named("bad", "good")))
