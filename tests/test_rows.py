"""Every task, by what a row of its logits is: against losses written out by hand, then trained, resumed and reloaded.

One student and one teacher of each task go through a layer stage and a logit stage with labels.
"""

import math
import os

import pytest
import torch
import transformers as hf
from conftest import VOCAB_SIZE, assert_same_weights, tiny_bert, weights
from torch.utils.data import default_collate

from hf_curriculum_distill import CurriculumDistillationTrainer

STAGES = [{"hidden": [[1, 2]], "until": 3}, {"kl_weight": 1.0, "label_weight": 0.5}]


def texts(count, *shape):
    """Random tokens; every third text ends in padding."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for index in range(count):
        ids = torch.randint(5, VOCAB_SIZE, (*shape, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[..., 9 - index % 3 :] = 0
        data.append({"input_ids": ids, "attention_mask": mask})
    return data


def multi_label():
    labels = [torch.tensor([index % 2, index // 2 % 2, 1.0]) for index in range(16)]
    return [text | {"labels": one} for text, one in zip(texts(16), labels, strict=True)]


def one_number():
    return [text | {"labels": torch.tensor(index / 4 - 2)} for index, text in enumerate(texts(16))]


def numbers():
    return [text | {"labels": torch.tensor([index / 4, -index, 0.5])} for index, text in enumerate(texts(16))]


def spans():
    return [
        text | {"start_positions": torch.tensor(index % 4), "end_positions": torch.tensor(index % 4 + index % 3)}
        for index, text in enumerate(texts(16))
    ]


def choices():
    return [text | {"labels": torch.tensor(index % 3)} for index, text in enumerate(texts(16, 3))]


TASKS = {
    "multi-label": (
        hf.BertForSequenceClassification,
        "AutoModelForSequenceClassification",
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        multi_label,
    ),
    "a number": (hf.BertForSequenceClassification, "AutoModelForSequenceClassification", {"num_labels": 1}, one_number),
    "numbers": (
        hf.BertForSequenceClassification,
        "AutoModelForSequenceClassification",
        {"num_labels": 3, "problem_type": "regression"},
        numbers,
    ),
    "question answering": (hf.BertForQuestionAnswering, "AutoModelForQuestionAnswering", {}, spans),
    "multiple choice": (hf.BertForMultipleChoice, "AutoModelForMultipleChoice", {}, choices),
}
CLASSES = [name for name in TASKS if "number" not in name]


def pair(task, **config):
    model_class, _, kind, _ = TASKS[task]
    fields = kind | config | {"model_class": model_class}
    return tiny_bert(2, seed=1, **fields), tiny_bert(4, width=24, seed=2, initializer_range=0.3, **fields)


def make(task, args, trainer_class=CurriculumDistillationTrainer, **config):
    student, teacher = pair(task, **config)
    data = TASKS[task][3]()
    return trainer_class(student, args, train_dataset=data, eval_dataset=data[:6], teacher_model=teacher)


# ---- the slow reference: one example, one row, one class at a time ----


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a)


def rows_of(task, outputs, example, index):
    """Each row of an example as `(logits of its classes, label)`; a number is its own logit."""
    if task == "question answering":
        return [
            (outputs[f"{end}_logits"][index].tolist(), int(example[f"{end}_positions"])) for end in ("start", "end")
        ]
    logits, labels = outputs.logits[index].tolist(), example["labels"].view(-1).tolist()
    if task == "multi-label":
        return [([0.0, logit], int(label)) for logit, label in zip(logits, labels, strict=True)]
    if task == "multiple choice":
        return [(logits, labels[0])]
    return [(logit, label) for logit, label in zip(logits, labels, strict=True)]


def by_hand(task, student, teacher, data, temperature=1.0):
    """Mean divergence, mean label loss, accuracy and agreement over all rows."""
    student, teacher, found = student.eval(), teacher.eval(), []
    inputs = {n: v for n, v in default_collate(data).items() if "label" not in n and "positions" not in n}
    with torch.no_grad():
        ours, theirs = student(**inputs), teacher(**inputs)
    for index, example in enumerate(data):
        pairs = zip(rows_of(task, ours, example, index), rows_of(task, theirs, example, index), strict=True)
        for (logits, label), (target, _) in pairs:
            if isinstance(logits, float):
                found.append([(logits - target) ** 2, (logits - label) ** 2])
                continue
            probabilities = [(torch.tensor(x).double() / temperature).softmax(0).tolist() for x in (target, logits)]
            own = torch.tensor(logits).double().log_softmax(0)
            divergence = temperature**2 * kl(*probabilities)
            first = max(range(len(logits)), key=logits.__getitem__)
            best = max(range(len(target)), key=target.__getitem__)
            found.append([divergence, -own[label].item(), first == label, first == best])
    return torch.tensor(found, dtype=torch.float64).mean(0).tolist()


@pytest.mark.parametrize("task", TASKS)
def test_divergence_label_loss_and_metrics_are_those_by_hand(config, task):
    trainer = make(task, config(stages=STAGES[1:], max_steps=1, per_device_train_batch_size=16, learning_rate=0.0))
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    divergence, label_loss, *metrics = by_hand(task, trainer.model, trainer.teacher.model, TASKS[task][3]())
    name = "kl" if metrics else "output_mse"
    assert log[name] == pytest.approx(divergence, rel=1e-4)
    assert log["label_loss"] == pytest.approx(label_loss, rel=1e-4)
    assert log["loss"] == pytest.approx(divergence + 0.5 * label_loss, rel=1e-4)

    evaluated = trainer.evaluate()
    divergence, label_loss, *metrics = by_hand(task, trainer.model, trainer.teacher.model, TASKS[task][3]()[:6])
    # in the mean over batches of Trainer, each has the same number of rows
    assert evaluated["eval_loss"] == pytest.approx(label_loss, rel=1e-4)
    assert evaluated[f"eval_{name}"] == pytest.approx(divergence, rel=1e-4)
    if metrics:
        assert [evaluated["eval_accuracy"], evaluated["eval_agreement"]] == pytest.approx(metrics)


@pytest.mark.parametrize("task", TASKS)
def test_one_stage_with_labels_alone_is_plain_training(config, task, tmp_path):
    fields = {"max_steps": 4, "learning_rate": 1e-2}
    ours = make(task, config(method="labels", **fields))
    ours.train()
    student, _ = pair(task)
    args = config("plain", config_class=hf.TrainingArguments, **fields)
    hf.Trainer(student, args, train_dataset=TASKS[task][3]()).train()
    assert_same_weights(weights(ours.model), weights(student), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}], ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_is_resumed_ends_as_if_never_interrupted_and_loads_without_the_library(config, task, fields):
    whole = make(task, config("whole", stages=STAGES, max_steps=6, save_strategy="steps", save_steps=2, **fields))
    whole.train()
    args = config("whole", stages=STAGES, max_steps=6, save_strategy="steps", save_steps=2, **fields)
    resumed = make(task, args)
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-4"))
    assert_same_weights(weights(resumed.model), weights(whole.model))
    resumed.save_model()
    loaded = getattr(hf, TASKS[task][1]).from_pretrained(args.output_dir)
    assert type(loaded) is TASKS[task][0]
    assert_same_weights(weights(loaded), weights(whole.model))


@pytest.mark.parametrize("task", TASKS)
def test_a_cache_gives_back_what_was_matched(config, task, tmp_path):
    fields = {"stages": STAGES, "max_steps": 6, "teacher_cache_logits": None, "per_device_train_batch_size": 8}
    plain, cached = make(task, config(**fields)), make(task, config(**fields, teacher_cache=str(tmp_path / "cache")))
    plain.train()
    cached.train()
    name = "output_mse" if "number" in task else "kl"
    for one, other in zip(plain.state.log_history, cached.state.log_history, strict=True):
        for key in {name, "label_loss", "hidden_mse"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=2e-2)  # states are kept in bfloat16


@pytest.mark.parametrize("task", TASKS)
def test_hidden_states_alone_are_matched_at_every_token_that_is_no_padding(config, task):
    trainer = make(
        task,
        config(method="hidden", layer_order="last", max_steps=1, learning_rate=0.0, per_device_train_batch_size=16),
    )
    trainer.train()
    data, error, count = TASKS[task][3](), 0.0, 0
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert [stage.name for stage in trainer.stages] == ["layer 2"]
    for example in data:
        ids, mask = (example[name].view(-1, 9) for name in ("input_ids", "attention_mask"))
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
            ours, theirs = (m.eval().bert(**inputs).hidden_states for m in (trainer.model, trainer.teacher.model))
        target = trainer.projection_bank.project(2, theirs[4])
        for text, length in enumerate(mask.sum(1).tolist()):
            for token in range(length):
                error += (ours[2][text, token] - target[text, token]).square().mean().item()
                count += 1
    assert log["hidden_mse"] == pytest.approx(error / count, rel=1e-4)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "hard"])
@pytest.mark.parametrize("task", CLASSES)
def test_every_divergence_is_taken_over_the_classes_of_a_row(config, task, divergence):
    trainer = make(task, config(method="one_shot", divergence=divergence, max_steps=2))
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_a_temperature_softens_each_class_of_a_multi_label_classifier(config):
    args = config(method="one_shot", temperature=3.0, max_steps=1, per_device_train_batch_size=16, learning_rate=0.0)
    trainer = make("multi-label", args)
    trainer.train()
    expected, *_ = by_hand("multi-label", trainer.model, trainer.teacher.model, multi_label(), temperature=3.0)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(expected, rel=1e-4)


def test_an_online_teacher_learns_its_own_task(config):
    for task in TASKS:
        trainer = make(task, config(method="online", max_steps=1, per_device_train_batch_size=16))
        _, expected, *_ = by_hand(task, trainer.teacher.model, trainer.teacher.model, TASKS[task][3]())
        trainer.train()
        assert trainer.state.log_history[0]["teacher_loss"] == pytest.approx(expected, rel=1e-4)


# ---- what cannot be meant ----


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": 2.0}, r"temperature is 2\.0, but the student predicts numbers, .*squared error"),
        ({"divergence": "reverse_kl"}, r"divergence is 'reverse_kl', but the student predicts numbers"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor is 0\.1, but the student predicts numbers"),
    ],
)
def test_numbers_have_no_distribution(config, fields, message):
    with pytest.raises(ValueError, match=message):
        make("a number", config(**fields))
    make("a number", config(**fields | {"method": "hidden"}))


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("multi-label", lambda labels: labels.long(), r"labels are torch.int64 .* needs floats of shape \[4, 3\]"),
        ("multi-label", lambda labels: labels[:2], r"needs floats of shape \[4, 3\]"),
        ("multi-label", lambda labels: labels / 2, r"labels are other numbers than 0 and 1"),
        (
            "a number",
            lambda labels: labels.long(),
            r"labels are torch.int64 of shape \(4,\); Bert.* floats of shape \[4\]",
        ),
        ("a number", lambda labels: labels / 0, r"labels are nan or inf"),
        ("multiple choice", lambda labels: labels + 1, r"labels hold 3, but the model knows 0 to 2"),
        ("multiple choice", lambda labels: labels.float(), r"needs whole numbers of shape \[4\]"),
    ],
)
def test_labels_of_another_kind_are_refused_before_the_first_step(config, task, change, message):
    trainer = make(task, config())
    trainer.train_dataset = [example | {"labels": change(example["labels"])} for example in trainer.train_dataset]
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_positions_of_another_kind_are_refused_before_the_first_step(config):
    trainer = make("question answering", config())
    data = [{n: v for n, v in example.items() if n != "end_positions"} for example in trainer.train_dataset]
    trainer.train_dataset = data
    with pytest.raises(ValueError, match="end_positions are a NoneType; BertForQuestionAnswering needs whole numbers"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_texts_of_choices_have_a_dimension_for_them(config):
    trainer = make("multiple choice", config())
    trainer.train_dataset = [example | {"input_ids": example["input_ids"][0]} for example in trainer.train_dataset]
    with pytest.raises(ValueError, match=r"token numbers of shape \[batch, choices, length\] are needed"):
        trainer.train()


@pytest.mark.parametrize("student, teacher", [({"num_labels": 3}, "multi-label"), ({"num_labels": 3}, "numbers")])
def test_rows_that_mean_different_things_are_refused(config, student, teacher):
    student = tiny_bert(2, model_class=hf.BertForSequenceClassification, **student)
    with pytest.raises(
        ValueError,
        match=r"but the student has .* problem_type=None, so that a row of their logits is .*, and a class\.",
    ):
        CurriculumDistillationTrainer(student, config(), train_dataset=multi_label(), teacher_model=pair(teacher)[1])
