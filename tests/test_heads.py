"""Heads of transformers: each trains with the numbers of a computation by hand, or is refused before the first step.

`pytest -m sweep -n 2` tries all of them; `python tests/heads.py` writes what becomes of each into docs/heads.md.
"""

import pytest
from heads import all_heads, judge

HEADS = {(head.model_type, head.class_name, head.variant): head for head in all_heads()}

# one of each task, and those whose loss reads labels, or adds terms, as no other of the task does
TRAINS = [
    ("albert", "AlbertForMaskedLM"),
    ("bart", "BartForConditionalGeneration"),
    ("bert", "BertForNextSentencePrediction"),
    ("bert", "BertLMHeadModel"),
    ("deberta-v2", "DebertaV2ForTokenClassification"),
    ("gpt2", "GPT2LMHeadModel"),
    ("llama", "LlamaForSequenceClassification"),
    ("vit", "ViTForImageClassification"),
    ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
]
REFUSED = [
    ("bert", "BertForMultipleChoice"),
    ("bert", "BertForPreTraining"),
    ("bert", "BertForQuestionAnswering"),
    ("bert", "BertForSequenceClassification", "multi_label_classification"),
    ("bert", "BertForSequenceClassification", "regression"),
    ("beit", "BeitForSemanticSegmentation"),
    ("resnet", "ResNetForImageClassification"),
    ("wav2vec2", "Wav2Vec2ForAudioFrameClassification"),
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
