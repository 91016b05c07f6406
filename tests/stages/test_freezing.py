"""What a stage freezes, and what it has finished with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_curriculum_distill import Stage
from hf_curriculum_distill.stages import finished_layer, frozen_layer

ORDERED = [Stage(hidden=[(1, 2)]), Stage(hidden=[(1, 2), (2, 4)]), Stage(hidden=[(4, 8)]), Stage(kl_weight=1.0)]


def test_a_layer_is_finished_once_a_higher_one_is_matched():
    assert [finished_layer(ORDERED, index) for index in range(4)] == [None, 1, 2, None]
    back = [Stage(hidden=[(4, 8)]), Stage(hidden=[(2, 4)]), Stage(hidden=[(4, 8)])]
    assert [finished_layer(back, index) for index in range(3)] == [None, None, 2]
    from_embeddings = [Stage(hidden=[(0, 0)]), Stage(hidden=[(1, 2)])]
    assert [finished_layer(from_embeddings, index) for index in range(2)] == [None, 0]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, [None, None, None, None]),
        ({"train_prefix": "block"}, [None, 1, 2, None]),
        ({"train_prefix": "independent"}, [None, None, None, None]),
        ({"freeze_matched_layers": True}, [None, None, None, 4]),
        ({"freeze_embeddings_in_layer_stages": True}, [0, 0, 0, None]),
        ({"freeze_embeddings_in_layer_stages": True, "freeze_matched_layers": True}, [0, 0, 0, 4]),
        ({"freeze_embeddings_in_layer_stages": True, "train_prefix": "block"}, [0, 1, 2, None]),
    ],
    ids=str,
)
def test_frozen_layers(fields, expected):
    assert [frozen_layer(ORDERED, index, **fields) for index in range(4)] == expected


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.data())
def test_a_stage_always_trains_the_block_that_it_matches(layers, data):
    stages = [Stage(hidden=[(layer, layer)]) for layer in layers]
    index = data.draw(st.integers(0, len(stages) - 1))
    for frozen in (finished_layer(stages, index), frozen_layer(stages, index, train_prefix="block")):
        assert frozen is None or frozen < layers[index]
