"""Heads of transformers: each trains with the numbers of a computation by hand, or is refused before the first step.

`pytest -m sweep -n 2` tries all of them; `python tests/heads.py` writes what becomes of each into docs/heads.md.
"""

import pytest
import torch
from heads import UNLABELLED, Outputs, all_heads, batch_of, build, counted_rows, divergence, judge

HEADS = {(head.model_type, head.class_name, head.variant): head for head in all_heads()}

# one of each task, and those whose loss reads labels, or adds terms, as no other of the task does
TRAINS = [
    ("albert", "AlbertForMaskedLM"),
    ("bart", "BartForCausalLM"),  # a causal model whose loss doesn't shift labels
    ("bart", "BartForConditionalGeneration"),
    ("bart", "BartForSequenceClassification"),  # an encoder-decoder that makes its decoder's inputs from the encoder's
    ("bert", "BertForMultipleChoice"),
    ("bert", "BertForNextSentencePrediction"),
    ("bert", "BertForQuestionAnswering"),
    ("bert", "BertForSequenceClassification", "multi_label_classification"),
    ("bert", "BertForSequenceClassification", "regression"),
    ("bert", "BertLMHeadModel"),
    ("deberta-v2", "DebertaV2ForTokenClassification"),
    ("gpt2", "GPT2LMHeadModel"),
    ("llama", "LlamaForSequenceClassification"),
    ("m2m_100", "M2M100ForConditionalGeneration"),  # has no prepare_decoder_input_ids_from_labels
    ("mixtral", "MixtralForCausalLM"),  # an auxiliary loss
    ("qwen2_vl", "Qwen2VLForConditionalGeneration"),  # shifts labels though its task is conditional generation
    ("vit", "ViTForImageClassification"),
    ("wav2vec2", "Wav2Vec2ForCTC", UNLABELLED),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification", "regression"),  # whose own loss takes no numbers
    ("whisper", "WhisperForConditionalGeneration"),
]
REFUSED = [
    ("beit", "BeitForSemanticSegmentation"),
    ("bert", "BertForPreTraining"),
    ("bert", "BertModel"),
    ("blip", "BlipForQuestionAnswering"),  # makes its decoder's inputs of the labels, which no model is given
    ("resnet", "ResNetForImageClassification"),
    ("vit", "ViTForMaskedImageModeling"),
    ("wav2vec2", "Wav2Vec2ForAudioFrameClassification"),
    ("wav2vec2", "Wav2Vec2ForCTC"),
    ("wav2vec2", "Wav2Vec2ForXVector"),
]


def named(names):
    head = HEADS[(*names, None)[:3]]
    return pytest.param(head, id=str(head))


@pytest.mark.parametrize("head", map(named, TRAINS))
def test_a_head_trains_with_the_numbers_of_its_own_loss_and_logits(head, tmp_path):
    verdict = judge(head, tmp_path)
    assert verdict.outcome == "trains", verdict.reason


@pytest.mark.parametrize("head", map(named, REFUSED))
def test_a_head_is_refused_before_the_first_step(head, tmp_path):
    verdict = judge(head, tmp_path)
    assert verdict.outcome == "refused", verdict.reason


@pytest.mark.sweep
@pytest.mark.parametrize("head", HEADS.values(), ids=str)
def test_every_head_trains_right_or_is_refused(head, tmp_path):
    verdict = judge(head, tmp_path)
    if verdict.outcome == "not tried":
        pytest.skip(verdict.reason)
    assert verdict.outcome in ("trains", "refused"), verdict.reason


@pytest.mark.parametrize("names, shift", [(("gpt2", "GPT2LMHeadModel"), 1), (("bart", "BartForCausalLM"), 0)])
def test_the_models_own_loss_says_which_rows_count(names, shift):
    head = HEADS[(*names, None)]
    model = build(head, seed=1)
    batch = batch_of(model, head)
    with torch.no_grad():
        rows = counted_rows(model, batch, Outputs.of(model, batch))
    labels = batch["labels"]
    assert torch.equal(rows.picked[:, : labels.shape[1] - shift], labels[:, shift:] != -100)
    assert torch.equal(rows.labels, labels[:, shift:][labels[:, shift:] != -100])


def test_the_divergence_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log_softmax(-1)
    p = teacher.exp()[0]
    assert divergence(student, teacher) == pytest.approx((p * (p / 0.5).log()).sum().item())
    assert divergence(teacher, teacher) == 0
