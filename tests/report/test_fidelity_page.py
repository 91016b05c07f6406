"""The page of a report: numbers, layers, and examples whose tokens are marked."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_curriculum_distill.report.fidelity import Example, Fidelity
from hf_curriculum_distill.report.fidelity_page import fidelity_page
from report.test_page import Reader


@pytest.fixture
def tokenizer():
    words = ["[UNK]", "[MASK]", "the", "cat", "##s", "<b>"]
    vocabulary = models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(vocabulary), unk_token="[UNK]", mask_token="[MASK]")


def rows(**columns):
    of_row = {"student": [2, 3], "teacher": [4, 3], "label": [4, 5], "position": [2, 3], "kl": [0.5, 0.25]}
    of_row |= {"student_confidence": [0.5, 0.25], "teacher_confidence": [0.75, 0.25]}
    return {name: np.array(values) for name, values in (of_row | columns).items()}


METRICS = {"eval_agreement": 0.5, "eval_kl": 0.375, "eval_layer_1_mse": 0.25, "eval_ece": 0.125}


def test_tokens_are_marked_by_how_much_the_two_differ(tokenizer):
    example = Example(7, 0.375, np.array([2, 3, 1, 1]), rows())
    page = fidelity_page(Fidelity(METRICS, ((1, 2),), rows(), [example]), "title", "note", tokenizer, {})
    (text,) = re.findall('<p class="text">(.*?)</p>', page.decode())
    marks = re.findall('<mark style="--share: (.*?)" title="(.*?)">(.*?)</mark>', text)
    assert re.sub("<.*?>", "", text) == " the cats &lt;b&gt;"  # what was right, in place of the masks
    assert [(share, shown) for share, _, shown in marks] == [("60%", "s"), ("30%", "&lt;b&gt;")]
    assert marks[0][1] == "student: the (0.50), teacher: ##s (0.75), KL 0.500"
    read = Reader(page)
    assert not read.foreign and not read.open
    assert {"Example 7, KL 0.375", "1 ← 2", "0.2500", "0.1250", "##s (0.75)"} <= {*read.text}
    assert page.count(b"<figure>") == 2


def test_classes_are_called_by_their_names_and_labels_may_be_missing():
    predicted = rows(student=[0, 1], teacher=[1, 1], label=[-1, -1], position=[-1, -1])
    example = Example(0, 0.375, np.array([2, 3]), predicted)
    classes = {0: "negative", 1: "positive"}
    page = fidelity_page(Fidelity(METRICS, (), predicted, [example]), "title", "note", None, classes)
    text = Reader(page).text
    assert {"negative (0.50)", "positive (0.75)"} <= {*text} and "accuracy" not in text
    assert b"<mark" not in page and page.count(b"<figure>") == 1  # no reliability without labels
