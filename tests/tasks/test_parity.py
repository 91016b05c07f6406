"""Sparse parity: every label against brute force, bits that are random and repeatable, the network, what it costs."""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import assert_same_weights, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.tasks.parity import (
    ParityMLPConfig,
    ParityMLPForSequenceClassification,
    SparseParity,
    draw_support,
    random_bits,
    stack,
)


@st.composite
def tasks(draw):
    dimension = draw(st.integers(1, 200))
    support = draw(st.lists(st.integers(0, dimension - 1), min_size=1, max_size=8, unique=True))
    return {"dimension": dimension, "support": support, "seed": draw(st.integers(0, 2**63))}


indices = st.lists(st.integers(0, 999_999_999), min_size=1, max_size=5)


def draw_bits(seed, count, num_bits=50):
    return random_bits(seed, np.arange(count, dtype=np.uint64), num_bits)


# ---- the task ----


@given(task=tasks(), index=st.integers(0, 999_999_999))
@settings(max_examples=60, deadline=None)
def test_the_label_is_the_parity_of_the_support(task, index):
    row = SparseParity(1_000_000_000, **task)[index]
    product = 1
    for i in task["support"]:
        product *= int(row["inputs"][i])
    assert row["labels"].item() == {1: 1, -1: 0}[product]
    assert row["inputs"].shape == (task["dimension"],) and row["inputs"].dtype == torch.float32
    assert set(row["inputs"].tolist()) <= {-1.0, 1.0}
    assert row["labels"].shape == () and row["labels"].dtype == torch.int64


@given(task=tasks(), index=st.integers(0, 999_999_999))
@settings(max_examples=40, deadline=None)
def test_as_tokens_a_row_is_the_bits_then_the_parity_that_alone_has_a_label(task, index):
    row = SparseParity(1_000_000_000, **task)[index]
    tokens = SparseParity(1_000_000_000, **task, as_tokens=True)[index]
    bits = [int(x > 0) for x in row["inputs"]]
    assert tokens["input_ids"].tolist() == [*bits, row["labels"].item()]
    assert tokens["labels"].tolist() == [-100] * task["dimension"] + [row["labels"].item()]


@pytest.mark.parametrize("as_tokens", [False, True])
@given(task=tasks(), chosen=indices)
@settings(max_examples=30, deadline=None)
def test_a_batch_is_its_rows_stacked(task, chosen, as_tokens):
    data = SparseParity(1_000_000_000, **task, as_tokens=as_tokens)
    batch, rows = data.__getitems__(chosen), [data[index] for index in chosen]
    collated = stack(rows)
    assert batch.keys() == rows[0].keys() == collated.keys()
    for name, values in batch.items():
        assert torch.equal(values, torch.stack([row[name] for row in rows]))
        assert torch.equal(values, collated[name])
    assert stack(batch) is batch


@given(task=tasks(), index=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_row_depends_on_seed_and_number_alone(task, index):
    expected = SparseParity(100, **task)[index]
    torch.manual_seed(index), np.random.seed(index)
    longer = SparseParity(10_000, **task)
    longer.__getitems__([99, 7, 99])
    assert torch.equal(longer[index]["inputs"], expected["inputs"])
    another = task | {"support": [0]}
    assert torch.equal(SparseParity(100, **another)[index]["inputs"], expected["inputs"])


def test_a_loader_passes_whole_batches_on():
    data = SparseParity(23, 10, [1, 4], seed=3)
    loaded = list(DataLoader(data, batch_size=5, collate_fn=stack, shuffle=True, generator=torch.Generator()))
    assert [len(batch["labels"]) for batch in loaded] == [5, 5, 5, 5, 3]
    rows = {tuple(row.tolist()) for batch in loaded for row in batch["inputs"]}
    assert rows == {tuple(data[index]["inputs"].tolist()) for index in range(23)}
    assert len(data) == 23


@pytest.mark.parametrize("index", [-1, 23, 10**9])
def test_a_set_ends_where_it_says(index):
    with pytest.raises(IndexError, match=rf"Example {index} of a set of 23"):
        SparseParity(23, 10, [1, 4], seed=3)[index]


@pytest.mark.parametrize("support", [[], [1, 1], [-1, 2], [0, 10], [11]], ids=str)
def test_a_support_that_is_none_is_refused(support):
    with pytest.raises(ValueError, match=r"support is \[.*\]; it must name different coordinates between 0 and 9"):
        SparseParity(5, 10, support, seed=0)


@given(dimension=st.integers(1, 100), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_drawn_support_is_sorted_different_coordinates(dimension, seed, data):
    sparsity = data.draw(st.integers(1, dimension))
    support = draw_support(dimension, sparsity, seed)
    assert support == sorted(set(support)) and len(support) == sparsity
    assert set(support) <= set(range(dimension))
    assert draw_support(dimension, sparsity, seed) == support


def test_other_seeds_draw_other_supports():
    assert len({tuple(draw_support(50, 6, seed)) for seed in range(50)}) == 50


# ---- the bits ----


@pytest.mark.parametrize(
    "seed, num_bits, digest",
    [
        (7, 50, "be39c6e7c853a17182f0053fe1aede65c37e3d5460d5046230c07ddab7448a23"),
        (2**40, 130, "f89c0e3d26ebfd5555daa6ffaa34583b18442edcca75ba4b581de3cc964ce7e0"),
    ],
)
def test_the_bits_are_the_same_on_every_machine(seed, num_bits, digest):
    bits = draw_bits(seed, 1000, num_bits)
    assert bits.shape == (1000, num_bits) and bits.dtype == np.uint8
    assert hashlib.sha256(bits.tobytes()).hexdigest() == digest


def slow_mix(x):
    x = x * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@given(seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**50), num_bits=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_the_bits_are_splitmix64_of_seed_and_number(seed, index, num_bits):
    words = math.ceil(num_bits / 64)
    start = slow_mix((seed + 0x9E3779B97F4A7C15) % 2**64)
    expected = []
    for word in range(words):
        state = slow_mix((index * words + word + start) % 2**64)
        expected += [state >> bit & 1 for bit in range(64)]
    assert random_bits(seed, np.array([index], dtype=np.uint64), num_bits)[0].tolist() == expected[:num_bits]


@pytest.mark.parametrize("seed", [0, 1, 2**40])
@pytest.mark.parametrize("num_bits", [50, 100])
def test_bits_are_fair_and_pairwise_independent(seed, num_bits):
    count = 20_000
    signs = 2.0 * draw_bits(seed, count, num_bits) - 1
    bound = 5 / count**0.5  # five standard deviations of a mean of fair signs
    assert np.abs(signs.mean(0)).max() < bound
    within = signs.T @ signs / count
    assert np.abs(within[~np.eye(num_bits, dtype=bool)]).max() < bound
    assert np.abs(signs[1:].T @ signs[:-1] / count).max() < bound  # from one example to the next
    another = 2.0 * draw_bits(seed + 1, count, num_bits) - 1
    assert np.abs(signs.T @ another / count).max() < bound  # from one seed to the next
    triples = np.array([signs[:, list(chosen)].prod(1).mean() for chosen in itertools.combinations(range(20), 3)])
    assert np.abs(triples).max() < bound


def test_labels_are_fair_and_tell_nothing_of_one_bit():
    batch = SparseParity(20_000, 50, draw_support(50, 6, 0), seed=0).__getitems__(range(20_000))
    signs = 2.0 * batch["labels"] - 1
    assert abs(signs.mean()) < 5 / 20_000**0.5
    assert (signs @ batch["inputs"] / 20_000).abs().max() < 5 / 20_000**0.5


def test_seeds_have_no_example_in_common_with_each_other_or_the_held_out():
    counts = {0: 20_000, 1: 20_000, 2: 20_000, 2**40: 4096, 2**41: 20_000}
    packed = [row.tobytes() for seed, count in counts.items() for row in np.packbits(draw_bits(seed, count), axis=1)]
    assert len(set(packed)) == sum(counts.values())


# ---- the network ----


def mlp(width, layers=1, seed=0, input_size=20):
    torch.manual_seed(seed)
    sizes = {"input_size": input_size, "hidden_size": width, "num_hidden_layers": layers}
    return ParityMLPForSequenceClassification(ParityMLPConfig(**sizes))


@pytest.mark.parametrize("layers", [1, 3])
def test_the_network_is_linear_maps_and_relus(layers):
    model = mlp(8, layers).double()
    batch = SparseParity(6, 20, [0, 3], seed=1).__getitems__(range(6))
    state = model.state_dict()
    expected = []
    for x in batch["inputs"].tolist():
        for layer in range(layers):
            weight, bias = (state[f"blocks.{layer}.0.{name}"].tolist() for name in ("weight", "bias"))
            x = [
                max(0.0, sum(w * v for w, v in zip(row, x, strict=True)) + b)
                for row, b in zip(weight, bias, strict=True)
            ]
        weight, bias = (state[f"head.{name}"].tolist() for name in ("weight", "bias"))
        expected.append(
            [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        )
    outputs = model(batch["inputs"].double(), labels=batch["labels"])
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(outputs.logits, expected)
    own_loss = -expected.log_softmax(-1)[range(6), batch["labels"]].mean()
    torch.testing.assert_close(outputs.loss, own_loss)
    assert model(batch["inputs"].double()).loss is None


def test_the_network_starts_as_pytorchs_linear_maps_do():
    model = mlp(400, layers=2, input_size=300)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features**-0.5
            for parameter in (module.weight, module.bias):
                assert parameter.abs().max() <= bound
                if parameter.numel() > 100:
                    assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert module.weight.abs().max() > 0.99 * bound


def test_the_network_is_saved_and_loaded_to_the_bit(tmp_path):
    model = mlp(8, layers=2)
    model.config.support = [0, 3]
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded, info = ParityMLPForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_weights(weights(loaded), weights(model))
    assert (loaded.config.input_size, loaded.config.hidden_size, loaded.config.num_hidden_layers) == (20, 8, 2)
    assert loaded.config.support == [0, 3]


# ---- what it costs ----

STUDENT, TEACHER = 8, 16


def forward(width, layers, head):
    """Operations of one example's way through `layers` blocks; a multiply-add is two."""
    return 2 * (20 * width + (layers - 1) * width**2 + head * 2 * width)


def whole(width):
    return forward(width, 2, head=True)


LAYER_1, LAYER_2 = (
    (3 * forward(STUDENT, layers, head=False), forward(TEACHER, layers, head=False)) for layers in (1, 2)
)
KL, LABELS = (3 * whole(STUDENT), whole(TEACHER)), (3 * whole(STUDENT), 0)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"method": "curriculum"}, [LAYER_1, LAYER_2, KL, KL]),
        ({"method": "curriculum", "layer_order": "last"}, [LAYER_2, LAYER_2, KL, KL]),
        (
            {"method": "curriculum", "train_prefix": "block"},
            [LAYER_1, (LAYER_2[0] - 2 * forward(STUDENT, 1, head=False), LAYER_2[1]), KL, KL],
        ),
        ({"method": "curriculum", "truncate": False}, [KL] * 4),
        ({"method": "curriculum", "hidden_weight_in_logit_stage": 1.0}, [LAYER_1, LAYER_2, KL, KL]),
        ({"method": "one_shot"}, [KL] * 4),
        ({"method": "progressive"}, [KL] * 4),
        ({"method": "online"}, [(KL[0], 4 * whole(TEACHER))] * 4),
        ({"method": "labels"}, [LABELS] * 4),
        (
            {"stages": [{"hidden": [[1, 2]], "until": 1}, {"label_weight": 1.0, "until": 3}, {"kl_weight": 1.0}]},
            [(LAYER_1[0], LAYER_2[1]), LABELS, LABELS, KL],
        ),
        (
            {"method": "online", "stages": [{"label_weight": 1.0, "until": 2}, {"hidden": [[2, 1]]}]}
            | {"standardize_targets": False},
            [(LABELS[0], 3 * whole(TEACHER))] * 2 + [(LAYER_2[0], LAYER_1[1] + 3 * whole(TEACHER))] * 2,
        ),
    ],
    ids=str,
)
def test_booked_operations_are_the_closed_form(config, fields, expected):
    trainer = CurriculumDistillationTrainer(
        mlp(STUDENT, 2, seed=1),
        config(max_steps=4, gradient_accumulation_steps=2, remove_unused_columns=False, **fields),
        train_dataset=SparseParity(64, 20, [0, 3], seed=1),
        data_collator=stack,
        teacher_model=mlp(TEACHER, 2, seed=2),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for index, name in enumerate(("student_flops", "teacher_flops")):
        booked = np.diff([0, *(log[name] for log in logs)]).tolist()
        assert booked == pytest.approx([8 * step[index] for step in expected])
