"""The contract's invariants, through the real trainer."""

import copy
import os
import random

import numpy as np
import pytest
import torch
from conftest import (
    STUDENT_DEPTH,
    TEACHER_DEPTH,
    VOCAB_SIZE,
    StrictBert,
    assert_same_weights,
    masked_lm_examples,
    tiny_bert,
    weights,
)
from safetensors.torch import load_file
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer, ProjectionBank

EVERY_TERM = [
    {"hidden": [[1, 2]], "until": 2},
    {"hidden": [[1, 2], [2, 4]], "hidden_weight": 0.5, "until": 4},
    {"kl_weight": 0.7, "label_weight": 0.3, "hidden": [[2, 4]], "hidden_weight": 2.0, "until": 6},
    {"label_weight": 1.0, "until": 7},
    {"kl_weight": 1.0},
]


def untimed(log_history):
    timed = ("runtime", "per_second")
    return [{name: value for name, value in log.items() if not name.endswith(timed)} for log in log_history]


def step_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def files_under(folder):
    return {os.path.relpath(os.path.join(root, file), folder) for root, _, files in os.walk(folder) for file in files}


def saved_names(model):
    """Names of a model's tensors as saved: tied ones once."""
    return set({tensor.data_ptr(): name for name, tensor in reversed(model.state_dict().items())}.values())


def tiny_llama(depth, seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": depth}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


# ---- 1 ----


@pytest.mark.parametrize("config_class", [TrainingArguments, CurriculumDistillationConfig])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_a_teacher_it_is_the_stock_trainer_to_the_bit(config, config_class, accumulation, examples):
    def run(folder, trainer_class, config_class):
        args = config(
            folder,
            config_class,
            save_strategy="steps",
            save_steps=3,
            eval_strategy="steps",
            eval_steps=4,
            weight_decay=0.1,
            gradient_accumulation_steps=accumulation,
            load_best_model_at_end=False,
        )
        student = tiny_bert(STUDENT_DEPTH, dropout=0.1, seed=1)
        trainer = trainer_class(student, args, train_dataset=examples, eval_dataset=examples[:8])
        result = trainer.train()
        trainer.save_model()
        optimizer = trainer.optimizer.state_dict()["state"]
        return weights(student), untimed(trainer.state.log_history), files_under(args.output_dir), optimizer, result

    expected = run("stock", Trainer, TrainingArguments)
    actual = run("ours", CurriculumDistillationTrainer, config_class)
    assert_same_weights(actual[0], expected[0])
    assert actual[1] == expected[1]
    assert actual[2] == expected[2]
    assert {"checkpoint-3/model.safetensors", "checkpoint-8/optimizer.pt", "model.safetensors"} <= actual[2]
    assert actual[3].keys() == expected[3].keys()
    for parameter, state in expected[3].items():
        assert all(torch.equal(actual[3][parameter][name], tensor) for name, tensor in state.items())
    assert actual[4].training_loss == expected[4].training_loss


def test_distillation_keeps_the_stock_data_order_and_dropout(config, student, teacher, examples):
    def run(folder, trainer_class, **kwargs):
        seen = []

        class Recording(trainer_class):
            def training_step(self, model, inputs, *args):
                states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
                seen.append((inputs["input_ids"].tolist(), states))
                return super().training_step(model, inputs, *args)

        args = config(folder, max_steps=20)
        Recording(copy.deepcopy(student), args, train_dataset=examples, **kwargs).train()
        return seen

    expected, actual = run("stock", Trainer), run("ours", CurriculumDistillationTrainer, teacher_model=teacher)
    assert len(expected) == 20  # more than an epoch
    assert actual == expected


# ---- 2 ----


@pytest.mark.parametrize(
    "batch_size, accumulation, model_class",
    [(4, 4, BertForMaskedLM), (8, 2, BertForMaskedLM), (1, 16, BertForMaskedLM), (4, 4, StrictBert)],
)
def test_accumulated_batches_have_the_loss_and_gradient_of_the_whole(
    config, teacher, examples, batch_size, accumulation, model_class
):
    student = tiny_bert(STUDENT_DEPTH, seed=1, model_class=model_class)

    def run(folder, batch_size, accumulation):
        args = config(
            folder,
            stages=EVERY_TERM,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=1e9,
        )
        trainer = CurriculumDistillationTrainer(
            copy.deepcopy(student), args, train_dataset=examples, teacher_model=copy.deepcopy(teacher)
        )
        trainer.train()
        return step_logs(trainer)

    whole, cut = run("whole", 16, 1), run("cut", batch_size, accumulation)
    assert [log["stage"] for log in whole] == [0, 0, 1, 1, 2, 2, 3, 4]
    terms = {"loss", "grad_norm", "hidden_mse", "kl", "label_loss"}
    for expected, actual in zip(whole, cut, strict=True):
        assert terms & actual.keys() == terms & expected.keys()
        for name in terms & expected.keys():
            assert actual[name] == pytest.approx(expected[name], rel=1e-3), (name, expected["step"])


def test_a_last_incomplete_accumulation_counts_what_it_has(config, student, teacher):
    examples = masked_lm_examples(10)  # batches of 4, 4, 2: the second optimizer step accumulates one batch
    losses = []
    for size, accumulation in ((4, 2), (8, 1)):
        args = config(
            f"{size}",
            stages=[{"hidden": [[1, 2]], "kl_weight": 1.0}],
            max_steps=-1,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
        )
        trainer = CurriculumDistillationTrainer(
            copy.deepcopy(student), args, train_dataset=examples, teacher_model=teacher
        )
        trainer.train()
        losses.append([(log["loss"], log["grad_norm"]) for log in step_logs(trainer)])
    assert len(losses[0]) == 2
    for whole, cut in zip(*losses, strict=True):
        assert cut == pytest.approx(whole, rel=1e-3)


# ---- 4 ----


@pytest.mark.parametrize("stage", [{"hidden": [[0, 0]]}, {"hidden": [[1, 2]]}, {"hidden": [[2, 4]]}])
@pytest.mark.parametrize("truncate", [True, False])
def test_a_layer_stage_leaves_everything_above_it_untouched(config, teacher, examples, stage, truncate):
    student = tiny_bert(3, seed=1)
    before = weights(student)
    args = config(stages=[stage], weight_decay=0.5, learning_rate=1e-2, truncate=truncate)
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher)
    trainer.train()

    top = stage["hidden"][0][0]
    above = ["cls.predictions.transform", "cls.predictions.bias"] + [f"bert.encoder.layer.{i}." for i in range(top, 3)]
    named = dict(student.named_parameters())
    untouched = {name for name in named if name.startswith(tuple(above))}
    assert untouched
    for name, parameter in named.items():
        if name in untouched:
            assert torch.equal(parameter, before[name]), name
            assert parameter not in trainer.optimizer.state
            assert parameter.grad is None
        else:
            assert not torch.equal(parameter, before[name]) or "key.bias" in name, name
            assert parameter in trainer.optimizer.state


# ---- 6 ----


def test_the_teacher_only_computes_targets(config, student, examples):
    teacher = tiny_bert(TEACHER_DEPTH, width=24, dropout=0.5, seed=2).train()
    before, modes = weights(teacher), []
    teacher.register_forward_pre_hook(lambda *_: modes.append((teacher.training, torch.is_grad_enabled())))
    args = config(
        stages=EVERY_TERM, save_strategy="steps", save_steps=2, weight_decay=0.5, eval_strategy="steps", eval_steps=3
    )
    trainer = CurriculumDistillationTrainer(
        student, args, train_dataset=examples, eval_dataset=examples[:8], teacher_model=teacher
    )
    student_names = saved_names(student)
    trainer.train()
    trainer.save_model()

    assert_same_weights(weights(teacher), before)
    assert modes and set(modes) == {(False, False)}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in student.parameters()}
    assert not any(module is teacher for module in trainer.model.modules())
    assert "forward" not in teacher.__dict__
    saved = {file for file in files_under(args.output_dir) if file.endswith((".safetensors", ".bin", ".pt", ".pth"))}
    assert {os.path.basename(file) for file in saved} == {
        "model.safetensors",
        "projection_bank.safetensors",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }
    for file in saved:
        if file.endswith("model.safetensors"):
            assert set(load_file(os.path.join(args.output_dir, file))) == student_names


# ---- 7 ----


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm", "classification"])
def test_a_label_stage_is_plain_training(config, task):
    data = masked_lm_examples(64)
    if task == "masked-lm":
        student = tiny_bert(2, seed=1)
    elif task == "causal-lm":
        student = tiny_llama(2, seed=1)
    else:
        student = tiny_bert(2, seed=1, model_class=BertForSequenceClassification, num_labels=3)
        data = [example | {"labels": torch.tensor(index % 3)} for index, example in enumerate(data)]

    def run(folder, trainer_class, student, **fields):
        args = config(folder, optim="sgd", learning_rate=0.1, max_grad_norm=1e9, **fields)
        trainer = trainer_class(student, args, train_dataset=data)
        trainer.train()
        return weights(student), [(log["loss"], log["grad_norm"]) for log in step_logs(trainer)]

    labels_only = {"stages": [{"label_weight": 1.0}]}
    expected = run("stock", Trainer, copy.deepcopy(student), per_device_train_batch_size=16)
    for size in (16, 4):  # 4 x 4: with stock masked-LM heads' accumulation corrected
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
        actual = run(f"ours{size}", CurriculumDistillationTrainer, copy.deepcopy(student), **labels_only, **cut)
        assert_same_weights(actual[0], expected[0], rtol=1e-4, atol=1e-5)
        for ours, stock in zip(actual[1], expected[1], strict=True):
            assert ours == pytest.approx(stock, rel=1e-3)


def test_a_label_stage_drops_out_what_plain_training_drops_out(config, examples):
    runs = []
    for trainer_class, fields in (
        (Trainer, {}),
        (CurriculumDistillationTrainer, {"stages": [{"label_weight": 1.0, "until": 4}, {"label_weight": 1.0}]}),
    ):
        student = tiny_bert(STUDENT_DEPTH, dropout=0.3, seed=1)
        args = config(trainer_class.__name__, optim="sgd", learning_rate=0.1, **fields)
        trainer = trainer_class(student, args, train_dataset=examples)
        trainer.train()
        runs.append([log["loss"] for log in step_logs(trainer)])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


# ---- 8 ----


def test_the_bank_is_drawn_from_its_seed_fitted_once_and_saved_to_the_bit(config, student, teacher, examples):
    fingerprints, banks = [], []
    for run in range(2):
        torch.manual_seed(run)  # what happened before on this rank is not what decides

        class Watching(CurriculumDistillationTrainer):
            def training_step(self, *args):
                fingerprints.append(self.projection_bank.fingerprint)
                return super().training_step(*args)

        args = config(
            f"run{run}", save_strategy="steps", save_steps=3, projection_seed=7, calibration_samples=20, seed=run
        )
        trainer = Watching(copy.deepcopy(student), args, train_dataset=examples, teacher_model=copy.deepcopy(teacher))
        trainer.train()
        trainer.save_model()
        banks += [trainer.projection_bank, ProjectionBank.from_pretrained(args.output_dir)]
        banks += [ProjectionBank.from_pretrained(os.path.join(args.output_dir, f"checkpoint-{n}")) for n in (3, 6, 8)]
    assert len(fingerprints) == 16
    assert len(set(fingerprints) | {bank.fingerprint for bank in banks}) == 1
    assert all(bank.frozen for bank in banks)
    for bank in banks[1:]:
        for name, tensor in bank.tensors().items():
            assert torch.equal(tensor, banks[0].tensors()[name])


# ---- 9 ----


def test_losses_are_float32_arithmetic_under_autocast(config, student, teacher, examples):
    captured = {}
    student.bert.encoder.layer[0].register_forward_hook(lambda _, args, out: captured.update(student=out))
    teacher.bert.encoder.layer[1].register_forward_hook(lambda _, args, out: captured.update(teacher=out))

    class Recording(CurriculumDistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            captured.clear()
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            captured.update(loss=loss.detach(), mask=inputs["attention_mask"].bool(), bank=self.projection_bank)
            return loss

    args = config(stages=[{"hidden": [[1, 2]]}], max_steps=1, bf16=True)
    Recording(student, args, train_dataset=examples, teacher_model=teacher).train()

    assert captured["loss"].dtype == torch.float32
    tensors = {name: tensor.double() for name, tensor in captured["bank"].tensors().items()}
    target = captured["teacher"].double() @ tensors["layer_1_2.weight"].T
    target = (target - tensors["layer_1_2.mean"]) / tensors["layer_1_2.std"]
    error = (captured["student"].double() - target).square().mean(-1)[captured["mask"]].mean()
    assert captured["loss"].item() == pytest.approx(error.item(), rel=1e-5)


def test_a_copy_of_the_teacher_has_nothing_to_learn_in_bf16(config, teacher, examples):
    student = copy.deepcopy(teacher)
    stages = [{"hidden": [[2, 2], [4, 4]], "until": 1}, {"kl_weight": 1.0}]
    args = config(
        stages=stages, max_steps=2, bf16=True, projection="identity", standardize_targets=False, learning_rate=0.0
    )
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher)
    trainer.train()
    layer_stage, logit_stage = step_logs(trainer)
    assert layer_stage["hidden_mse"] == 0.0
    assert abs(logit_stage["kl"]) < 1e-6
