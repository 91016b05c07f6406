"""What cannot work is refused when the trainer is built, with what was given and what is needed."""

import copy
import os

import pytest
import torch
from conftest import STUDENT_DEPTH, TEACHER_DEPTH, VOCAB_SIZE, masked_lm_examples, tiny_bert
from transformers import (
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    TrainingArguments,
    XLMConfig,
    XLMWithLMHeadModel,
)

from hf_curriculum_distill import CurriculumDistillationTrainer, ProjectionBank


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(masked_lm_examples(8))


@pytest.fixture
def build(config, student, teacher, examples):
    """Build the trainer with one thing changed."""

    def build(args=None, **changes):
        fields = {name: changes.pop(name) for name in list(changes) if name not in TRAINER_ARGUMENTS}
        arguments = {"model": student, "train_dataset": examples, "teacher_model": teacher} | changes
        return CurriculumDistillationTrainer(args=args or config(**fields), **arguments)

    return build


TRAINER_ARGUMENTS = (
    "model",
    "train_dataset",
    "teacher_model",
    "projection_bank",
    "processing_class",
    "compute_loss_func",
    "model_init",
)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method": "curiculum"}, r"method is 'curiculum'; use one of 'curriculum', 'one_shot'"),
        ({"divergence": "kl"}, r"divergence is 'kl'; use one of 'forward_kl', 'reverse_kl', 'jensen_shannon'"),
        ({"projection": "learned"}, r"projection is 'learned'; use one of 'gaussian', 'rademacher'"),
        ({"layer_order": "random"}, r"layer_order is 'random'; use one of 'sequential'"),
        ({"layer_map": "first"}, r"layer_map is 'first'; use one of 'uniform', 'last'"),
        ({"temperature": 0.0}, r"temperature is 0.0; it must be a number between 0 and inf \(0 excluded\)"),
        ({"temperature": -1.0}, r"temperature is -1.0"),
        (
            {"stages": [{"hidden": [[1, 1]], "until": 6}, {"hidden": [[2, 2]], "until": 4}, {"kl_weight": 1.0}]},
            r"stages\[1\].until is 4 \(step 4 of 8\) but stages\[0\] ends at 6; boundaries must increase",
        ),
        (
            {"stages": [{"hidden": [[1, 1]], "until": 8}, {"kl_weight": 1.0}]},
            r"stages\[0\].until is 8 \(step 8\) but max_steps is 8",
        ),
        ({"stages": [{"hidden": [[1, 1]]}, {"kl_weight": 1.0}]}, r"stages\[0\].until is missing"),
        ({"stages": [{"kl_weight": 1.0, "until": 4}]}, r"The last stage has until=4"),
        ({"stages": []}, r"list of stages is empty"),
        (
            {"max_steps": 2},
            r"2 layer stages in 50 % of 2 steps.* need max_steps >= 4; raise it, .*or use layer_order='last'",
        ),
        ({"stages": [{"hidden": [[3, 1]]}]}, r"student layer 3, but the student has 2 blocks"),
        ({"stages": [{"hidden": [[1, 5]]}]}, r"teacher layer 5, but the teacher has 4 blocks"),
        ({"layer_map": [[1, 2], [2, 7]]}, r"teacher layer 7, but the teacher has 4 blocks"),
        ({"layer_map": [[2, 4], [1, 2]]}, r"\(2, 4\) before \(1, 2\); a layer map must increase"),
        ({"layer_map": [[1, 4], [2, 2]]}, r"\(1, 4\) before \(2, 2\); a layer map must increase"),
        ({"layer_map": []}, r"layer_map is an empty list"),
        ({"num_layer_stages": 3}, r"num_layer_stages is 3, .* between 1 and 2 layers"),
        (
            {"stages": [{"hidden": [[1, 1]], "until": 2}, {"hidden": [[1, 2]], "until": 4}, {"kl_weight": 1.0}]},
            r"name a student layer twice",
        ),
        ({"train_dataset": []}, r"train_dataset is empty"),
        ({"train_dataset": Stream(), "max_steps": -1}, r"max_steps"),
        ({"compute_loss_func": lambda *args, **kwargs: 0}, r"compute_loss_func was given together with teacher_model"),
        ({"teacher_model": None, "stages": [{"kl_weight": 1.0}]}, r"stages\[0\] \(kl\) matches a teacher, but no"),
        (
            {"teacher_model": None, "stages": [{"hidden": [[1, 1]], "until": 2}, {"label_weight": 1.0}]},
            r"stages\[0\] \(layer 1\) matches a teacher, but no teacher_model was given",
        ),
        ({"teacher_model": torch.nn.Linear(2, 2)}, r"teacher_model is a Linear; pass a PreTrainedModel"),
        ({"teacher_model": ["a", "b"]}, r"list of 2 checkpoints, but method is 'curriculum'; one teacher is needed"),
        (
            {"teacher_model": [tiny_bert(1)], "method": "progressive"},
            r"teacher_model is a list; pass a PreTrainedModel",
        ),
        (
            {"method": "online", "stages": [{"hidden": [[1, 2]]}]},
            r"standardize_targets would measure them before it has learnt anything; set standardize_targets=False",
        ),
        (
            {"method": "online", "stages": [{"hidden": [[1, 2]]}], "standardize_targets": False, "projection": "pca"},
            r"'pca' projection are measured on the teacher before the first step, but the teacher changes while it",
        ),
        ({"hidden_positions": "masked"}, r"hidden_positions is 'masked'; use one of 'tokens', 'labels'"),
        ({"hidden_weight": 0.0}, r"hidden_weight is 0.0; it must be a number between 0 and inf \(0 excluded\)"),
        ({"teacher_schedule": "steps"}, r"teacher_schedule is 'steps'; use one of 'step', 'fraction'"),
        ({"teacher_schedule": [4, 1.5]}, r"teacher_schedule has 1.5; write a number of steps from 1, or a fraction"),
        ({"teacher_learning_rate": 0.0}, r"teacher_learning_rate is 0.0; it must be a number between 0 and inf"),
        ({"method": "one_shot", "projection_bank": ProjectionBank.create([(1, 2)], [16], [24])}, r"no stage matches"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(build, fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)


def test_a_bank_without_a_teacher_is_refused(build):
    with pytest.raises(ValueError, match="projection_bank was given without teacher_model"):
        build(teacher_model=None, projection_bank=ProjectionBank.create([(1, 2)], [16], [24]))


def test_a_method_without_a_teacher_is_the_models_own_loss(build):
    for method in ("progressive", "online", "labels"):
        trainer = build(teacher_model=None, method=method)
        assert trainer.teacher is None and trainer.stages == []


@pytest.mark.parametrize("method", ["progressive", "online"])
def test_a_missing_teacher_is_an_oserror_whoever_teaches(build, tmp_path, method):
    with pytest.raises(OSError, match="nothing-here"):
        build(teacher_model=tmp_path / "nothing-here", method=method)


@pytest.mark.parametrize("method", ["progressive", "online", "labels"])
def test_a_teacher_of_another_vocabulary_is_refused_whoever_teaches(build, tmp_path, method):
    other = tiny_bert(4, vocab_size=VOCAB_SIZE + 3)
    other.save_pretrained(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=rf"vocabulary has {VOCAB_SIZE} entries and the teacher's {VOCAB_SIZE + 3}"):
        build(teacher_model=tmp_path if method == "progressive" else other, method=method)


def test_a_student_cannot_be_its_own_online_teacher(build, student):
    with pytest.raises(ValueError, match="shares parameters with the student"):
        build(teacher_model=student, method="online")


@pytest.mark.parametrize(
    "bank",
    [
        ProjectionBank.create([(1, 2), (2, 4)], [16, 16], [32, 32]),
        ProjectionBank.create([(1, 2), (2, 4)], [8, 16], [24, 24]),
        ProjectionBank.create([(1, 2), (2, 3)], [16, 16], [24, 24]),
        ProjectionBank.create([(1, 2)], [16], [24]),
    ],
    ids=["teacher's width", "student's width", "other pair", "pair missing"],
)
def test_a_bank_for_other_models_is_refused(build, bank):
    with pytest.raises(ValueError, match=r"projection bank does not fit: layer pairs .* need \[16, 24\] matrices"):
        build(projection_bank=bank)


def test_vocabularies_that_differ_are_refused_with_both_sizes(build):
    with pytest.raises(ValueError, match=rf"vocabulary has {VOCAB_SIZE} entries and the teacher's {VOCAB_SIZE + 3}"):
        build(teacher_model=tiny_bert(4, vocab_size=VOCAB_SIZE + 3))


def test_tokenizers_that_differ_are_refused(build, teacher, tmp_path):
    words = [f"word{number}" for number in range(VOCAB_SIZE - 5)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizers = []
    for name, ordered in (("same", words), ("other", words[::-1])):
        (tmp_path / name).write_text("\n".join([*special, *ordered]))
        tokenizers.append(BertTokenizerFast(str(tmp_path / name)))
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizers[0].save_pretrained(tmp_path / "teacher")
    build(teacher_model=tmp_path / "teacher", processing_class=tokenizers[0])
    with pytest.raises(ValueError, match="map tokens to different ids"):
        build(teacher_model=tmp_path / "teacher", processing_class=tokenizers[1])


def test_a_missing_teacher_is_an_oserror(build, tmp_path):
    with pytest.raises(OSError, match="nothing-here"):
        build(teacher_model=tmp_path / "nothing-here")


def test_a_teacher_without_a_head_is_refused(build, teacher, tmp_path):
    BertModel(teacher.config, add_pooling_layer=False).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"has no weights for cls\.predictions.*these would be random"):
        build(teacher_model=tmp_path / "headless")


@pytest.mark.parametrize("who", ["model", "teacher_model"])
def test_a_model_without_a_block_stack_is_refused(build, who):
    xlm = XLMWithLMHeadModel(XLMConfig(vocab_size=VOCAB_SIZE, emb_dim=16, n_layers=3, n_heads=2))
    with pytest.raises(ValueError, match="XLMWithLMHeadModel needs exactly one ModuleList of num_hidden_layers=3"):
        build(**{who: xlm})


def test_a_teacher_that_shares_parameters_is_refused(build, student):
    with pytest.raises(ValueError, match="shares parameters with the student"):
        build(teacher_model=student)
    teacher = tiny_bert(TEACHER_DEPTH, width=16, seed=3)
    teacher.bert.embeddings = student.bert.embeddings
    with pytest.raises(ValueError, match="shares parameters with the student"):
        build(teacher_model=teacher)


@pytest.mark.parametrize(
    "student_config, teacher_config, message",
    [
        ({"num_labels": 2}, {"num_labels": 3}, "The student has 2 labels and the teacher 3"),
        ({"num_labels": 1}, {"num_labels": 2}, "The student has 1 labels and the teacher 2"),
        (
            {"num_labels": 2},
            {"num_labels": 2, "problem_type": "multi_label_classification"},
            "The teacher has num_labels=2 and problem_type='multi_label_classification'",
        ),
        (
            {"label2id": {"good": 0, "bad": 1}, "id2label": {0: "good", 1: "bad"}},
            {"label2id": {"bad": 0, "good": 1}, "id2label": {0: "bad", 1: "good"}},
            "class numbers must mean the same",
        ),
    ],
)
def test_classes_that_differ_are_refused(build, student_config, teacher_config, message):
    pair = [
        tiny_bert(depth, model_class=BertForSequenceClassification, seed=depth, **fields)
        for depth, fields in ((STUDENT_DEPTH, student_config), (TEACHER_DEPTH, teacher_config))
    ]
    with pytest.raises(ValueError, match=message):
        build(model=pair[0], teacher_model=pair[1])


def test_a_refused_teacher_is_refused_with_plain_arguments_too(student, examples, tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=8, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="vocabulary"):
        CurriculumDistillationTrainer(
            student, args, train_dataset=examples, teacher_model=tiny_bert(4, vocab_size=VOCAB_SIZE + 1)
        )


def test_a_label_stage_without_labels_stops_at_its_first_batch(config, student):
    data = [{name: example[name] for name in ("input_ids", "attention_mask")} for example in masked_lm_examples(8)]
    trainer = CurriculumDistillationTrainer(student, config(stages=[{"label_weight": 1.0}]), train_dataset=data)
    with pytest.raises(ValueError, match="Stage 'labels' learns from labels, but the batch has none"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("logging_steps", [1, 3, 100])
@pytest.mark.parametrize("nan_inf_filter", [False, True])
def test_a_loss_that_is_not_finite_stops_naming_stage_and_step(
    config, student, teacher, examples, logging_steps, nan_inf_filter
):
    class Breaking(CurriculumDistillationTrainer):
        def training_step(self, model, inputs, *args):
            if self.state.global_step == 4:
                with torch.no_grad():
                    student.bert.embeddings.word_embeddings.weight.fill_(float("nan"))
            return super().training_step(model, inputs, *args)

    args = config(logging_steps=logging_steps, logging_nan_inf_filter=nan_inf_filter)
    trainer = Breaking(student, args, train_dataset=examples, teacher_model=teacher)
    step = {1: 5, 3: 6, 100: 8}[logging_steps]  # the first log that sees it
    with pytest.raises(FloatingPointError, match=rf"kl is nan in stage 3 of 3 \(kl\) at step {step}"):
        trainer.train()
    assert "forward" not in student.__dict__ | teacher.__dict__


def test_no_checkpoint_is_written_behind_a_loss_that_is_not_finite(config, student, teacher, examples):
    class Breaking(CurriculumDistillationTrainer):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            if self.state.global_step == 1:
                with torch.no_grad():
                    student.bert.encoder.layer[0].output.dense.weight.fill_(float("inf"))
            return loss

    args = config(logging_steps=100, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"hidden_mse is nan in stage \d of 3 \(layer \d\) at step 3"):
        Breaking(student, args, train_dataset=examples, teacher_model=teacher).train()
    assert "checkpoint-3" not in os.listdir(args.output_dir)


def test_an_evaluation_that_is_not_finite_stops(config, student, teacher, examples):
    trainer = CurriculumDistillationTrainer(
        student, config(), train_dataset=examples, eval_dataset=examples[:8], teacher_model=teacher
    )
    with torch.no_grad():
        student.cls.predictions.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="eval_loss is nan"):
        trainer.evaluate()


def test_a_teacher_that_is_not_finite_is_found_by_calibration(config, student, teacher, examples):
    trainer = CurriculumDistillationTrainer(student, config(), train_dataset=examples, teacher_model=teacher)
    with torch.no_grad():
        teacher.bert.encoder.layer[1].output.dense.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="hidden states at layer 2 are not finite"):
        trainer.train()


def test_a_refusal_changes_neither_model(build, student, teacher):
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError):
        build(stages=[{"hidden": [[9, 9]]}])
    assert "forward" not in student.__dict__ | teacher.__dict__
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
