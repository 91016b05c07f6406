"""Separate random states: what is drawn in one changes nothing in another."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_curriculum_distill.batches.randomness import RandomStream, preserved_random_state, seed_host


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def state():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_seeded_blocks_leave_every_random_state_as_it_was():
    before = state()
    with preserved_random_state(7):
        first = draw()
    with pytest.raises(KeyError), preserved_random_state(7):
        assert draw() == first
        raise KeyError
    assert state() == before


def test_a_block_without_a_seed_starts_from_the_present_states_and_other_seeds_start_elsewhere():
    with preserved_random_state():
        first = draw()
    with preserved_random_state(1), preserved_random_state(2):
        second = draw()
    assert draw() == first
    assert not set(first) & set(second)


objects = st.lists(st.one_of(st.integers(), st.text(), st.booleans(), st.none()), max_size=3).map(tuple)


@settings(max_examples=15)
@given(one=objects, other=objects)
def test_the_hosts_generators_start_alike_iff_their_seeds_are_written_alike(one, other):
    with preserved_random_state():
        seed_host(*one)
        first = draw()
        draw()
        seed_host(*other)
        second = draw()
    assert [a == b for a, b in zip(first, second, strict=True)] == [repr(one) == repr(other)] * 3


def test_a_seed_is_the_same_number_in_every_process():
    # Python hashes text otherwise in each process
    with preserved_random_state():
        seed_host("epoch", 3)
        assert [round(number, 6) for number in draw()] == [0.5851, 0.313265, 0.195796]


@given(turns=st.lists(st.integers(0, 2), max_size=8))
def test_streams_in_turns_draw_what_each_draws_alone(turns):
    def alone(number):
        with preserved_random_state():
            seed_host(number)
            return [draw() for _ in range(turns.count(number))]

    with preserved_random_state():
        expected = [alone(number) for number in range(3)]
        streams, drawn = [RandomStream() for _ in range(3)], [[], [], []]
        for number, stream in enumerate(streams):
            stream.restart(number)
        outside = []
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()
        for number in turns:
            outside.append(draw())
            with streams[number]:
                drawn[number].append(draw())
        random.setstate(before[0])
        torch.set_rng_state(before[1])
        np.random.set_state(before[2])
        seen = [draw() for _ in turns]
    assert drawn == expected
    assert outside == seen  # and the host's own draws are those without streams


def test_a_stream_stops_where_an_error_leaves_it():
    before, stream = state(), RandomStream()
    stream.restart(5)
    with pytest.raises(KeyError), stream:
        draw()
        raise KeyError
    assert state() == before
    with stream:
        second = draw()
    with preserved_random_state():
        seed_host(5)
        draw()
        assert draw() == second


def test_a_restarted_stream_draws_the_same_again():
    stream, drawn = RandomStream(), []
    for _ in range(2):
        stream.restart(0, "data")
        with stream:
            drawn.append([draw() for _ in range(3)])
    assert drawn[0] == drawn[1]
