"""The teacher only computes targets: frozen, in eval mode, without gradients, from its own inputs alone."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES, build
from conftest import tiny_bert
from transformers import BertForMaskedLM

from hf_curriculum_distill.layers.weights import weights_fingerprint
from hf_curriculum_distill.teachers.checkpoints import CheckpointTeacher
from hf_curriculum_distill.teachers.teacher import Teacher


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "wav2vec2", "mixtral"])
def test_a_frozen_teacher_computes_what_the_model_does_in_eval_mode(name):
    model, _, batch = build(name)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(**batch).logits
    teacher = Teacher(model.train())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    hidden, logits = teacher(batch, [1, 3], logits=True)
    torch.testing.assert_close(logits, expected.flatten(0, -2), rtol=1e-5, atol=1e-6)
    assert hidden.keys() == {1, 3}
    assert not any(tensor.requires_grad for tensor in (*hidden.values(), logits))
    assert teacher(batch, [1])[1] is None


def test_a_teachers_output_can_be_the_target_of_a_loss():
    model, _, batch = build("bert")
    hidden, _ = Teacher(model)(batch, [1])
    student = torch.zeros_like(hidden[1], requires_grad=True)
    ((student - hidden[1]) ** 2).sum().backward()
    assert torch.equal(student.grad, -2 * hidden[1])


def test_a_teacher_that_someone_puts_into_training_mode_meanwhile_is_refused_until_it_is_put_back():
    model, _, batch = build("bert")
    teacher = Teacher(model)
    expected = teacher(batch, [1])[0][1]
    model.train()
    with pytest.raises(RuntimeError, match=r"put into training mode after the trainer had got it.* call its eval\(\)"):
        teacher(batch, [1])
    model.eval()
    assert torch.equal(teacher(batch, [1])[0][1], expected)


def test_inputs_the_teacher_lacks_are_dropped():
    model, _, batch = build("distilbert")
    teacher = Teacher(model)
    extra = batch | {"token_type_ids": torch.ones_like(batch["input_ids"]), "anything": torch.ones(1)}
    assert torch.equal(teacher(extra, [3])[0][3], teacher(batch, [3])[0][3])


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_the_teacher_keeps_no_cache(name):
    model, _, batch = build(name)
    caches = []

    def watch(module, args, out):
        caches.append(out.cache if hasattr(out, "cache") else out.past_key_values)  # the new name, the old one

    model.get_decoder().register_forward_hook(watch)
    Teacher(model)(batch, logits=True)
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
    assert Teacher(model, "folder").name == "folder"
    assert Teacher(model).name == "BertForMaskedLM"
    model.config._name_or_path = "somewhere"
    assert Teacher(model).name == "somewhere"


def test_a_bank_notes_a_teacher_of_the_hub_by_its_name_and_a_folder_by_its_weights_alone(tmp_path):
    model = tiny_bert(2)
    unnamed = {"fingerprint": weights_fingerprint(model), "name": None, "revision": None}
    assert Teacher(model).identity == unnamed
    model.save_pretrained(tmp_path)
    local = BertForMaskedLM.from_pretrained(tmp_path)
    assert Teacher(local, str(tmp_path)).identity == Teacher(local).identity == unnamed
    model.config._name_or_path, model.config._commit_hash = "org/teacher", "c0ffee"  # as from_pretrained sets them
    assert Teacher(model).identity == unnamed | {"name": "org/teacher", "revision": "c0ffee"}


def test_a_record_names_a_teacher_of_the_hub_as_it_is_and_a_folder_by_its_last_part(tmp_path):
    def origin(name, revision=None, base=None):
        model = tiny_bert(1)
        model.config._name_or_path, model.config._commit_hash = base or name or "", revision
        teacher = Teacher(model, name)
        assert teacher.origin["fingerprint"] == teacher.fingerprint
        return teacher.origin["name"], teacher.origin["revision"]

    assert origin("google-bert/bert-base-uncased", "0a1b") == ("google-bert/bert-base-uncased", "0a1b")
    assert origin(str(tmp_path), "0a1b") == (tmp_path.name, None)  # a clone
    assert origin(f"{tmp_path}/") == (tmp_path.name, None)
    assert origin("runs/teacher") == ("teacher", None)  # may have been moved meanwhile
    assert origin(None) == ("BertForMaskedLM", None)
    assert origin(str(tmp_path), "0a1b", "org/base") == (tmp_path.name, None)  # an adapter
    assert origin(f"{tmp_path}/checkpoint-1, {tmp_path}/checkpoint-2") == ("checkpoint-1, checkpoint-2", None)


def test_a_bank_is_measured_on_the_last_of_several_checkpoints(tmp_path):
    models = {str(tmp_path / f"checkpoint-{step}"): tiny_bert(2, seed=step) for step in (1, 2)}
    teacher = CheckpointTeacher(list(models), models.get, "step")
    last = weights_fingerprint(tiny_bert(2, seed=2))
    assert teacher.identity["fingerprint"] == last == Teacher(tiny_bert(2, seed=2)).identity["fingerprint"]
    assert teacher.fingerprint != last  # which says that all checkpoints are the same
