"""What counts: rows and positions against plain loops, and the two sides of one fraction."""

import pytest
import torch
from architectures import build
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill.counting import (
    answers_per_token,
    count,
    counted_rows,
    position_weights,
    predicts_next_token,
)

MODELS = {name: build(name)[0] for name in ("bert", "bert-classifier", "bert-tagger", "llama", "gpt2", "t5", "bart")}
MODELS |= {name: build(name)[0] for name in ("llama-classifier", "vit", "wav2vec2")}


def text(batch=3, length=6, seed=0, labels="tokens", padded=True):
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, 99, (batch, length), generator=generator)}
    if padded:
        lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
        inputs["attention_mask"] = (torch.arange(length) < lengths).long()
    if labels == "tokens":
        keep = torch.rand(batch, length, generator=generator) < 0.5
        inputs["labels"] = torch.where(keep, inputs["input_ids"], -100)
    elif labels == "examples":
        inputs["labels"] = torch.tensor([1, -100, 0])
    return inputs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_decoders_predict_the_next_token(name):
    assert predicts_next_token(MODELS[name])


@pytest.mark.parametrize("name", ["bert", "bert-tagger", "t5", "bart", "vit", "llama-classifier"])
def test_others_answer_in_place(name):
    assert not predicts_next_token(MODELS[name])


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
def test_answers_are_one_a_token_or_one_an_example(name, labels, per_token):
    assert answers_per_token(MODELS[name], text(labels=labels)) == per_token


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


@pytest.mark.parametrize(
    "name, inputs, shape",
    [
        ("bert", text(), (3, 6)),
        ("bert", text(padded=False), (3, 6)),
        ("bert-classifier", text(labels="examples"), (3, 6)),
        ("t5", text(), (3, 6)),
        ("vit", {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}, (3, 5)),
        ("wav2vec2", audio(padded=False), (3, 18)),
        ("wav2vec2", audio(padded=True), (3, 18)),
    ],
)
def test_position_weights_sum_to_the_count(name, inputs, shape):
    weights = position_weights(MODELS[name], inputs, torch.zeros(*shape, 8))
    assert weights.shape == shape
    assert weights.sum().item() == pytest.approx(count(MODELS[name], inputs)[0].item(), rel=1e-6)


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


@given(cut=st.integers(1, 2), seed=st.integers(0, 1000))
def test_the_counts_of_the_parts_add_up_to_the_whole(cut, seed):
    inputs = text(seed=seed)
    parts = [{name: tensor[part] for name, tensor in inputs.items()} for part in (slice(cut), slice(cut, None))]
    whole = count(MODELS["bert"], inputs)
    assert torch.equal(sum(count(MODELS["bert"], part) for part in parts), whole)
