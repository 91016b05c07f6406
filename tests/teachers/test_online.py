"""An online teacher learns as it would alone, and teaches what it knows so far; a labels-only student as if alone."""

import copy
import itertools
import json
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB_SIZE, assert_same_weights, tiny_bert, weights
from safetensors.torch import load_file
from torch.utils.data import default_collate
from transformers import (
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from hf_curriculum_distill import CurriculumDistillationTrainer

LABELS = [{"label_weight": 1.0}]
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05}
SAVED = {"save_strategy": "steps", "save_steps": 2}


def step_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def untimed(log_history):
    timed = ("runtime", "per_second", "train_loss")
    return [{name: value for name, value in log.items() if not name.endswith(timed)} for log in log_history]


@pytest.fixture
def run(config, examples):
    """Train a student beside a teacher: `run(student, teacher, optim="sgd")`."""

    def run(student, teacher, folder="run", resume_from=None, callbacks=(), **fields):
        trainer = CurriculumDistillationTrainer(
            student,
            config(folder, **{"method": "online", "max_steps": 5} | fields),
            train_dataset=examples,
            eval_dataset=examples[:8],
            teacher_model=teacher,
            callbacks=list(callbacks),
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    return run


# ---- the teacher learns ----


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1, "label_smoothing_factor": 0.1},
        {**SGD, "max_grad_norm": 0.0, "bf16": True},
        {"restart_schedule_per_stage": True, "stage_warmup_ratio": 0.0, "lr_scheduler_type": "cosine"},  # one stage
    ],
    ids=["default", "accumulated and clipped", "warm-up", "sgd", "restarts"],
)
def test_a_teacher_learns_beside_a_student_what_it_learns_alone_to_the_bit(run, student, teacher, fields):
    alone = run(copy.deepcopy(teacher), None, "alone", stages=LABELS, **fields | {"method": "curriculum"})
    beside = run(student, teacher, "beside", eval_strategy="steps", eval_steps=3, **fields)
    assert_same_weights(weights(teacher), weights(alone.model))
    for ours, expected in zip(step_logs(beside), step_logs(alone), strict=True):
        assert ours["teacher_loss"] == expected["label_loss"]


@pytest.mark.parametrize("task", ["next token", "class", "translation"])
def test_every_kind_of_teacher_learns_what_it_learns_alone(config, examples, task):
    def build(depth, seed):
        torch.manual_seed(seed)
        if task == "class":
            kind = {"model_class": BertForSequenceClassification, "num_labels": 3}
            return tiny_bert(depth, seed=seed, initializer_range=0.3, **kind)
        sizes = {"vocab_size": VOCAB_SIZE, "num_layers": depth, "num_heads": 2, "d_model": 16}
        if task == "translation":
            more = {"num_decoder_layers": 2, "d_kv": 8, "d_ff": 32, "dropout_rate": 0.0, "decoder_start_token_id": 0}
            return T5ForConditionalGeneration(T5Config(**sizes, **more))
        sizes = {"vocab_size": VOCAB_SIZE, "n_layer": depth, "n_head": 2, "n_embd": 16, "n_positions": 16}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, **off))

    data = examples
    if task == "class":
        data = [example | {"labels": torch.tensor(index % 3)} for index, example in enumerate(examples)]
    fields = {"max_steps": 3, "gradient_accumulation_steps": 2, "weight_decay": 0.1, **SGD}
    alone = CurriculumDistillationTrainer(build(3, 2), config("alone", stages=LABELS, **fields), train_dataset=data)
    beside = CurriculumDistillationTrainer(
        build(2, 1), config("beside", method="online", **fields), train_dataset=data, teacher_model=build(3, 2)
    )
    alone.train(), beside.train()
    # a teacher keeps no cache, a decoder that trains as a student does: other kernels, other last bits
    assert_same_weights(weights(beside.teacher.model), weights(alone.model), rtol=1e-4, atol=1e-5)
    assert all(log["kl"] > 0 for log in step_logs(beside))


def test_a_teacher_has_a_learning_rate_of_its_own(run, student, teacher):
    untaught, fields = copy.deepcopy(student), {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.5}
    alone = run(copy.deepcopy(teacher), None, "alone", stages=LABELS, learning_rate=7e-3, **fields)
    beside = run(student, teacher, "beside", teacher_learning_rate=7e-3, learning_rate=1e-3, **fields)
    assert_same_weights(weights(teacher), weights(alone.model))
    assert max(log["learning_rate"] for log in step_logs(beside)) == 1e-3
    run(untaught, None, "labels", stages=LABELS, learning_rate=1e-3, **fields)
    assert any(not torch.equal(tensor, student.state_dict()[name]) for name, tensor in weights(untaught).items())


def test_a_teacher_drops_out_while_it_learns_and_not_while_it_teaches(run, student):
    modes = []
    teacher = tiny_bert(4, width=24, dropout=0.3, seed=2)
    teacher.register_forward_pre_hook(lambda *_: modes.append((teacher.training, torch.is_grad_enabled())))
    run(student, teacher, max_steps=3, gradient_accumulation_steps=2)
    teaches, learns = (False, False), (True, True)
    # the first batch is tried, then measured, with all its rows and with one: as a student's teacher, then as a learner
    assert modes[:5] == [teaches] * 5
    assert modes[5:] == [teaches, learns] * 6
    assert not teacher.training


def test_what_is_frozen_in_the_teacher_stays_frozen(run, student, teacher):
    for frozen in (teacher.bert.embeddings, teacher.bert.encoder.layer[0]):
        frozen.requires_grad_(False)
    before, alone = weights(teacher), copy.deepcopy(teacher)
    run(alone, None, "alone", stages=LABELS, weight_decay=0.5)
    run(student, teacher, "beside", weight_decay=0.5)
    assert_same_weights(weights(teacher), weights(alone))
    for name, parameter in teacher.named_parameters():
        still = name.startswith(("bert.embeddings", "bert.encoder.layer.0."))
        assert parameter.requires_grad != still
        assert torch.equal(parameter, before[name]) == still or "key.bias" in name, name


def test_the_optimizer_of_the_student_has_no_part_of_the_teacher(run, student, teacher):
    trainer = run(student, teacher)
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in student.parameters()}
    assert not any(module is teacher for module in trainer.model.modules())
    assert "forward" not in student.__dict__ | teacher.__dict__
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- the student learns ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_step_is_taught_by_the_teacher_before_its_own_step(run, student, teacher, examples, accumulation):
    ours, theirs = copy.deepcopy(student), copy.deepcopy(teacher)
    fields = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "temperature": 2.0}
    trainer = run(
        student,
        teacher,
        learning_rate=0.5,
        teacher_learning_rate=0.2,
        label_loss_weight=0.25,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_steps=4,
        **fields,
    )
    optimizers = [torch.optim.SGD(ours.parameters(), lr=0.5), torch.optim.SGD(theirs.parameters(), lr=0.2)]
    for step, log in enumerate(step_logs(trainer)):
        batch = default_collate(examples[4 * accumulation * step : 4 * accumulation * (step + 1)])
        rows = batch["labels"] != -100
        student_logits, teacher_logits = (model(**batch).logits[rows] for model in (ours, theirs))
        target = (teacher_logits.detach() / 2.0).softmax(-1)
        kl = 4.0 * (target * (target.log() - (student_logits / 2.0).log_softmax(-1))).sum(-1).mean()
        label_loss, teacher_loss = (F.cross_entropy(x, batch["labels"][rows]) for x in (student_logits, teacher_logits))
        (kl + 0.25 * label_loss).backward()
        teacher_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, term in (("kl", kl), ("label_loss", label_loss), ("teacher_loss", teacher_loss)):
            assert log[name] == pytest.approx(term.item(), rel=1e-4), (name, step)
        assert log["loss"] == pytest.approx((kl + 0.25 * label_loss).item(), rel=1e-4)
    assert_same_weights(weights(student), weights(ours), rtol=1e-3, atol=1e-5)
    assert_same_weights(weights(teacher), weights(theirs), rtol=1e-3, atol=1e-5)


def test_layer_stages_match_a_teacher_that_moves_if_nothing_is_standardised(config, run, student, teacher, examples):
    stages = [{"hidden": [[1, 2]], "until": 3}, {"kl_weight": 1.0}]
    with pytest.raises(
        ValueError, match=r"standardize_targets would measure them before it has learnt .* set standard"
    ):
        run(student, teacher, stages=stages)
    alone = run(copy.deepcopy(teacher), None, "alone", stages=LABELS)
    taught = []

    class Recorder(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            taught.append(weights(teacher)["bert.encoder.layer.1.output.dense.weight"])

    trainer = run(student, teacher, "beside", stages=stages, standardize_targets=False, callbacks=[Recorder()])
    assert_same_weights(weights(teacher), weights(alone.model))
    assert [log["stage"] for log in step_logs(trainer)] == [0] * 3 + [1] * 2
    assert all("teacher_loss" in log and ("hidden_mse" in log) == (log["stage"] == 0) for log in step_logs(trainer))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(taught))


def test_evaluation_compares_with_the_teacher_of_that_step(run, student, teacher):
    trainer = run(student, teacher, eval_strategy="steps", eval_steps=1, learning_rate=0.0, teacher_learning_rate=0.01)
    assert len({log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log}) == 5
    assert len({log["eval_loss"] for log in trainer.state.log_history if "eval_kl" in log}) == 1


# ---- files and resuming ----


@pytest.fixture
def saved(run, student, teacher):
    """A run that saved the teacher beside the student, and the folder it did it in."""
    trainer = run(student, teacher, **SAVED, save_total_limit=2)
    return trainer, trainer.args.output_dir


def test_the_teacher_is_saved_beside_the_students_checkpoints_as_a_plain_model(saved, student, teacher):
    _, folder = saved
    assert sorted(os.listdir(os.path.join(folder, "_teacher"))) == ["checkpoint-4", "checkpoint-5"]  # rotated
    assert sorted(name for name in os.listdir(folder) if "checkpoint" in name) == ["checkpoint-4", "checkpoint-5"]
    last = os.path.join(folder, "_teacher", "checkpoint-5")
    assert {"config.json", "model.safetensors", "optimizer.safetensors"} <= set(os.listdir(last))
    assert {os.path.splitext(name)[1] for name in os.listdir(last)} <= {".json", ".safetensors"}
    loaded, info = AutoModelForMaskedLM.from_pretrained(last, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(weights(loaded), weights(teacher))
    of_student = load_file(os.path.join(folder, "checkpoint-5", "model.safetensors"))
    for name, tensor in of_student.items():
        assert torch.equal(tensor, student.state_dict()[name])
    assert not [file for file in os.listdir(os.path.join(folder, "checkpoint-5")) if "teacher" in file]


def test_a_run_that_saves_only_models_saves_no_teacher(run, student, teacher):
    trainer = run(student, teacher, **SAVED, save_only_model=True)
    assert not os.path.exists(os.path.join(trainer.args.output_dir, "_teacher"))


def test_an_online_teachers_checkpoints_teach_another_student_progressively(run, saved):
    folder = os.path.join(saved[1], "_teacher")
    trainer = run(tiny_bert(2, seed=3), folder, "another", method="progressive")
    assert [os.path.basename(name) for name in trainer.teacher.name.split(", ")] == ["checkpoint-4", "checkpoint-5"]
    assert trainer.evaluate()["eval_kl"] > 0


@pytest.mark.parametrize(
    "fields",
    [{"weight_decay": 0.1, "max_grad_norm": 0.5}, SGD | {"gradient_accumulation_steps": 2}],
    ids=["adamw", "momentum"],
)
def test_a_resumed_run_is_one_that_was_never_interrupted(run, fields):
    def both(resume_from=None):
        student, teacher = tiny_bert(2, dropout=0.1, seed=1), tiny_bert(3, width=24, dropout=0.1, seed=2)
        schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 4, "teacher_learning_rate": 2e-3}
        trainer = run(
            student, teacher, resume_from=resume_from, save_strategy="steps", save_steps=1, **schedule | fields
        )
        return weights(student), weights(teacher), untimed(trainer.state.log_history), trainer.args.output_dir

    expected = both()
    for step in (3, 1):
        actual = both(os.path.join(expected[3], f"checkpoint-{step}"))
        assert_same_weights(actual[0], expected[0])
        assert_same_weights(actual[1], expected[1])
        assert actual[2] == expected[2]


def test_resuming_without_the_teachers_folder_says_what_is_missing(run, saved):
    folder = saved[1]
    os.rename(os.path.join(folder, "_teacher"), os.path.join(folder, "lost"))
    original = tiny_bert(4, width=24, seed=2, initializer_range=0.3)
    missing = r"_teacher/checkpoint-4/config.json, .*_teacher/checkpoint-4/optimizer.safetensors is missing"
    with pytest.raises(FileNotFoundError, match=rf"checkpoint-4 is not whole: .*{missing}"):
        run(tiny_bert(2, seed=1), original, resume_from=os.path.join(folder, "checkpoint-4"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"teacher_learning_rate": 0.5}, r"settings\.teacher_learning_rate changed from None to 0\.5"),
        ({"method": "one_shot"}, "method changed from 'online' to 'one_shot'"),
    ],
)
def test_resuming_another_run_says_what_changed(run, saved, fields, message):
    original = tiny_bert(4, width=24, seed=2, initializer_range=0.3)
    with pytest.raises(ValueError, match=message):
        run(tiny_bert(2, seed=1), original, resume_from=os.path.join(saved[1], "checkpoint-4"), **fields)


# ---- what it costs ----


def closed_form(depth, width, length, labelled):
    """Operations of a tiny BERT's forward pass on `length` tokens, of which `labelled` have a label."""
    tokens, rows = length, labelled
    block = 4 * width**2 + 2 * width * 2 * width + 2 * 12 * width  # an example has 12 tokens
    return 2 * (tokens * depth * block + rows * (width**2 + width * VOCAB_SIZE))


@pytest.mark.parametrize("method", ["online", "one_shot", "labels"])
def test_operations_are_those_of_every_forward_and_backward_pass(run, student, teacher, examples, method):
    trainer = run(student, teacher, method=method, max_steps=1, per_device_train_batch_size=64)
    labelled = sum((example["labels"] != -100).sum().item() for example in examples)
    forward = [closed_form(depth, width, 64 * 12, labelled) for depth, width in ((2, 16), (4, 24))]
    log = step_logs(trainer)[0]
    assert log["student_flops"] == pytest.approx(3 * forward[0], rel=1e-6)
    # the targets' forward pass, and a forward and a backward pass of its training
    assert log["teacher_flops"] == pytest.approx(
        {"online": 4, "one_shot": 1, "labels": 0}[method] * forward[1], rel=1e-6
    )


# ---- refused ----


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"teacher_dtype": "bfloat16"}, "teacher_dtype is 'bfloat16', but method='online' trains the teacher"),
        ({"teacher_dtype": "float16"}, "teacher_dtype is 'float16', but method='online' trains the teacher"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
            "method='online' needs a schedule that is a function of the step, .* 'reduce_lr_on_plateau'",
        ),
        ({"fp16": True}, "method='online' with fp16 has no loss scaling for the teacher; use bf16 or fp32"),
    ],
)
def test_what_an_online_teacher_cannot_learn_with_is_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(method="online", **fields)
    config(method="one_shot", **fields)


def test_an_online_teacher_of_low_precision_learns_in_float32(run, student, teacher, tmp_path):
    teacher.bfloat16().save_pretrained(tmp_path / "teacher")
    trainer = run(student, tmp_path / "teacher", max_steps=2)
    assert {parameter.dtype for parameter in trainer.teacher.model.parameters()} == {torch.float32}
    assert trainer.teacher.name == str(tmp_path / "teacher")


@pytest.mark.parametrize("stages", [None, LABELS], ids=["kl", "labels"])
def test_a_teacher_whose_loss_is_not_finite_is_named(run, student, teacher, stages):
    with pytest.raises(
        FloatingPointError, match=r"teacher_loss is (nan|inf) in stage 1 of 1 \((kl|labels)\) at step 2"
    ):
        run(student, teacher, stages=stages, optim="sgd", max_grad_norm=0.0, teacher_learning_rate=1e30)


def test_a_teacher_without_labels_cannot_learn(config, student, teacher, examples):
    unlabelled = [{name: example[name] for name in ("input_ids", "attention_mask")} for example in examples]
    trainer = CurriculumDistillationTrainer(
        student, config(method="online"), train_dataset=unlabelled, teacher_model=teacher
    )
    with pytest.raises(ValueError, match="An online teacher learns from labels, but the batch has none"):
        trainer.train()


# ---- nobody teaches ----


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_labels_alone_are_trained_as_if_there_were_no_teacher(run, teacher, dropout):
    trainers, calls = [], []
    teacher.register_forward_pre_hook(lambda *_: calls.append(trainers))
    before = weights(teacher)
    fields = {"gradient_accumulation_steps": 2, "weight_decay": 0.1}
    for folder, given, chosen in (("labels", teacher, {"method": "labels"}), ("alone", None, {"stages": LABELS})):
        trainers.append(run(tiny_bert(2, dropout=dropout, seed=1), given, folder, **fields | chosen))
    assert not calls
    assert_same_weights(weights(trainers[0].model), weights(trainers[1].model))
    assert_same_weights(weights(teacher), before)
    assert untimed(trainers[0].state.log_history) == untimed(trainers[1].state.log_history)
    assert all(log["teacher_flops"] == 0 < log["student_flops"] for log in step_logs(trainers[0]))
    assert [stage.name for stage in trainers[0].stages] == ["labels"]
    assert trainers[0].projection_bank is None
    metrics = [trainer.evaluate() for trainer in trainers]
    assert calls
    assert {"eval_agreement", "eval_kl"} == metrics[0].keys() - metrics[1].keys()
    assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"]
    trainers[0].save_model()
    with open(os.path.join(trainers[0].args.output_dir, "curriculum.json")) as file:
        assert json.load(file)["method"] == "labels"
    assert isinstance(AutoModelForMaskedLM.from_pretrained(trainers[0].args.output_dir), BertForMaskedLM)
