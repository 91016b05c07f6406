"""What is said before it is tried: the labels' loss against the model's own, stages that train nothing, batches."""

import logging

import pytest
import torch
from conftest import masked_lm_examples, tiny_bert
from torch.utils.data import default_collate
from transformers import (
    BertForMaskedLM,
    BertModel,
    YolosConfig,
    YolosForObjectDetection,
)

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer
from hf_curriculum_distill.batches.batch import BatchReader
from hf_curriculum_distill.batches.checks import label_loss_mismatch
from hf_curriculum_distill.layers.forward import PartialForward

HIDDEN = [{"hidden": [[1, 2], [2, 4]]}]


class Shifted(BertForMaskedLM):
    """Its own loss compares position `i` with label `i + 1`, which nothing but the loss says."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask=attention_mask)
        if labels is not None:
            logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            outputs["loss"] = torch.nn.functional.cross_entropy(logits, labels)
        return outputs


def models(model_class, **config):
    return tiny_bert(2, seed=1, model_class=model_class, **config), tiny_bert(4, seed=2, model_class=model_class)


def read(model, inputs):
    return BatchReader(PartialForward(model), None, CurriculumDistillationConfig())(inputs)


def test_the_loss_of_the_rows_that_count_is_the_models_own_and_otherwise_both_numbers_are_said():
    batch = default_collate(masked_lm_examples(8))
    model = tiny_bert(2).eval()
    assert label_loss_mismatch(read(model, batch), model(**batch), 1e-4) is None
    shifted = tiny_bert(2, model_class=Shifted).eval()
    outputs = shifted(**batch)
    ours = model(**batch).loss  # the same weights
    said = label_loss_mismatch(read(shifted, batch), outputs, 1e-4)
    assert f"The loss of Shifted on a batch is {outputs.loss:.6g}" in said
    assert f"the labels that count is {ours:.6g}" in said


@pytest.mark.parametrize("scale", [1, 1 + 1e-3, 1 - 1e-3, 2])
def test_a_loss_is_the_models_own_iff_it_is_within_rounding(scale):
    batch, model = default_collate(masked_lm_examples(8)), tiny_bert(2).eval()
    outputs = model(**batch)
    outputs["loss"] = outputs.loss * scale
    assert (label_loss_mismatch(read(model, batch), outputs, 1e-4) is None) == (scale == 1)
    assert (label_loss_mismatch(read(model, batch), outputs, 2**-6) is None) == (scale != 2)


def test_where_only_hidden_states_are_matched_evaluations_warn_once_and_leave_the_comparison_out(
    config, examples, caplog
):
    student, teacher = models(Shifted)
    args = config(stages=HIDDEN, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = CurriculumDistillationTrainer(
        student, args, train_dataset=examples, eval_dataset=examples[:8], teacher_model=teacher
    )
    with caplog.at_level(logging.WARNING, "hf_curriculum_distill"):
        trainer.train()
    assert [r.message.startswith("The loss of Shifted") for r in caplog.records].count(True) == 1
    metrics = trainer.evaluate()
    batch = default_collate(examples[:8])
    assert metrics["eval_loss"] == pytest.approx(student(**batch).loss.item(), rel=1e-5)
    assert not {"eval_accuracy", "eval_agreement", "eval_kl"} & metrics.keys()


@pytest.mark.parametrize("fields", [{}, {"method": "one_shot"}, {"layer_order": "last"}], ids=str)
def test_a_student_without_logits_is_refused_at_construction(config, examples, fields):
    student, teacher = models(BertModel)
    data = [{"input_ids": example["input_ids"]} for example in examples]
    with pytest.raises(ValueError, match=r"BertModel has no head.* 'kl'.*AutoModelFor"):
        CurriculumDistillationTrainer(student, config(**fields), train_dataset=data, teacher_model=teacher)
    trainer = CurriculumDistillationTrainer(
        student, config(stages=HIDDEN, max_steps=2), train_dataset=data, teacher_model=teacher
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_labels_of_any_kind_are_nobodys_business_where_no_loss_reads_them(config):
    def yolos(depth):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": [16, 16]}
        return YolosForObjectDetection(
            YolosConfig(num_hidden_layers=depth, patch_size=8, num_detection_tokens=3, **sizes)
        )

    def collate(examples):
        return {n: [e[n] for e in examples] if n == "labels" else torch.stack([e[n] for e in examples]) for n in keys}

    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    keys = ("pixel_values", "labels")
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": box} for _ in range(8)]
    arguments = {"train_dataset": data, "data_collator": collate, "teacher_model": yolos(4)}
    trainer = CurriculumDistillationTrainer(yolos(2), config(stages=HIDDEN, max_steps=2), **arguments)
    trainer.train()
    assert trainer.state.global_step == 2
    trainer = CurriculumDistillationTrainer(yolos(2), config(), **arguments)
    with pytest.raises(ValueError, match="labels are a list; class numbers of shape"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("error", [ValueError, TypeError, IndexError, RuntimeError])
def test_an_error_of_a_model_itself_names_the_batch_already_in_the_calibration(config, examples, error):
    class Needy(BertForMaskedLM):
        def forward(self, input_ids, attention_mask=None, labels=None):
            if labels is None:
                raise error("labels should be passed")
            return super().forward(input_ids, attention_mask=attention_mask, labels=labels)

    student, teacher = models(Needy)
    trainer = CurriculumDistillationTrainer(student, config(), train_dataset=examples, teacher_model=teacher)
    with pytest.raises(ValueError, match=r"^The batch of the calibration sample cannot .*: labels should be passed$"):
        trainer.train()


# ---- too few steps ----


@pytest.mark.parametrize("layers, max_steps, fraction, needed", [(3, 4, 0.5, 6), (12, 10, 0.5, 24), (1, 2, 0.9, 6)])
def test_too_few_steps_for_the_layer_stages_are_said_in_the_users_words(
    config, examples, layers, max_steps, fraction, needed
):
    student, teacher = tiny_bert(layers), tiny_bert(layers, seed=1)
    fields = {"layer_stage_fraction": fraction, "num_layer_stages": layers}
    with pytest.raises(
        ValueError, match=rf"^{layers} layer stages in .* % of {max_steps} steps.*max_steps >= {needed};"
    ):
        CurriculumDistillationTrainer(
            student, config(max_steps=max_steps, **fields), train_dataset=examples, teacher_model=teacher
        )
    CurriculumDistillationTrainer(
        student, config(max_steps=needed, **fields), train_dataset=examples, teacher_model=teacher
    )
