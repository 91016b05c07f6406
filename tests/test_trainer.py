"""The drop-in: stock patterns with another class name, every task, every knob, resume, evaluation, files."""

import copy
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
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
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode

from hf_curriculum_distill import CurriculumDistillationTrainer, ProjectionBank
from hf_curriculum_distill.metrics import CountedAccuracy

# one layer after the other, then both kinds of targets with the last layer as an auxiliary term
STAGES = [
    {"hidden": [[1, 2]], "until": 3},
    {"hidden": [[2, 4]], "until": 5},
    {"kl_weight": 1.0, "label_weight": 0.5, "hidden": [[2, 4]], "hidden_weight": 0.25},
]


def step_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def train(student, teacher, args, data, **kwargs):
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=data, teacher_model=teacher, **kwargs)
    trainer.train()
    return trainer


# ---- tasks ----


def _seeded(model_class, model_config, seed):
    torch.manual_seed(seed)
    return model_class(model_config)


def _bert(model_class, **config):
    return lambda depth, seed: tiny_bert(depth, seed=seed, model_class=model_class, initializer_range=0.2, **config)


def _gpt2(depth, seed):
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": depth, "n_head": 2, "n_positions": 32}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _seeded(hf.GPT2LMHeadModel, hf.GPT2Config(**sizes, **dropouts, bos_token_id=1, eos_token_id=2), seed)


def _t5(depth, seed):
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": depth, "num_heads": 2}
    config = hf.T5Config(**sizes, num_decoder_layers=2, dropout_rate=0.0, decoder_start_token_id=0)
    return _seeded(hf.T5ForConditionalGeneration, config, seed)


def _bart(depth, seed):
    sizes = {"vocab_size": VOCAB_SIZE, "d_model": 16, "max_position_embeddings": 32, "init_std": 0.2}
    layers = {"encoder_layers": depth, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    return _seeded(hf.BartForConditionalGeneration, hf.BartConfig(**sizes, **layers, **heads), seed)


def _vit(depth, seed):
    sizes = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 32}
    image = {"image_size": 16, "patch_size": 8, "num_labels": 3}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.ViTConfig(**sizes, **image, **no_dropout, initializer_range=0.2)
    return _seeded(hf.ViTForImageClassification, config, seed)


def _wav2vec2(depth, seed):
    sizes = {"hidden_size": 16, "num_hidden_layers": depth, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (16,) * 3, "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 2)}
    position = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    convolutions |= {"num_feat_extract_layers": 3}
    names = ("hidden", "activation", "attention", "feat_proj", "final")
    off = {f"{name}_dropout": 0.0 for name in names} | {"layerdrop": 0.0, "apply_spec_augment": False}
    config = hf.Wav2Vec2Config(**sizes, **convolutions, **position, **off, num_labels=3, initializer_range=0.5)
    return _seeded(hf.Wav2Vec2ForSequenceClassification, config, seed)


def _text(example, index):
    return {name: example[name] for name in ("input_ids", "attention_mask")}


def _next_tokens(example, index):
    padding = example["attention_mask"] == 0
    return _text(example, index) | {"labels": example["input_ids"].masked_fill(padding, -100)}


def _class_of_text(example, index):
    return _text(example, index) | {"labels": torch.tensor(index % 3)}


def _class_of_tokens(example, index):
    return _text(example, index) | {"labels": torch.where(example["labels"] == -100, -100, example["labels"] % 3)}


def _translation(example, index):
    target = example["input_ids"].flip(0)[: 6 + index % 3]
    return _text(example, index) | {"labels": F.pad(target, (0, 8 - len(target)), value=-100)}


def _class_of_image(example, index):
    pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
    return {"pixel_values": pixels, "labels": torch.tensor(index % 3)}


def _class_of_sound(example, index):
    sound = torch.randn(400, generator=torch.Generator().manual_seed(index))
    attention_mask = (torch.arange(400) < 400 - 40 * (index % 3)).long()
    return {
        "input_values": sound * attention_mask,
        "attention_mask": attention_mask,
        "labels": torch.tensor(index % 3),
    }


# name -> (depth, seed -> model; example -> example)
TASKS = {
    "masked-lm": (_bert(hf.BertForMaskedLM), lambda example, index: example),
    "causal-lm": (_gpt2, _next_tokens),
    "sequence-classification": (_bert(hf.BertForSequenceClassification, num_labels=3), _class_of_text),
    "token-classification": (_bert(hf.BertForTokenClassification, num_labels=3), _class_of_tokens),
    "seq2seq-t5": (_t5, _translation),
    "seq2seq-bart": (_bart, _translation),
    "image-classification": (_vit, _class_of_image),
    "audio-classification": (_wav2vec2, _class_of_sound),
}
every_task = pytest.mark.parametrize("task", TASKS)


def task_data(task, count):
    return [TASKS[task][1](example, index) for index, example in enumerate(masked_lm_examples(count))]


@every_task
def test_every_task_trains_through_all_stages(config, task):
    build, data = TASKS[task][0], task_data(task, 16)
    student = build(2, 1)
    before = weights(student)
    trainer = CurriculumDistillationTrainer(
        student, config(stages=STAGES), train_dataset=data, eval_dataset=data[:6], teacher_model=build(4, 2)
    )
    trainer.train()
    logs = step_logs(trainer)
    assert [log["stage"] for log in logs] == [0, 0, 0, 1, 1, 2, 2, 2]
    for log in logs[:5]:
        assert log["loss"] == pytest.approx(log["hidden_mse"], rel=1e-5)
        assert not {"kl", "label_loss"} & log.keys()
    for log in logs[5:]:
        assert log["loss"] == pytest.approx(log["kl"] + 0.5 * log["label_loss"] + 0.25 * log["hidden_mse"], rel=1e-5)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert {"eval_loss", "eval_accuracy", "eval_agreement", "eval_kl"} <= trainer.evaluate().keys()


@every_task
def test_a_copy_of_the_teacher_has_nothing_to_learn(config, task):
    build, data = TASKS[task][0], task_data(task, 16)
    teacher = build(4, 2)
    stages = [{"hidden": [[0, 0], [2, 2], [4, 4]], "until": 2}, {"kl_weight": 1.0}]
    fields = {"learning_rate": 0.0, "projection": "identity", "standardize_targets": False, "max_steps": 4}
    trainer = train(copy.deepcopy(teacher), teacher, config(stages=stages, **fields), data, eval_dataset=data)
    logs = step_logs(trainer)
    assert all(log["hidden_mse"] < 1e-12 for log in logs[:2])  # kernels with and without gradients may round apart
    assert all(abs(log["kl"]) < 1e-6 for log in logs[2:])
    metrics = trainer.evaluate()
    assert metrics["eval_agreement"] == 1.0
    assert abs(metrics["eval_kl"]) < 1e-6


@every_task
def test_the_label_loss_is_the_models_own(config, task):
    build, data = TASKS[task][0], task_data(task, 16)
    student = build(2, 1).eval()
    batch = {name: torch.stack([example[name] for example in data]) for name in data[0]}
    with torch.no_grad():
        own_loss = student(**batch).loss.item()
    fields = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    trainer = train(student, None, config(stages=[{"label_weight": 1.0}], **fields), data)
    assert step_logs(trainer)[0]["label_loss"] == pytest.approx(own_loss, rel=1e-5)


def output_and_block(model, inputs, number):
    """The logits of the only example and the output of a block, float64."""
    names = ("BertLayer", "GPT2Block", "T5Block", "BartEncoderLayer", "ViTLayer", "Wav2Vec2EncoderLayer")
    block, captured = [m for m in model.modules() if type(m).__name__ in names][number - 1], []
    hook = block.register_forward_hook(lambda _, args, out: captured.append(out))
    with torch.no_grad():
        logits = model(**inputs).logits[0].double()
    hook.remove()
    hidden = captured[0] if isinstance(captured[0], torch.Tensor) else captured[0][0]
    return logits, hidden[0].double()


@every_task
def test_the_first_losses_are_those_of_a_slow_reference(config, task):
    build, data = TASKS[task][0], task_data(task, 12)
    student, teacher = build(2, 1).eval(), build(4, 2).eval()
    fields = {"learning_rate": 0.0, "max_steps": 2, "per_device_train_batch_size": 12, "temperature": 2.0}
    stages = [{"hidden": [[1, 2]], "until": 1}, {"kl_weight": 1.0}]
    trainer = train(student, teacher, config(stages=stages, **fields), data)
    hidden_mse, kl = step_logs(trainer)[0]["hidden_mse"], step_logs(trainer)[1]["kl"]

    bank = {name: tensor.double() for name, tensor in trainer.projection_bank.tensors().items()}
    errors, divergences = [], []
    for example in data:  # one at a time, without its padding
        inputs, labels = {n: t[None] for n, t in example.items()}, example["labels"]
        if "attention_mask" in inputs:
            length = int(inputs["attention_mask"].sum())
            trimmed = {name: inputs[name][:, :length] for name in inputs if name not in ("labels", "attention_mask")}
            inputs = inputs | trimmed | {"attention_mask": inputs["attention_mask"][:, :length]}
            if labels.dim() and "seq2seq" not in task:
                inputs["labels"] = inputs["labels"][:, :length]
                labels = labels[:length]
        logits, states = zip(*(output_and_block(m, inputs, n) for m, n in ((student, 1), (teacher, 2))), strict=True)
        target = states[1] @ bank["layer_1_2.weight"].T
        target = (target - bank["layer_1_2.mean"]) / bank["layer_1_2.std"]
        error = (states[0] - target).square().mean(-1)
        text = "input_ids" in inputs
        errors += error.tolist() if text else [error.mean().item()]
        if labels.dim() == 0:
            rows = [(logits[0], logits[1])]
        else:
            shift = 1 if task == "causal-lm" else 0
            positions = [i for i in range(len(labels) - shift) if labels[i + shift] != -100]
            rows = [(logits[0][i], logits[1][i]) for i in positions]
        for ours, theirs in rows:
            p, q = (theirs / 2.0).softmax(-1), (ours / 2.0).softmax(-1)
            divergences.append(4.0 * (p * (p / q).log()).sum().item())
    assert hidden_mse == pytest.approx(np.mean(errors), rel=1e-3)
    assert kl == pytest.approx(np.mean(divergences), rel=1e-3)


# ---- the stock pattern ----


def test_the_stock_masked_lm_script_distils_with_another_class_name(config, tmp_path):
    words = [f"word{number}" for number in range(VOCAB_SIZE - 5)]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = hf.BertTokenizerFast(str(vocabulary))
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, size=generator.integers(4, 9))) for _ in range(32)]
    data = datasets.Dataset.from_dict({"text": texts, "source": ["web"] * 32})
    data = data.map(lambda batch: tokenizer(batch["text"]), batched=True)
    test = data.select(range(8))
    metric, visited = CountedAccuracy(), []

    class Visit(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            visited.append(state.global_step)

    trainer = CurriculumDistillationTrainer(
        model=tiny_bert(STUDENT_DEPTH, seed=1),
        args=hf.TrainingArguments(
            str(tmp_path / "out"),
            num_train_epochs=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        ),
        data_collator=hf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
        train_dataset=data,
        eval_dataset=test,
        processing_class=tokenizer,
        callbacks=[Visit()],
        compute_metrics=lambda p: {
            f"own_{k}": v
            for k, v in metric.compute(predictions=p.predictions.ravel(), references=p.label_ids.ravel()).items()
        },
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        teacher_model=tiny_bert(TEACHER_DEPTH, width=24, seed=2),
    )
    assert [stage.name for stage in trainer.stages] == ["layers 1-2", "kl + layers 1-2"]
    assert [stage.until for stage in trainer.stages] == [4, None]
    trainer.train()
    assert visited == list(range(1, 9))
    metrics = trainer.evaluate()
    assert metrics["eval_own_accuracy"] == pytest.approx(metrics["eval_accuracy"])
    predictions = trainer.predict(test)
    assert predictions.metrics.keys() >= {"test_loss", "test_accuracy", "test_agreement", "test_kl"}
    trainer.save_model()
    assert isinstance(hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "out"), hf.BertForMaskedLM)
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


def test_epochs_are_resolved_to_steps(config, student, teacher, examples):
    args = config(max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=2)
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher)
    assert trainer.stage_scheduler.max_steps == 24
    assert trainer.stage_scheduler.boundaries == (6, 12)
    trainer.train()
    assert trainer.state.global_step == 24
    assert [log["stage"] for log in step_logs(trainer)] == [0] * 6 + [1] * 6 + [2] * 12


def test_a_stream_needs_only_max_steps(config, student, teacher, examples):
    stream = datasets.Dataset.from_list([{n: t.tolist() for n, t in e.items()} for e in examples]).to_iterable_dataset()
    trainer = train(student, teacher, config(), stream, eval_dataset=examples[:8])
    assert [log["stage"] for log in step_logs(trainer)] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert trainer.projection_bank.frozen


def test_one_shot_is_logits_only(config, student, teacher, examples):
    trainer = train(student, teacher, config(method="one_shot"), examples)
    assert [stage.name for stage in trainer.stages] == ["kl"]
    assert trainer.projection_bank is None
    assert all(log["loss"] == pytest.approx(log["kl"], rel=1e-5) for log in step_logs(trainer))
    trainer.save_model()
    assert not os.path.exists(os.path.join(trainer.args.output_dir, "projection_bank.safetensors"))


@pytest.mark.parametrize(
    "order, names",
    [
        ("sequential", ["layer 1", "layer 2", "kl"]),
        ("cumulative", ["layer 1", "layers 1-2", "kl"]),
        ("together", ["layers 1-2", "kl"]),
        ("last", ["layer 2", "kl"]),
    ],
)
def test_layer_orders(config, student, teacher, examples, order, names):
    trainer = train(student, teacher, config(layer_order=order), examples)
    assert [stage.name for stage in trainer.stages] == names
    assert {log["stage"] for log in step_logs(trainer)} == set(range(len(names)))


def test_the_logit_stage_takes_the_configured_weights(config, student, teacher, examples):
    args = config(hidden_weight_in_logit_stage=0.5, label_loss_weight=0.25)
    trainer = train(student, teacher, args, examples)
    assert trainer.stages[-1].name == "kl + labels + layer 2"
    for log in step_logs(trainer)[4:]:
        assert log["loss"] == pytest.approx(log["kl"] + 0.25 * log["label_loss"] + 0.5 * log["hidden_mse"], rel=1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
def test_another_divergence_is_another_loss(config, student, teacher, examples, divergence):
    losses = {}
    for name in ("forward_kl", divergence):
        args = config(name, method="one_shot", divergence=name, max_steps=1, learning_rate=0.0, temperature=0.5)
        trainer = train(copy.deepcopy(student), teacher, args, examples, eval_dataset=examples)
        losses[name] = step_logs(trainer)[0]["kl"], trainer.evaluate()["eval_kl"]
    assert losses["forward_kl"][0] != pytest.approx(losses[divergence][0], rel=1e-3)
    assert losses["forward_kl"][1] == losses[divergence][1]  # evaluation means one thing


def test_hard_labels_are_logged_under_their_own_name_and_evaluated_as_any_divergence(
    config, student, teacher, examples
):
    evaluated = []
    for divergence in ("forward_kl", "hard"):
        args = config(divergence, method="one_shot", divergence=divergence, max_steps=1, learning_rate=0.0)
        trainer = train(copy.deepcopy(student), teacher, args, examples, eval_dataset=examples)
        evaluated.append(trainer.evaluate()["eval_kl"])
    (log,) = step_logs(trainer)
    assert "kl" not in log and log["loss"] == pytest.approx(log["hard_label_loss"], rel=1e-5)
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("hidden_loss", ["cosine", "layer_norm_mse"])
def test_a_hidden_loss_is_logged_under_its_name_and_trained(config, student, teacher, examples, hidden_loss):
    args = config(stages=[{"hidden": [[1, 2]]}], hidden_loss=hidden_loss, max_steps=40, learning_rate=1e-2)
    logs = step_logs(train(student, teacher, args, examples))
    assert all(log["loss"] == pytest.approx(log[f"hidden_{hidden_loss}"], rel=1e-5) for log in logs)
    assert "hidden_mse" not in logs[0]
    assert sum(log["loss"] for log in logs[-5:]) < 0.9 * sum(log["loss"] for log in logs[:5])


def test_frozen_blocks_stay_as_the_stages_before_left_them(config, teacher, examples):
    student, snapshots = tiny_bert(3, seed=1), {}

    class Snapshot(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            snapshots[state.global_step] = weights(student)

    stages = [
        {"hidden": [[1, 1]], "until": 2},
        {"hidden": [[1, 1], [2, 3]], "until": 4},
        {"hidden": [[3, 4]], "until": 6},
        {"kl_weight": 1.0},
    ]
    snapshots[0] = weights(student)
    # without momentum, a parameter that gets no gradient stands still
    args = config(stages=stages, train_prefix="block", optim="sgd", learning_rate=0.5, weight_decay=0.1)
    train(student, teacher, args, examples, callbacks=[Snapshot()])

    def moved(start, end):
        changed = {n for n, tensor in snapshots[end].items() if not torch.equal(tensor, snapshots[start][n])}
        parts = {"embeddings": "bert.embeddings.", "head": "cls.predictions.transform."}
        parts |= {number: f"bert.encoder.layer.{number - 1}." for number in (1, 2, 3)}
        return {part for part, prefix in parts.items() if any(name.startswith(prefix) for name in changed)}

    assert moved(0, 2) == {"embeddings", 1}
    assert moved(2, 4) == {2}
    assert moved(4, 6) == {3}
    assert moved(6, 8) == {"embeddings", 1, 2, 3, "head"}

    student, snapshots[0] = tiny_bert(3, tie_word_embeddings=False), None
    stages = [{"hidden": [[2, 4]], "until": 6}, {"kl_weight": 1.0}]
    args = config(stages=stages, freeze_matched_layers=True, optim="sgd", learning_rate=0.5, weight_decay=0.1)
    train(student, teacher, args, examples, callbacks=[Snapshot()])
    assert moved(1, 6) == {"embeddings", 1, 2}
    assert moved(6, 8) == {3, "head"}


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("fields", [{}, {"train_prefix": "block"}, {"layer_order": "together"}], ids=str)
def test_embeddings_that_layer_stages_freeze_train_in_the_logit_stage_alone(
    config, student, teacher, examples, truncate, fields
):
    assert student.bert.embeddings.word_embeddings.weight is student.cls.predictions.decoder.weight
    embeddings, first, seen = dict(student.bert.embeddings.named_parameters()), weights(student.bert.embeddings), {}

    class Watch(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            trained = {name for name, parameter in embeddings.items() if parameter.grad is not None}
            held = {name for name, parameter in embeddings.items() if parameter in optimizer.state}
            moved = {name for name, parameter in embeddings.items() if not torch.equal(parameter, first[name])}
            seen[state.global_step] = trained, held, moved

    stays = {"freeze_embeddings_in_layer_stages": True, "truncate": truncate, "weight_decay": 0.1}
    trainer = train(student, teacher, config(**stays, **fields), examples, callbacks=[Watch()])
    (begin,) = trainer.stage_scheduler.boundaries[-1:]
    for step in range(begin):
        assert seen[step] == (set(), set(), set())
    assert seen[begin] == (set(embeddings), set(), set())
    assert seen[begin + 1] == (set(embeddings), set(embeddings), set(embeddings))


def test_the_hidden_term_of_a_step_has_that_steps_weight(config, student, teacher, examples):
    stages = [{"hidden": [[2, 4]], "until": 2}]
    stages += [{"hidden": [[2, 4]], "hidden_weight": 0.8, "kl_weight": 1.0, "hidden_weight_at_end": 0.2}]
    trainer = train(student, teacher, config(stages=stages), examples)
    for log, weight in zip(step_logs(trainer), [1.0, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], strict=True):
        assert log["loss"] == pytest.approx(log.get("kl", 0.0) + weight * log["hidden_mse"], rel=1e-5)


class Recorder(hf.TrainerCallback):
    """The weights, the learning rates and the optimizer's step counts after each optimizer step, by name."""

    def __init__(self, model):
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.weights, self.rates, self.counts = {0: weights(model)}, {}, {}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        step = state.global_step + 1
        self.weights[step] = weights(model)
        self.rates[step] = {self.names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.counts[step] = {self.names[p]: int(held["step"]) for p, held in optimizer.state.items() if "step" in held}


def recorded(student, teacher, args, examples):
    recorder = Recorder(student)
    trainer = train(student, teacher, args, examples, callbacks=[recorder])
    return recorder, trainer


def test_finished_layers_move_at_their_share_of_the_rate(config, teacher, examples):
    stages = [{"hidden": [[1, 1]], "until": 2}, {"hidden": [[2, 2]], "until": 5}, {"kl_weight": 1.0}]
    sgd = {"stages": stages, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "weight_decay": 0.1}
    runs = []
    for rate in (1.0, 0.25):
        student = tiny_bert(3, seed=1).double()
        runs.append(recorded(student, teacher, config(finished_layer_rate=rate, **sgd), examples)[0].weights)
    for step in range(3):
        assert_same_weights(runs[1][step], runs[0][step])
    for name, start in runs[0][2].items():  # the first step of the second stage begins from the same weights
        whole, slowed = (run[3][name] - start for run in runs)
        finished = "embeddings" in name or "layer.0." in name or "decoder.weight" in name  # which is tied
        torch.testing.assert_close(slowed, whole * (0.25 if finished else 1.0), rtol=1e-9, atol=1e-12)
        assert whole.any() == (finished or "layer.1." in name) or "key.bias" in name


@pytest.mark.parametrize(
    "optim, schedule, restart_schedule_per_stage",
    [("adamw_torch", "cosine", False), ("adamw_torch", "linear", True), ("adafactor", "constant_with_warmup", False)],
)
def test_rates_of_layers_are_those_of_the_schedule_times_their_share(
    config, teacher, examples, optim, schedule, restart_schedule_per_stage
):
    fields = {"lr_scheduler_type": schedule, "warmup_steps": 2, "optim": optim, "weight_decay": 0.1}
    fields |= {"restart_schedule_per_stage": restart_schedule_per_stage, "layer_order": "cumulative"}
    fields |= {"max_steps": 12, "num_layer_stages": 3, "logging_steps": 1}
    plain, logs = recorded(tiny_bert(3, seed=1), teacher, config("plain", **fields), examples)
    slowed, trainer = recorded(
        tiny_bert(3, seed=1), teacher, config("slowed", finished_layer_rate=0.3, **fields), examples
    )
    assert [log["learning_rate"] for log in step_logs(trainer)] == [log["learning_rate"] for log in step_logs(logs)]
    assert trainer.stage_scheduler.boundaries == (2, 4, 6)
    for step, rates in slowed.rates.items():
        finished = {3: 1, 4: 1, 5: 2, 6: 2}.get(step)
        for name, rate in rates.items():
            layer = int(name.split("layer.")[1][0]) + 1 if "encoder.layer." in name else 0
            share = 0.3 if finished is not None and layer <= finished else 1.0
            assert rate == pytest.approx(plain.rates[step][name] * share, rel=1e-12), (step, name)
    decays = {decay: set() for decay in (0.0, 0.1)}
    for group in trainer.optimizer.param_groups:
        decays[group["weight_decay"]] |= {slowed.names[parameter] for parameter in group["params"]}
    assert decays[0.1] == set(trainer.get_decay_parameter_names(trainer.model)) & set(slowed.names.values())
    assert decays[0.0] == set(slowed.names.values()) - decays[0.1]


@pytest.mark.parametrize("second", [{}, {"finished_layer_rate": 1.0}], ids=["again", "at the whole rate"])
def test_a_second_train_has_the_rates_of_its_own_arguments(config, student, teacher, examples, second):
    args, recorder = config(finished_layer_rate=0.3, layer_order="cumulative"), Recorder(student)
    trainer = train(student, teacher, args, examples, callbacks=[recorder])
    first = recorder.rates.copy()
    for name, value in second.items():
        setattr(args, name, value)
    trainer.train()
    share = 1 / 0.3 if second else 1.0
    of_embeddings = [rates["bert.embeddings.LayerNorm.weight"] for rates in (recorder.rates[4], first[4])]
    assert of_embeddings[0] == pytest.approx(of_embeddings[1] * share)
    assert recorder.rates[8] == pytest.approx(first[8])


def test_an_optimizer_of_ones_own_has_no_groups_by_layer(config, student, teacher, examples):
    optimizer, layers = torch.optim.AdamW(student.parameters(), lr=1e-3), config(finished_layer_rate=0.3)
    with pytest.raises(ValueError, match=r"finished_layer_rate is 0\.3, which needs .* but `optimizers` were given"):
        train(copy.deepcopy(student), teacher, layers, examples, optimizers=(optimizer, None))
    train(student, teacher, layers, examples, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3}))


@pytest.mark.parametrize("own", [False, True])
def test_a_stage_begins_without_the_optimizers_state_iff_it_is_not_carried(config, teacher, examples, own):
    for carried in (True, False):
        student = tiny_bert(STUDENT_DEPTH, seed=1)
        optimizers = {"optimizers": (torch.optim.AdamW(student.parameters()), None)} if own else {}
        recorder = Recorder(student)
        args = config(f"{carried}", stages=STAGES, carry_optimizer=carried)
        train(student, teacher, args, examples, callbacks=[recorder], **optimizers)
        name = "bert.embeddings.LayerNorm.weight"  # which every stage trains
        expected = [1, 2, 3, 4, 5, 6, 7, 8] if carried else [1, 2, 3, 1, 2, 1, 2, 3]
        assert [recorder.counts[step][name] for step in range(1, 9)] == expected
        last = {"bert.encoder.layer.1.output.dense.weight": [0, 0, 0, 1, 2]}
        last["cls.predictions.bias"] = [0, 0, 0, 0, 0, 1]
        for name, counts in last.items():
            assert [recorder.counts[step].get(name, 0) for step in range(1, len(counts) + 1)] == counts


def test_each_stage_can_have_its_own_warm_up(config, student, teacher, examples):
    args = config(restart_schedule_per_stage=True, stage_warmup_ratio=0.5, max_steps=16, learning_rate=1.0, optim="sgd")
    trainer = train(student, teacher, args, examples)
    # linear over 4, 4 and 8 steps, half of each warming up
    short, long = [0.0, 0.5, 1.0, 0.5], [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    assert [log["learning_rate"] for log in step_logs(trainer)] == pytest.approx(short + short + long)


@pytest.mark.parametrize("train_prefix", ["joint", "block", "independent"])
def test_truncation_changes_nothing_but_the_cost(config, student, teacher, examples, train_prefix):
    results, stages = [], STAGES
    if train_prefix == "independent":
        student, stages = tiny_bert(3, seed=1), [{"hidden": [[1, 2], [2, 4]], "until": 4}, {"kl_weight": 1.0}]
    for truncate in (True, False):
        args = config(f"{truncate}", stages=stages, truncate=truncate, weight_decay=0.1, train_prefix=train_prefix)
        trainer = train(copy.deepcopy(student), teacher, args, examples)
        results.append((weights(trainer.model), step_logs(trainer)))
    assert_same_weights(results[0][0], results[1][0])
    for truncated, whole in zip(results[0][1], results[1][1], strict=True):
        assert [truncated[n] for n in ("loss", "grad_norm")] == [whole[n] for n in ("loss", "grad_norm")]
    assert results[0][1][0]["student_flops"] < results[1][1][0]["student_flops"]


def test_a_second_train_logs_as_the_first(config, student, teacher, examples):
    args = config(stages=STAGES, learning_rate=0.0, per_device_train_batch_size=64, logging_steps=4)
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher)
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append(step_logs(trainer))
    for first, second in zip(*runs, strict=True):
        assert first.keys() == second.keys()
        for name in {"loss", "hidden_mse", "kl", "label_loss", "student_flops", "teacher_flops"} & first.keys():
            assert second[name] == pytest.approx(first[name], rel=1e-4), (name, first["step"])


def test_logged_averages_never_mix_two_stages(config, student, teacher, examples):
    args = config(stages=STAGES, learning_rate=0.0, per_device_train_batch_size=64, logging_steps=100)
    trainer = train(student, teacher, args, examples)
    assert [(log["step"], log["stage"]) for log in step_logs(trainer)] == [(3, 0), (5, 1)]


@pytest.mark.parametrize("logit_chunk_size", [0, 7])
@pytest.mark.parametrize(
    "train_prefix, unneeded",
    # the first block above a frozen one needs no gradient of its input (query, key, value), but is booked as if
    [("joint", 0), ("block", 3 * 2 * 16 * 12 * 16 * 16)],
)
def test_booked_operations_are_those_of_a_real_step(
    config, teacher, examples, train_prefix, unneeded, logit_chunk_size
):
    student = tiny_bert(3, seed=1)
    for model in (student, teacher):
        model.set_attn_implementation("eager")  # plain matrix products: torch doesn't count the CPU's fused attention
    spent = []

    class Counting(CurriculumDistillationTrainer):
        def training_step(self, *args):
            self._enter_stage(self._read(args[1]))  # the first batch of a stage is measured once more
            with FlopCounterMode(display=False) as counter:
                loss = super().training_step(*args)
            spent.append(counter.get_total_flops())
            return loss

    stages = [{"hidden": [[1, 2]], "until": 1}, {"hidden": [[3, 4]], "until": 2}, {"kl_weight": 1.0}]
    args = {"stages": stages, "max_steps": 6, "per_device_train_batch_size": 16, "train_prefix": train_prefix}
    args = config(**args, logit_chunk_size=logit_chunk_size)
    trainer = Counting(student, args, train_dataset=examples, teacher_model=teacher)
    trainer.train()
    booked = np.diff([0, *(log["student_flops"] + log["teacher_flops"] for log in step_logs(trainer))])
    projection = 2 * 16 * 12 * 16 * 24  # the bank's matrix product is the loss's, not a model's
    expected = np.array(spent) + np.array([-projection, unneeded - projection, 0, 0, 0, 0])
    assert booked == pytest.approx(expected, rel=1e-6)
    assert len(set(booked[2:])) > 1  # batches differ in how many rows count, and the logits' cost with them


# ---- evaluation ----


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm", "sequence-classification", "seq2seq-t5"])
def test_evaluation_agrees_with_a_slow_reference(config, task):
    build, data = TASKS[task][0], task_data(task, 16)
    student, teacher, test = build(2, 1), build(4, 2), data[:7]
    args = config(stages=STAGES, per_device_eval_batch_size=3, temperature=3.0)
    trainer = train(student, teacher, args, data, eval_dataset=test)
    metrics = trainer.evaluate()

    student.eval()
    own_losses = []
    for first in range(0, len(test), 3):
        part = test[first : first + 3]
        with torch.no_grad():
            own_losses += [student(**default_collate(part)).loss.item()] * len(part)
    assert metrics["eval_loss"] == pytest.approx(np.mean(own_losses), rel=1e-5)

    right, agree, kl, count = 0, 0, 0.0, 0
    for example in test:
        inputs = {name: tensor[None] for name, tensor in example.items()}
        with torch.no_grad():
            ours, theirs = (model(**inputs).logits.double().flatten(0, -2) for model in (student, teacher))
        labels = example["labels"].reshape(-1)
        if task == "causal-lm":
            labels, ours, theirs = labels[1:], ours[:-1], theirs[:-1]
        for label, our, their in zip(labels, ours, theirs, strict=True):
            if label != -100:
                count += 1
                right += int(our.argmax() == label)
                agree += int(our.argmax() == their.argmax())
                p, q = their.softmax(-1), our.softmax(-1)
                kl += (p * (p / q).log()).sum().item()
    assert metrics["eval_accuracy"] == pytest.approx(right / count)
    assert metrics["eval_agreement"] == pytest.approx(agree / count)
    assert metrics["eval_kl"] == pytest.approx(kl / count, rel=1e-4)


def test_evaluation_is_the_same_measure_in_every_stage(config, student, teacher, examples):
    args = config(stages=STAGES, learning_rate=0.0, eval_strategy="steps", eval_steps=1)
    trainer = train(student, teacher, args, examples, eval_dataset=examples[:8])
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 8
    for name in ("eval_loss", "eval_accuracy", "eval_agreement", "eval_kl"):
        assert len({evaluation[name] for evaluation in evaluations}) == 1


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm", "sequence-classification"])
def test_smoothed_labels_are_a_loss_of_their_own(config, task):
    build, data = TASKS[task][0], task_data(task, 8)
    student, fields = build(2, 1).eval(), {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 8}
    args = config(stages=[{"label_weight": 1.0}], label_smoothing_factor=0.2, **fields)
    trainer = train(student, None, args, data, eval_dataset=data)
    assert {"eval_loss", "eval_accuracy"} <= trainer.evaluate().keys()

    student.eval()
    batch, losses = default_collate(data), []
    with torch.no_grad():
        logits = student(**batch).logits.double()
    shift = 1 if task == "causal-lm" else 0
    if logits.dim() == 3:
        logits, labels = logits[:, : logits.shape[1] - shift].flatten(0, 1), batch["labels"][:, shift:].flatten()
    else:
        labels = batch["labels"]
    for own, label in zip(logits.log_softmax(-1), labels, strict=True):
        if label != -100:
            losses.append(-0.8 * own[label].item() - 0.2 * own.mean().item())
    assert step_logs(trainer)[0]["label_loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("hidden_states", [False, True])
def test_a_student_whose_outputs_are_tuples_is_evaluated_with_smoothed_labels(config, teacher, examples, hidden_states):
    args, metrics = config(max_steps=4, label_smoothing_factor=0.1), []
    for fields in ({}, {"return_dict": False, "output_hidden_states": hidden_states}):
        trainer = train(tiny_bert(2, seed=1, **fields), teacher, args, examples, eval_dataset=examples[:8])
        metrics.append({name: trainer.evaluate().get(f"eval_{name}") for name in ("loss", "accuracy", "kl")})
    assert metrics[0] == metrics[1] and None not in metrics[0].values()


def test_training_without_labels_matches_every_real_token(config, student, teacher, examples):
    data = [{name: example[name] for name in ("input_ids", "attention_mask")} for example in examples[:8]]
    args = config(method="one_shot", learning_rate=0.0, max_steps=1, per_device_train_batch_size=8)
    trainer = train(student, teacher, args, data)
    batch, student = default_collate(data), student.eval()
    with torch.no_grad():
        ours, theirs = (model(**batch).logits.double().log_softmax(-1) for model in (student, teacher))
    kl = (theirs.exp() * (theirs - ours)).sum(-1)[batch["attention_mask"].bool()].mean()
    assert step_logs(trainer)[0]["kl"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_evaluations_report_each_layers_distance_from_its_target(config, student, teacher, examples, batch_size):
    fields = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": batch_size}
    logs, weights_after = {}, {}
    for evaluate_layers in (False, True):
        trainer = CurriculumDistillationTrainer(
            copy.deepcopy(student),
            config(f"{evaluate_layers}", evaluate_layers=evaluate_layers, **fields),
            train_dataset=examples,
            eval_dataset=examples[:8],
            teacher_model=teacher,
        )
        assert "eval_layer_1_mse" not in trainer.evaluate()  # the bank is not measured yet
        trainer.train()
        logs[evaluate_layers] = [log for log in trainer.state.log_history if "eval_loss" in log]
        weights_after[evaluate_layers] = weights(trainer.model)
    assert_same_weights(*weights_after.values())
    names = {f"eval_layer_{student_layer}_mse" for student_layer, _ in trainer.projection_bank.layer_pairs}
    assert all(set(with_layers) - set(plain) == names for plain, with_layers in zip(*logs.values(), strict=True))

    errors = {name: [] for name in names}
    trainer.model.eval()
    for example in examples[:8]:
        inputs = {name: value for name, value in default_collate([example]).items() if name != "labels"}
        with torch.no_grad():
            student_states, teacher_states = (
                model(**inputs, output_hidden_states=True).hidden_states for model in (trainer.model, teacher)
            )
        for student_layer, teacher_layer in trainer.projection_bank.layer_pairs:
            target = trainer.projection_bank.project(student_layer, teacher_states[teacher_layer])
            error = (student_states[student_layer] - target).square().mean(-1)[0]
            counted = inputs["attention_mask"][0].bool()
            errors[f"eval_layer_{student_layer}_mse"].append(error[counted])
    for name, values in errors.items():
        assert logs[True][-1][name] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)


def test_evaluation_before_training_leaves_the_models_alone(config, student, teacher, examples):
    trainer = CurriculumDistillationTrainer(
        student, config(), train_dataset=examples, eval_dataset=examples[:8], teacher_model=teacher
    )
    assert trainer.evaluate()["eval_kl"] > 0
    assert "forward" not in student.__dict__ | teacher.__dict__


def test_only_the_last_stage_competes_for_the_best_model(config, student, teacher, examples):
    scores = iter(range(100, 0, -1))  # every evaluation is worse than the one before
    args = config(
        stages=STAGES,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer = train(
        student,
        teacher,
        args,
        examples,
        eval_dataset=examples[:8],
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[hf.EarlyStoppingCallback(early_stopping_patience=2)],
    )
    assert trainer.state.best_global_step == 6  # the first step that the last stage trained
    assert trainer.state.global_step == 8
    best = load_file(os.path.join(args.output_dir, "checkpoint-6", "model.safetensors"))
    for name, tensor in best.items():
        assert torch.equal(trainer.model.state_dict()[name], tensor)


# ---- models ----


def test_a_teachers_folder_is_the_teacher(config, student, teacher, examples, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    by_folder = train(copy.deepcopy(student), tmp_path / "teacher", config("a", stages=STAGES), examples)
    by_model = train(copy.deepcopy(student), teacher, config("b", stages=STAGES), examples)
    assert_same_weights(weights(by_folder.model), weights(by_model.model))
    assert by_folder.teacher.name == str(tmp_path / "teacher")


@pytest.mark.parametrize("as_folder", [True, False])
def test_the_teacher_has_the_given_dtype(config, student, teacher, examples, tmp_path, as_folder):
    teacher.save_pretrained(tmp_path / "teacher")
    given = tmp_path / "teacher" if as_folder else teacher
    trainer = train(student, given, config(stages=STAGES, teacher_dtype="bfloat16"), examples)
    assert {parameter.dtype for parameter in trainer.teacher.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert {log["stage"] for log in step_logs(trainer)} == {0, 1, 2}


def test_both_models_have_the_given_attention_in_training_and_nothing_of_it_is_saved(
    config, student, teacher, examples, tmp_path
):
    names = {"student": student, "teacher": teacher}
    assert {model.config._attn_implementation for model in names.values()} == {"sdpa"}
    trainer = train(student, teacher, config(stages=STAGES, attn_implementation="eager"), examples)
    assert {model.config._attn_implementation for model in (student, trainer.teacher.model)} == {"eager"}
    trainer.save_model(tmp_path / "saved")
    assert hf.BertForMaskedLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


def test_without_layer_stages_hidden_states_and_logits_are_matched_from_the_first_step(
    config, student, teacher, examples
):
    fields = {"layer_stage_fraction": 0.0, "hidden_weight_in_logit_stage": 0.5, "layer_order": "together"}
    short = train(copy.deepcopy(student), teacher, config(**fields), examples)
    stages = [{"hidden": [[1, 2], [2, 4]], "hidden_weight": 0.5, "kl_weight": 1.0}]
    assert {log["stage_name"] for log in step_logs(short)} == {"kl + layers 1-2"}
    assert_same_weights(
        weights(short.model), weights(train(student, teacher, config("b", stages=stages), examples).model)
    )


def test_an_attention_that_is_not_there_is_refused_before_the_first_step(config, student, teacher, examples):
    with pytest.raises(ValueError, match="no_such_attention"):
        train(student, teacher, config(attn_implementation="no_such_attention"), examples)


@pytest.mark.parametrize("kind", ["dict", "dataset"])
def test_inputs_of_the_teacher_alone_reach_it_alone(config, teacher, examples, kind):
    student = tiny_bert(STUDENT_DEPTH, seed=1, model_class=StrictBert)
    data = [example | {"token_type_ids": (torch.arange(12) > 5).long()} for example in examples]
    if kind == "dataset":
        rows = [{name: tensor.tolist() for name, tensor in example.items()} for example in data]
        data = datasets.Dataset.from_list(rows)
    seen = []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["token_type_ids"]), with_kwargs=True)
    trainer = train(student, teacher, config(stages=STAGES), data, eval_dataset=data)
    assert trainer.evaluate()["eval_agreement"] >= 0
    assert seen and all(token_types.any() for token_types in seen)


@pytest.mark.parametrize("task", ["masked-lm", "sequence-classification", "causal-lm"])
def test_the_saved_student_is_a_plain_model(config, task):
    build, data = TASKS[task][0], task_data(task, 16)
    student, teacher = build(2, 1), build(4, 2)
    args = config(stages=STAGES, save_strategy="steps", save_steps=4)
    trainer = train(student, teacher, args, data)
    trainer.save_model()
    auto = {
        "masked-lm": hf.AutoModelForMaskedLM,
        "sequence-classification": hf.AutoModelForSequenceClassification,
        "causal-lm": hf.AutoModelForCausalLM,
    }[task]
    loaded, info = auto.from_pretrained(args.output_dir, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(weights(loaded), weights(student))
    for folder in ("", "checkpoint-4", "checkpoint-8"):
        folder = os.path.join(args.output_dir, folder)
        assert ProjectionBank.from_pretrained(folder).fingerprint == trainer.projection_bank.fingerprint
        with open(os.path.join(folder, "curriculum.json")) as file:
            record = json.load(file)
        assert [stage["until"] for stage in record["stages"]] == [3, 5, None]
        assert [stage["hidden"] for stage in record["stages"]] == [[[1, 2]], [[2, 4]], [[2, 4]]]
        assert record["max_steps"] == 8
        assert record["teacher"]["fingerprint"] == trainer.teacher.fingerprint
        assert record["versions"]["transformers"] == hf.__version__
        assert not [name for name in os.listdir(folder) if "partial" in name]


def test_compiled_training_is_the_same_training(config, student, teacher, examples):
    plain = train(copy.deepcopy(student), teacher, config("plain", stages=STAGES), examples)
    args = config("compiled", stages=STAGES, torch_compile=True, torch_compile_backend="eager")
    compiled = train(copy.deepcopy(student), teacher, args, examples)
    for expected, actual in zip(step_logs(plain), step_logs(compiled), strict=True):
        assert actual["stage"] == expected["stage"]
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_checkpointed_activations_train_the_same_student(config, student, teacher, examples):
    plain = train(copy.deepcopy(student), teacher, config("plain", stages=STAGES), examples)
    args = config("checkpointed", stages=STAGES, gradient_checkpointing=True)
    checkpointed = train(copy.deepcopy(student), teacher, args, examples)
    assert_same_weights(weights(checkpointed.model), weights(plain.model))


# ---- resume ----


RESUMABLE = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 4, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "fields",
    [
        {"stages": STAGES},
        {"restart_schedule_per_stage": True, "train_prefix": "block"},
        {"finished_layer_rate": 0.3, "carry_optimizer": False, "freeze_embeddings_in_layer_stages": True}
        | {"hidden_weight_in_logit_stage": 0.5, "hidden_weight_at_end": 0.0, "restart_schedule_per_stage": True},
    ],
    ids=["joint", "block", "between stages"],
)
def test_a_resumed_run_is_one_that_was_never_interrupted(config, teacher, examples, fields):
    def run(resume_from=None):
        student = tiny_bert(STUDENT_DEPTH, dropout=0.1, seed=1)
        args = config(**RESUMABLE, **fields)
        trainer = CurriculumDistillationTrainer(
            student, args, train_dataset=examples[:20], eval_dataset=examples[:8], teacher_model=teacher
        )
        trainer.train(resume_from_checkpoint=resume_from)
        timed = ("runtime", "per_second", "train_loss")
        logs = [{n: v for n, v in log.items() if not n.endswith(timed)} for log in trainer.state.log_history]
        return weights(student), logs, trainer.projection_bank.fingerprint

    expected = run()
    for step in (7, 6, 5, 4, 3, 2, 1):
        actual = run(os.path.join(config().output_dir, f"checkpoint-{step}"))
        assert_same_weights(actual[0], expected[0])
        assert actual[1] == expected[1], step
        assert actual[2] == expected[2]
    assert_same_weights(run(resume_from=True)[0], expected[0])
    assert_same_weights(run(resume_from=Path(config().output_dir) / "checkpoint-3")[0], expected[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"max_steps": 10}, "max_steps changed from 8 to 10"),
        ({"layer_map": [[1, 1], [2, 4]]}, r"stages changed from .*\[1, 2\].* to .*\[1, 1\]"),
        ({"temperature": 2.0}, "settings.temperature changed from 1.0 to 2.0"),
        ({"hidden_loss": "cosine"}, "settings.hidden_loss changed from 'mse' to 'cosine'"),
        ({"projection_seed": 3}, "projection_matrices changed"),
        ({"shared_projection": True}, "projection_matrices changed"),
        ({"projection": "pca"}, "projection_matrices changed"),
        ({"method": "one_shot"}, "method changed from 'curriculum' to 'one_shot'"),
        ({"train_prefix": "block"}, "settings.train_prefix changed from 'joint' to 'block'"),
        ({"restart_schedule_per_stage": True}, "settings.restart_schedule_per_stage changed from False to True"),
        ({"carry_optimizer": False}, "settings.carry_optimizer changed from True to False"),
        ({"finished_layer_rate": 0.5}, "settings.finished_layer_rate changed from 1.0 to 0.5"),
        ({"freeze_embeddings_in_layer_stages": True}, "settings.freeze_embeddings_in_layer_stages changed from False"),
        ({"hidden_weight_at_end": 0.5}, r"stages changed from .* to .*'hidden_weight_at_end': 0\.5"),
    ],
)
def test_resuming_another_run_says_what_changed(config, student, teacher, examples, change, message):
    train(copy.deepcopy(student), teacher, config(save_strategy="steps", save_steps=4), examples)
    trainer = CurriculumDistillationTrainer(student, config(**change), train_dataset=examples, teacher_model=teacher)
    checkpoint = os.path.join(trainer.args.output_dir, "checkpoint-4")
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_resuming_with_another_teacher_or_bank_says_so(config, student, teacher, examples):
    first = train(copy.deepcopy(student), teacher, config(save_strategy="steps", save_steps=4), examples)
    checkpoint = os.path.join(first.args.output_dir, "checkpoint-4")

    other = tiny_bert(TEACHER_DEPTH, width=24, seed=9)
    trainer = CurriculumDistillationTrainer(student, config(), train_dataset=examples, teacher_model=other)
    with pytest.raises(ValueError, match=r"teacher.fingerprint changed from '\w+' to '\w+'"):
        trainer.train(resume_from_checkpoint=checkpoint)

    def resumed_with(bank):
        trainer = CurriculumDistillationTrainer(
            student, config(), train_dataset=examples, teacher_model=teacher, projection_bank=bank
        )
        trainer.train(resume_from_checkpoint=checkpoint)

    pairs, dims = first.projection_bank.layer_pairs, ([16, 16], [24, 24])
    with pytest.raises(ValueError, match="projection_matrices changed"):
        resumed_with(ProjectionBank.create(pairs, *dims, seed=5))
    with pytest.raises(ValueError, match="was written with projection bank"):
        resumed_with(ProjectionBank.create(pairs, *dims, seed=0).freeze())
    resumed_with(ProjectionBank.from_pretrained(checkpoint))


def test_a_checkpoint_without_a_record_is_not_resumed(config, student, teacher, examples):
    stock = hf.Trainer(
        copy.deepcopy(student),
        config("stock", hf.TrainingArguments, save_strategy="steps", save_steps=4),
        train_dataset=examples,
    )
    stock.train()
    trainer = CurriculumDistillationTrainer(student, config(), train_dataset=examples, teacher_model=teacher)
    with pytest.raises(FileNotFoundError, match=r"has no curriculum\.json"):
        trainer.train(resume_from_checkpoint=os.path.join(stock.args.output_dir, "checkpoint-4"))


# ---- the bank ----


def test_a_given_bank_is_used_as_it_is(config, student, teacher, examples):
    fitted = train(copy.deepcopy(student), teacher, config(projection_seed=3), examples).projection_bank
    before = fitted.fingerprint
    trainer = train(student, teacher, config(projection_seed=8), examples, projection_bank=fitted)
    assert trainer.projection_bank.fingerprint == before


def test_calibration_measures_the_training_data(config, student, teacher, examples):
    args = config(calibration_samples=len(examples), max_steps=4)
    bank = train(student, teacher, args, examples).projection_bank
    outputs = []
    teacher.bert.encoder.layer[1].register_forward_hook(lambda _, args, out: outputs.append(out))
    for batch in DataLoader(examples, 8, collate_fn=default_collate):
        with torch.no_grad():
            teacher(**batch)
        outputs[-1] = outputs[-1][batch["attention_mask"].bool()]
    projected = torch.cat(outputs).double() @ bank.tensors()["layer_1_2.weight"].double().T
    torch.testing.assert_close(bank.tensors()["layer_1_2.mean"], projected.mean(0).float(), rtol=1e-4, atol=1e-5)
    deviation = projected.std(0, correction=0).float()
    torch.testing.assert_close(bank.tensors()["layer_1_2.std"], deviation, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"standardize_targets": False, "shared_projection": True}], ids=str)
@pytest.mark.parametrize("projection", ["pca", "rotated_pca"])
def test_a_pca_is_measured_on_the_training_data_and_read_from_a_checkpoint(
    config, student, teacher, examples, projection, fields
):
    fields = fields | {"projection": projection, "save_strategy": "steps", "save_steps": 3}
    args = config("whole", calibration_samples=len(examples), **fields)
    whole = train(copy.deepcopy(student), teacher, args, examples)
    bank, batch = whole.projection_bank, default_collate(examples)
    with torch.no_grad():
        hidden = teacher(**batch, output_hidden_states=True).hidden_states
    states = [hidden[layer][batch["attention_mask"].bool()].double() for layer in (2, 4)]
    if args.shared_projection:
        states = [torch.cat([own - own.mean(0) for own in states])] * 2
    for (student_layer, teacher_layer), own in zip(((1, 2), (2, 4)), states, strict=True):
        covariance = torch.cov(own.T, correction=0)
        matrix = bank.tensors()[f"layer_{student_layer}_{teacher_layer}.weight"].double()
        kept, most = (matrix @ covariance @ matrix.T).trace(), torch.linalg.eigvalsh(covariance)[-16:].sum()
        assert kept.item() == pytest.approx(most.item(), rel=1e-5)
    # another sample would give another bank
    resumed = CurriculumDistillationTrainer(
        copy.deepcopy(student), config("resumed", calibration_samples=9, **fields), train_dataset=examples,
        teacher_model=teacher,
    )  # fmt: skip
    assert resumed.projection_bank.lacks_matrices
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-3"))
    assert resumed.projection_bank.fingerprint == bank.fingerprint
    assert_same_weights(weights(resumed.model), weights(whole.model))


def test_without_standardisation_the_targets_are_the_projections(config, student, teacher, examples):
    bank = train(student, teacher, config(standardize_targets=False), examples).projection_bank
    assert bank.frozen
    assert all((t == 0).all() for name, t in bank.tensors().items() if name.endswith("mean"))
    assert all((t == 1).all() for name, t in bank.tensors().items() if name.endswith("std"))
