"""Before the first step, two examples show whether a training will have every output that its stages need."""

import pytest
import torch
import torch.nn.functional as F
from batches.test_checks import Shifted, models
from conftest import masked_lm_examples, tiny_bert
from torch.utils.data import default_collate
from transformers import BertForMaskedLM, BertForSequenceClassification, ViTConfig, ViTForMaskedImageModeling

from hf_curriculum_distill import CurriculumDistillationTrainer, ProjectionBank, Stage
from hf_curriculum_distill.batches.batch import BatchReader
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.objective import Objective
from hf_curriculum_distill.preparing.trial import relative_error, try_out
from hf_curriculum_distill.teachers.teacher import Teacher

ALL = [Stage(hidden=[[1, 2]], until=1), Stage(hidden=[[2, 4]], kl_weight=1.0, label_weight=0.5)]


class WholeSequence(BertForMaskedLM):
    """Its logits depend on how many positions the head sees."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask=attention_mask)
        outputs["logits"] = outputs.logits - outputs.logits.mean((0, 1))
        return outputs


@pytest.mark.parametrize("fields", [{"method": "one_shot"}, {"method": "labels"}, {}], ids=str)
def test_labels_that_mean_something_else_are_refused_before_the_first_step(config, examples, fields):
    student, teacher = models(Shifted)
    trainer = CurriculumDistillationTrainer(student, config(**fields), train_dataset=examples, teacher_model=teacher)
    with pytest.raises(ValueError, match=r"The loss of Shifted on a batch is .* but the cross-entropy .*Match hidden"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_head_that_sees_more_than_its_row_is_refused_before_the_first_step(config, examples):
    student, teacher = models(WholeSequence)
    examples = [{name: value for name, value in example.items() if name != "labels"} | {} for example in examples]
    data = [example | {"labels": torch.where(torch.arange(12) % 3 == 0, 7, -100)} for example in examples]
    trainer = CurriculumDistillationTrainer(
        student, config(method="one_shot"), train_dataset=data, teacher_model=teacher
    )
    with pytest.raises(ValueError, match="The logits of WholeSequence for the rows that count alone are others"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_head_without_logits_is_refused_before_the_first_step(config):
    def vit(depth):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 16}
        return ViTForMaskedImageModeling(ViTConfig(num_hidden_layers=depth, patch_size=8, encoder_stride=8, **sizes))

    data = [{"pixel_values": torch.randn(3, 16, 16), "bool_masked_pos": torch.tensor([True, False, True, False])}] * 8
    trainer = CurriculumDistillationTrainer(vit(2), config(), train_dataset=data, teacher_model=vit(4))
    with pytest.raises(ValueError, match="ViTForMaskedImageModeling returns no logits"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_classifiers_own_loss_is_the_one_of_its_examples(config, examples):
    kind = {"model_class": BertForSequenceClassification, "num_labels": 3}
    data = [example | {"labels": torch.tensor(index % 3)} for index, example in enumerate(examples)]
    student, teacher = tiny_bert(2, seed=1, **kind), tiny_bert(4, seed=2, **kind)
    args = config(method="one_shot", label_loss_weight=1.0, max_steps=1)
    CurriculumDistillationTrainer(student, args, train_dataset=data, teacher_model=teacher).train()


def tried(config, student, teacher, stages=ALL, size=6, **changes):
    """Try a pair of models out on masked-LM examples; `changes` replace inputs of the batch."""
    args, partial = config(), PartialForward(student)
    source, pairs = teacher and Teacher(teacher), [pair for stage in stages for pair in stage.hidden]
    if pairs:
        width = source.partial_forward.hidden_size
        bank = ProjectionBank.create(pairs, [partial.hidden_size] * len(pairs), [width] * len(pairs))
        source.prepare(bank.freeze())
    read = BatchReader(partial, source and source.partial_forward, args)
    batch = read(default_collate(masked_lm_examples(size)) | changes)
    return try_out(Objective(partial, args), source, read, batch, stages)


def test_models_of_one_task_pass_and_are_left_as_they_were(config, student, teacher):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    tried(config, student, teacher)
    assert student.training and not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize("size", [1, 2, 7])
def test_only_the_two_examples_with_the_most_labels_run(config, student, teacher, size):
    seen = []
    for model in (student, teacher):
        model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    tried(config, student, teacher, size=size)
    batch = default_collate(masked_lm_examples(size))
    numbers = batch["labels"].ne(-100).sum(1)
    for ids in seen:
        chosen = [next(i for i, row in enumerate(batch["input_ids"]) if torch.equal(row, one)) for one in ids]
        assert len(set(chosen)) == len(ids) == min(2, size)
        rest = [number for i, number in enumerate(numbers.tolist()) if i not in chosen]
        assert numbers[chosen].min() >= max(rest, default=0)
    assert len(seen) == 3  # the student's own forward, its forward for the rows that count, the teacher's


def test_a_batch_that_cannot_be_split_runs_whole(config, student, teacher):
    seen = []
    student.register_forward_pre_hook(lambda _, args, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True)
    tried(config, student, teacher, return_dict=True)
    assert set(seen) == {6}


@pytest.mark.parametrize("model_class", [Shifted, WholeSequence])
def test_a_student_is_refused_iff_a_stage_needs_its_logits_and_is_in_training_mode_either_way(config, model_class):
    student, teacher = models(model_class)
    stages = [Stage(hidden=[[1, 2], [2, 4]])]
    tried(config, student, teacher, stages)
    assert student.training
    with pytest.raises(ValueError, match=f"The lo(ss|gits) of {model_class.__name__} .*Match hidden states only"):
        tried(config, student, teacher)
    assert student.training


def test_a_teacher_of_other_classes_is_refused_iff_its_logits_are_matched(config, student):
    teacher = tiny_bert(4, vocab_size=53)
    tried(config, student, teacher, [Stage(hidden=[[1, 2]], label_weight=1.0)])
    with pytest.raises(
        ValueError, match=r"logits have shape \((\d+), 50\) and the teacher's \(\1, 53\) \(rows, classes\)"
    ):
        tried(config, student, teacher)


def test_a_teacher_of_other_positions_is_refused(config, student):
    class OneMore(BertForMaskedLM):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(F.pad(input_ids, (1, 0)), F.pad(attention_mask, (1, 0), value=1))

    with pytest.raises(ValueError, match=r"attention_mask has shape .* but the hidden states"):
        tried(config, student, tiny_bert(4, model_class=OneMore), [Stage(hidden=[[1, 2]])])


def test_no_teacher_is_needed_where_none_teaches(config, student):
    tried(config, student, None, [Stage(label_weight=1.0)])


@pytest.mark.parametrize("fields", [{}, {"bf16": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_error_to_expect_is_large_iff_anything_is_computed_in_half_precision(config, student, fields, dtype):
    half = bool(fields) or dtype in (torch.bfloat16, torch.float16)
    assert (relative_error(config(**fields), student.to(dtype)) > 1e-3) == half


def test_a_quantised_student_runs_once_in_training_mode_and_is_not_compared(config, teacher):
    student = tiny_bert(2, seed=1, model_class=WholeSequence)
    student.hf_quantizer = object()  # as transformers marks quantised models
    modes = []
    student.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    tried(config, student, teacher)
    assert modes == [True]
