import random

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from hf_curriculum_distill.cost import count_flops

LAYERS, HIDDEN, WIDE, VOCABULARY, BATCH, LENGTH = 2, 64, 256, 100, 2, 32


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_counted_operations_are_the_closed_form_of_every_matrix_product(dropout):
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=WIDE,
            attention_probs_dropout_prob=dropout,
        )
    )
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    block = 4 * HIDDEN**2 + 2 * HIDDEN * WIDE
    head = HIDDEN**2 + HIDDEN * VOCABULARY
    attention = 2 * LENGTH * HIDDEN
    per_token = [2 * (LAYERS * block + head), 2 * LAYERS * attention]
    for mode in (model.train(), model.eval()):
        assert (count_flops(lambda mode=mode: ({}, mode(input_ids=ids))) == np.array(per_token) * BATCH * LENGTH).all()


def test_counting_leaves_every_random_state_as_it_was():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def state():
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = state()
    count_flops(lambda: (draw(), None))
    assert state() == before
