"""What counts: rows and positions against plain loops, and the two sides of one fraction."""

import copy
import functools
import itertools

import numpy as np
import pytest
import torch
from architectures import build
from conftest import assert_same_weights, tiny_bert, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.batches.positions import (
    LABEL_POSITIONS,
    count,
    counted_rows,
    has_rows_per_token,
    label_weights,
    position_weights,
    with_label_positions,
)
from hf_curriculum_distill.layers.forward import PartialForward

MODELS = {name: build(name)[0] for name in ("bert", "bert-classifier", "bert-tagger", "llama", "gpt2", "t5", "bart")}
MODELS |= {name: build(name)[0] for name in ("llama-classifier", "vit", "wav2vec2")}


def text(batch=3, length=6, seed=0, labels="tokens", padded=True, classes=99):
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, 99, (batch, length), generator=generator)}
    if padded:
        lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
        inputs["attention_mask"] = (torch.arange(length) < lengths).long()
    if labels == "tokens":
        keep = torch.rand(batch, length, generator=generator) < 0.5
        inputs["labels"] = torch.where(keep, inputs["input_ids"] % classes, -100)
    elif labels == "examples":
        inputs["labels"] = torch.tensor([1, -100, 0])
    return inputs


@pytest.mark.parametrize(
    "name, labels, per_token",
    [
        ("bert", "tokens", True),
        ("bert", None, True),
        ("bert-tagger", None, True),
        ("bert-classifier", "examples", False),
        ("bert-classifier", None, False),
        ("llama-classifier", None, False),
        ("gpt2", None, True),
    ],
)
def test_rows_are_one_a_token_or_one_an_example(name, labels, per_token):
    assert has_rows_per_token(MODELS[name], text(labels=labels)) == per_token


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@given(seed=st.integers(0, 1000), padded=st.booleans())
def test_counted_rows_are_those_with_a_label(name, seed, padded):
    inputs = text(seed=seed, padded=padded)
    shift = 1 if name in ("gpt2", "llama") else 0
    expected = []
    for b in range(3):
        for i in range(6 - shift):
            if inputs["labels"][b, i + shift] != -100:
                expected.append((6 * b + i, inputs["labels"][b, i + shift].item()))
    rows, labels = counted_rows(MODELS[name], inputs)
    assert list(zip(rows.tolist(), labels.tolist(), strict=True)) == expected
    assert count(MODELS[name], inputs)[1] == len(expected)


@given(seed=st.integers(0, 1000))
def test_without_labels_every_real_token_counts(seed):
    inputs = text(seed=seed, labels=None)
    rows, labels = counted_rows(MODELS["bert"], inputs)
    expected = [6 * b + i for b in range(3) for i in range(6) if inputs["attention_mask"][b, i]]
    assert rows.tolist() == expected
    assert labels is None
    assert count(MODELS["bert"], inputs).tolist() == [len(expected)] * 2


def test_without_labels_or_mask_every_row_counts():
    inputs = text(labels=None, padded=False)
    assert counted_rows(MODELS["bert"], inputs) == (None, None)
    assert count(MODELS["bert"], inputs).tolist() == [18, 18]


def test_a_classifiers_rows_are_its_examples():
    inputs = text(labels="examples")
    rows, labels = counted_rows(MODELS["bert-classifier"], inputs)
    assert (rows.tolist(), labels.tolist()) == ([0, 2], [1, 0])
    assert count(MODELS["bert-classifier"], inputs).tolist() == [inputs["attention_mask"].sum(), 2]
    unlabelled = text(labels=None)
    assert counted_rows(MODELS["bert-classifier"], unlabelled) == (None, None)
    assert count(MODELS["bert-classifier"], unlabelled)[1] == 3


@pytest.mark.parametrize("labels", [torch.rand(3), torch.rand(3, 4), torch.zeros(3, 4, 2, dtype=torch.long)])
def test_labels_that_are_no_classes_are_refused(labels):
    inputs = text(labels=None) | {"labels": labels}
    with pytest.raises(ValueError, match=r"labels are .*class numbers of shape \[batch\] or \[batch, length\]"):
        counted_rows(MODELS["bert"], inputs)
    with pytest.raises(ValueError, match="class numbers"):
        count(MODELS["bert"], inputs)


def audio(padded):
    inputs = {"input_values": torch.randn(3, 400), "labels": torch.tensor([0, 1, 2])}
    if padded:
        inputs["attention_mask"] = (torch.arange(400) < torch.tensor([[400], [300], [200]])).long()
    return inputs


def test_text_weighs_its_tokens_and_other_inputs_their_examples():
    inputs = text()
    assert torch.equal(position_weights(MODELS["bert"], inputs, torch.zeros(3, 6, 8)), inputs["attention_mask"].bool())
    image = {"pixel_values": torch.randn(3, 3, 16, 16)}
    torch.testing.assert_close(position_weights(MODELS["vit"], image, torch.zeros(3, 5, 8)), torch.full((3, 5), 0.2))


def test_padded_sound_shares_its_example_among_the_states_it_reaches():
    inputs = audio(padded=True)
    weights = position_weights(MODELS["wav2vec2"], inputs, torch.zeros(3, 18, 8))
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    reached = (weights > 0).sum(1).tolist()
    # two convolutions without padding: kernel 10, stride 5, then kernel 8, stride 4
    assert reached == [((samples - 10) // 5 + 1 - 8) // 4 + 1 for samples in (400, 300, 200)]
    for row, length in zip(weights, reached, strict=True):
        torch.testing.assert_close(row[:length], torch.full((length,), 1 / length))


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 6\) but the hidden states \(3, 7\)"):
        position_weights(MODELS["bert"], text(), torch.zeros(3, 7, 8))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_without_labels_nothing_says_what_a_decoder_predicts(name):
    with pytest.raises(ValueError, match=f"no labels, but the logits of {type(MODELS[name]).__name__} predict"):
        counted_rows(MODELS[name], text(labels=None))


@st.composite
def batches(draw, name, size=4, length=6):
    """A random batch for a model, labelled or not, padded or not, and the shape of its hidden states."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    if name == "vit":
        inputs, states = {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}, 5
    elif name == "wav2vec2":
        inputs, states = {"input_values": torch.randn(size, 400, generator=generator)}, 18
        if draw(st.booleans()):
            samples = torch.randint(50, 401, (size, 1), generator=generator)  # 45 make the first hidden state
            inputs["attention_mask"] = (torch.arange(400) < samples).long()
    else:
        inputs, states = text(size, length, draw(st.integers(0, 10**6)), None, draw(st.booleans())), length
    if MODELS[name].config.is_encoder_decoder or draw(st.booleans()):  # only labels say what a decoder predicts
        per_token = has_rows_per_token(MODELS[name], inputs)
        labels = torch.randint(-2, 2, (size, length) if per_token else (size,), generator=generator)
        inputs["labels"] = torch.where(labels < 0, -100, labels)
    return inputs, torch.zeros(size, states, 8)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), cuts=st.sets(st.integers(1, 3)))
def test_what_counts_in_the_parts_of_a_batch_is_what_counts_in_the_whole(name, data, cuts):
    inputs, hidden = data.draw(batches(name))
    model, edges = MODELS[name], [0, *sorted(cuts), len(hidden)]
    rows, labels = counted_rows(model, inputs)
    rows_an_example = hidden.shape[1] if has_rows_per_token(model, inputs) else 1
    counts, part_rows, part_labels, part_weights = [], [], [], []
    for start, end in itertools.pairwise(edges):
        part = {name: tensor[start:end] for name, tensor in inputs.items()}
        counts.append(count(model, part))
        counted = counted_rows(model, part)
        every = torch.arange((end - start) * rows_an_example)
        part_rows.append((every if counted[0] is None else counted[0]) + start * rows_an_example)
        part_labels.append(counted[1])
        part_weights.append(position_weights(model, part, hidden[start:end]))
    assert torch.equal(sum(counts), count(model, inputs))
    assert torch.equal(torch.cat(part_rows), torch.arange(len(hidden) * rows_an_example) if rows is None else rows)
    assert part_labels == [None] * len(counts) if labels is None else torch.equal(torch.cat(part_labels), labels)
    weights = position_weights(model, inputs, hidden)
    assert weights.shape == hidden.shape[:2]
    torch.testing.assert_close(torch.cat(part_weights), weights)
    num_positions, num_rows = count(model, inputs).tolist()
    assert weights.sum().item() == pytest.approx(num_positions, rel=1e-6)
    assert len(torch.cat(part_rows)) == num_rows


# ---- places of labels ----


@given(seed=st.integers(0, 1000), size=st.integers(1, 4), count=st.integers(0, 6), uneven=st.booleans())
def test_places_are_given_where_every_example_has_as_many_labels_and_say_which_rows_count(seed, size, count, uneven):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (size, 6), generator=generator)
    labels = torch.full_like(ids, -100)
    for row in range(size):
        number = (count + 1) % 7 if uneven and row == size - 1 else count
        chosen = torch.randperm(6, generator=generator)[:number]
        labels[row, chosen] = ids[row, chosen]
    plain = {"input_ids": ids, "labels": labels}
    batch = with_label_positions(lambda examples: plain, [{"input_ids": row} for row in ids])
    if uneven and size > 1:
        assert batch == plain
        return
    assert batch[LABEL_POSITIONS].shape == (size, (labels[0] != -100).sum())
    for actual, expected in zip(counted_rows(MODELS["bert"], batch), counted_rows(MODELS["bert"], plain), strict=True):
        assert torch.equal(actual, expected)


def test_labels_that_were_there_before_and_labels_of_examples_have_no_places():
    tokens, examples = text(padded=False) | {"labels": torch.ones(3, 6, dtype=torch.long)}, text(labels="examples")
    brought = [{"labels": row} for row in tokens["labels"]]
    for batch, rows in ((tokens, brought), (examples, [{}]), (text(labels=None), [{}])):
        assert with_label_positions(lambda _, batch=batch: batch, rows) == batch
    assert LABEL_POSITIONS in with_label_positions(lambda _: tokens, [{}])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_places_are_no_rows_of_models_that_predict_one_token_earlier(name):
    plain = text(padded=False) | {"labels": torch.ones(3, 6, dtype=torch.long)}
    batch = with_label_positions(lambda _: plain, [{}])
    for actual, expected in zip(counted_rows(MODELS[name], batch), counted_rows(MODELS[name], plain), strict=True):
        assert torch.equal(actual, expected)


# ---- rows before the head ----


@functools.cache
def whole_forward(name):
    model, _, batch = build(name)
    model = model.double()  # so that the order of a sum's terms is no difference
    return model.eval(), batch, model(**batch).logits.detach().flatten(0, -2)


def head_gradients(model, logits, seed):
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    (logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("name", ["bert", "bert-tagger", "modernbert", "gpt2", "opt", "t5"])
@settings(deadline=None, max_examples=12)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_rows_in_any_order_and_number_are_the_full_logits_rows(name, data, seed):
    model, batch, logits = whole_forward(name)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=20)), dtype=torch.long)
    partial = PartialForward(model)
    _, picked = partial(model, batch, logits=True, rows=rows, gather=True)
    gradients = head_gradients(model, picked, seed)
    partial.remove()
    torch.testing.assert_close(picked, logits[rows], rtol=1e-9, atol=1e-12)
    expected = head_gradients(model, model(**batch).logits.flatten(0, -2)[rows], seed)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-9, atol=1e-12)


# ---- hidden states where a label counts ----


@pytest.mark.parametrize("name, classes", [("bert", 99), ("bert-tagger", 2), ("gpt2", 99), ("llama", 99)])
@given(seed=st.integers(0, 1000), padded=st.booleans())
def test_a_label_is_predicted_by_the_hidden_state_its_logits_come_from(name, classes, seed, padded):
    inputs = text(seed=seed, padded=padded, classes=classes)
    shift = 1 if name in ("gpt2", "llama") else 0
    expected = torch.zeros(3, 6)
    for b in range(3):
        for i in range(6 - shift):
            if inputs["labels"][b, i + shift] != -100:
                expected[b, i] = 1
    counted = label_weights(MODELS[name], inputs, torch.zeros(3, 6, 8))
    assert torch.equal(counted.float(), expected)
    assert counted.sum() == count(MODELS[name], inputs)[1]
    assert counted.flatten().nonzero().squeeze(1).tolist() == counted_rows(MODELS[name], inputs)[0].tolist()


@pytest.mark.parametrize(
    "name, inputs, shown",
    [
        ("bert", text(labels=None), "no labels"),
        ("bert-classifier", text(labels="examples"), r"labels of shape \(3,\)"),
        ("bert", text() | {"labels": torch.zeros(3, 4, dtype=torch.long)}, r"labels of shape \(3, 4\)"),
    ],
)
def test_labels_that_are_not_one_a_token_cannot_choose_hidden_states(name, inputs, shown):
    with pytest.raises(
        ValueError, match=rf"hidden_positions='labels' .* has {shown} for hidden states of shape \(3, 6\)"
    ):
        label_weights(MODELS[name], inputs, torch.zeros(3, 6, 8))


def gpt2(depth, width, seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "n_embd": width, "n_layer": depth, "n_head": 2, "n_positions": 16}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=1, eos_token_id=2, initializer_range=0.2))


def pair(task):
    if task == "causal":
        return gpt2(2, 16, seed=1), gpt2(4, 24, seed=2)
    return tiny_bert(2, seed=1), tiny_bert(4, width=24, seed=2, initializer_range=0.3)


def rows_by_hand(task, model, number, batch):
    """The hidden states after a block at positions that predict a label, picked one by one: `[rows, width]`."""
    blocks = model.transformer.h if task == "causal" else model.bert.encoder.layer
    kept = []
    hook = blocks[number - 1].register_forward_hook(lambda _, args, out: kept.append(out))
    model(**batch)
    hook.remove()
    hidden, shift = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0], 1 if task == "causal" else 0
    chosen = []
    for b, labels in enumerate(batch["labels"].tolist()):
        for i in range(len(labels) - shift):
            if labels[i + shift] != -100:
                chosen.append(hidden[b, i])
    return torch.stack(chosen)


HIDDEN = [{"hidden": [[1, 2], [2, 4]]}]


@pytest.mark.parametrize("task", ["masked", "causal"])
def test_matching_where_labels_count_is_a_slow_reference_s_loss_and_gradient(config, examples, task):
    student, teacher = pair(task)
    reference, batch = copy.deepcopy(student), default_collate(examples[:16])
    fields = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}
    args = config(
        stages=HIDDEN, hidden_positions="labels", per_device_train_batch_size=16, calibration_samples=16, **fields
    )
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=examples[:16], teacher_model=teacher)
    before = weights(student)
    trainer.train()

    bank, losses = trainer.projection_bank.tensors(), []
    for ours, theirs in ((1, 2), (2, 4)):
        with torch.no_grad():
            states = rows_by_hand(task, teacher, theirs, batch)
        projected = states.double() @ bank[f"layer_{ours}_{theirs}.weight"].double().T
        # what calibration measured is those positions' mean and deviation, of all 16 examples
        mean, std = projected.mean(0), projected.std(0, correction=0)
        torch.testing.assert_close(bank[f"layer_{ours}_{theirs}.mean"].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bank[f"layer_{ours}_{theirs}.std"].double(), std, rtol=1e-4, atol=1e-5)
        target = ((projected - mean) / std).float()
        losses.append((rows_by_hand(task, reference, ours, batch) - target).square().mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["hidden_mse"] == pytest.approx(loss.item(), rel=1e-4)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in reference.named_parameters():
        moved = before[name] - student.state_dict()[name]
        expected = torch.zeros_like(moved) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("task", ["masked", "causal"])
def test_matching_where_labels_count_does_not_depend_on_how_the_batch_is_cut(config, examples, task):
    student, teacher = pair(task)
    stages = [{**HIDDEN[0], "until": 2}, {"hidden": [[2, 4]], "hidden_weight": 0.5, "kl_weight": 1.0}]
    runs = []
    for size in (8, 4, 1):
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 4}
        args = config(f"{size}", stages=stages, hidden_positions="labels", optim="sgd", max_grad_norm=1e9, **fields)
        trainer = CurriculumDistillationTrainer(
            copy.deepcopy(student), args, train_dataset=examples, teacher_model=teacher
        )
        trainer.train()
        runs.append([log for log in trainer.state.log_history if "loss" in log])
    for cut in runs[1:]:
        for actual, expected in zip(cut, runs[0], strict=True):
            for name in ("loss", "grad_norm", "hidden_mse"):
                assert actual[name] == pytest.approx(expected[name], rel=1e-3)


def test_tokens_and_labels_are_different_places(config, examples, student, teacher):
    losses = {}
    for positions in ("tokens", "labels"):
        args = config(positions, stages=HIDDEN, hidden_positions=positions, learning_rate=0.0, max_steps=1)
        trainer = CurriculumDistillationTrainer(
            copy.deepcopy(student), args, train_dataset=examples, teacher_model=teacher
        )
        trainer.train()
        losses[positions] = trainer.state.log_history[0]["hidden_mse"], trainer.projection_bank.fingerprint
    assert losses["tokens"][0] != pytest.approx(losses["labels"][0], rel=1e-3)
    assert losses["tokens"][1] != losses["labels"][1]


def test_a_classifier_has_no_place_where_labels_count(config, examples):
    data = [example | {"labels": torch.tensor(index % 3)} for index, example in enumerate(examples)]
    kind = {"model_class": BertForSequenceClassification, "num_labels": 3}
    args = config(stages=HIDDEN, hidden_positions="labels")
    trainer = CurriculumDistillationTrainer(
        tiny_bert(2, seed=1, **kind), args, train_dataset=data, teacher_model=tiny_bert(4, seed=2, **kind)
    )
    with pytest.raises(ValueError, match=r"labels of shape \(4,\) for .* use hidden_positions='tokens'"):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- how much a layer stage counts ----


def test_a_weight_of_layer_stages_scales_their_loss_and_with_sgd_their_learning_rate(
    config, examples, student, teacher
):
    def run(folder, **fields):
        args = config(folder, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", max_steps=4, **fields)
        made = copy.deepcopy(student)
        trainer = CurriculumDistillationTrainer(made, args, train_dataset=examples, teacher_model=teacher)
        trainer.train()
        return weights(made), [log for log in trainer.state.log_history if "loss" in log], trainer

    # 4 = 2^2: exact, whatever is scaled. Layers alone, so that one learning rate is all there is
    layers = [{"hidden": [[1, 2]], "until": 2}, {"hidden": [[2, 4]]}]
    weighted = run("a", stages=[stage | {"hidden_weight": 4.0} for stage in layers], learning_rate=0.05)
    faster = run("b", stages=layers, learning_rate=0.2)
    assert_same_weights(weighted[0], faster[0], rtol=1e-5, atol=1e-7)
    for heavy, plain in zip(weighted[1], faster[1], strict=True):
        assert heavy["hidden_mse"] == pytest.approx(plain["hidden_mse"], rel=1e-5)
        assert heavy["loss"] == pytest.approx(4 * plain["loss"], rel=1e-5)
        assert heavy["grad_norm"] == pytest.approx(4 * plain["grad_norm"], rel=1e-5)

    fields = {"hidden_weight": 4.0, "hidden_weight_in_logit_stage": 0.5, "learning_rate": 0.05}
    _, logs, trainer = run("c", **fields)
    assert [stage.hidden_weight for stage in trainer.stages] == [4.0, 4.0, 0.5]
    ratios = [log["loss"] / log["hidden_mse"] for log in logs if "kl" not in log]
    assert np.allclose(ratios, 4.0, rtol=1e-5)
    for log in logs[2:]:
        assert log["loss"] == pytest.approx(log["kl"] + 0.5 * log["hidden_mse"], rel=1e-5)
    assert [log["loss"] for log in logs[:1]] == pytest.approx([4 * run("d")[1][0]["loss"]], rel=1e-5)
