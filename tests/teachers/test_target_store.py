"""An example's targets are found by what the teacher reads of it, and are of this teacher, these matrices and this
precision."""

import json

import pytest
import torch
from conftest import VOCAB_SIZE, assert_same_weights, masked_lm_examples, tiny_bert
from hypothesis import given
from hypothesis import strategies as st
from test_embeddings import make
from test_families import pairs
from torch.nn.utils.rnn import pad_sequence

from hf_curriculum_distill import CurriculumDistillationTrainer, ProjectionBank
from hf_curriculum_distill.teachers.records import RecordStore
from teachers.test_cached import AHEAD, cached_teacher, logged, padded, strong_teacher, train


@pytest.mark.parametrize(
    "length, which, k",
    [
        ("none", "some", 8),
        ("a row less", "all", 8),
        ("a row more", "some", None),
        ("twice", "all", None),
        ("an odd byte", "some", 8),
    ],
)
def test_records_of_another_length_are_computed_again(config, tmp_path, length, which, k):
    """Their checksums are right, so that nothing else is wrong with them."""
    fields = {"max_steps": 9, "teacher_cache_logits": k}
    expected = train(config, tmp_path / "cache", **fields)
    for description in (tmp_path / "cache").glob("*/description.json"):
        target = json.loads(description.read_text())["target"]
        records = RecordStore(description.parent)
        keys = list(records._rows) if which == "all" else list(records._rows)[::5]
        row = 2 * 16 if target == "hidden" else 4 * (VOCAB_SIZE if k is None else 2 * k + 1)
        for key in keys:
            value = bytes(records.read(key))
            changed = {"none": b"", "a row less": value[:-row], "a row more": value + value[:row], "twice": 2 * value}
            records.write({key: (changed | {"an odd byte": value + b"x"})[length]})
    again = train(config, tmp_path / "cache", **fields)
    assert_same_weights(again.model.state_dict(), expected.model.state_dict())
    assert logged(again, "loss") == logged(expected, "loss")


# ---- keys ----


@pytest.fixture
def cache(tmp_path):
    return cached_teacher(str(tmp_path))


def is_found(cache, inputs, rows=None):
    """Whether the targets of a batch are read without the teacher; they are right in any case."""
    cached, teacher, read = cache
    ids, before = inputs["input_ids"], teacher.times
    rows = ids.flatten().ne(0).nonzero().squeeze(1) if rows is None else rows
    targets = cached.targets(read(inputs).with_rows(rows), AHEAD)
    assert targets.computed == (teacher.times > before)
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    states = ids.cumsum(1)[..., None].expand(-1, -1, 16).bfloat16().float()
    for layer, sign in ((1, 1), (2, -1)):
        assert torch.equal(targets.hidden[layer][real], sign * states[real])
    assert torch.equal(targets.logits, ids.cumsum(1).flatten()[rows][:, None].expand(-1, 3).float())
    return not targets.computed


texts = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=5)


@given(texts=texts, more=st.integers(0, 4), data=st.data())
def test_an_example_is_found_whatever_the_order_the_batch_and_the_padding(texts, more, data, tmp_path_factory):
    cache = cached_teacher(str(tmp_path_factory.mktemp("run")))
    assert not is_found(cache, padded(texts, max(map(len, texts))))
    chosen = data.draw(st.lists(st.sampled_from(texts), min_size=1, max_size=6))
    assert is_found(cache, padded(chosen, max(map(len, chosen)) + more))


def test_what_the_teacher_reads_otherwise_is_another_example(cache):
    text = padded([[5, 6, 7, 8]], 6)
    inside = padded([[5, 6, 7, 8]], 6)
    inside["attention_mask"][0, 1] = 0
    others = [
        padded([[5, 6, 7, 9]], 6),
        padded([[5, 6, 7]], 6),
        padded([[5, 6, 7, 8]], 6, left=True),  # where absolute positions begin later
        inside,
        text | {"token_type_ids": torch.zeros(1, 6, dtype=torch.long)},
        text | {"token_type_ids": torch.ones(1, 6, dtype=torch.long)},
    ]
    assert [is_found(cache, inputs) for inputs in (text, *others)] == [False] * 7
    assert all(is_found(cache, inputs) for inputs in (text, *others))
    assert not is_found(cache, text, rows=torch.tensor([0, 2]))  # other rows of logits, though the text is known
    assert is_found(cache, text, rows=torch.tensor([0, 2]))


def test_inputs_without_an_entry_for_each_example_are_refused(cache):
    packed = {"input_ids": torch.ones(1, 6, dtype=torch.long), "position_ids": torch.arange(6)}
    with pytest.raises(ValueError, match=r"position_ids has shape \(6,\) in a batch of 1"):
        is_found(cache, packed)


def test_hidden_targets_are_the_projected_states_in_bfloat16(config, tmp_path):
    class Rounded(ProjectionBank):
        def project(self, *args):
            return super().project(*args).bfloat16().float()

    bank = ProjectionBank.create([(1, 2), (2, 4)], [16, 16], [24, 24]).freeze()
    fields = {
        "stages": [{"hidden": [[1, 2]], "until": 12}, {"hidden": [[2, 4]]}],
        "train_sampling_strategy": "sequential",
    }
    runs = []
    for kind, folder in ((Rounded, None), (ProjectionBank, str(tmp_path / "cache"))):
        given_bank = kind(bank._projections, bank.metadata, frozen=True)
        run = CurriculumDistillationTrainer(
            tiny_bert(2, seed=1), config(teacher_cache=folder, max_steps=24, **fields),
            train_dataset=masked_lm_examples(32), teacher_model=strong_teacher(), projection_bank=given_bank,
        )  # fmt: skip
        run.train()
        runs.append(run)
    assert_same_weights(runs[1].model.state_dict(), runs[0].model.state_dict())


def text_and_target(length, target_length):
    ids, labels = (torch.randint(3, VOCAB_SIZE, (n,)) for n in (length, target_length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def pad(examples):
    padding = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    return {name: pad_sequence([e[name] for e in examples], True, value) for name, value in padding.items()}


@pytest.mark.parametrize("other, stack", [("decoder", "encoder"), ("encoder", "decoder")])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_has_tokens_and_states_of_its_own(config, tmp_path, name, other, stack):
    data = [text_and_target(*lengths) for lengths in ((5, 9), (12, 12), (6, 10), (4, 8), (10, 6), (9, 7))]
    labels = data[0]["labels"]
    data += [data[0] | {"labels": torch.cat([labels[:6], labels[6:].flip(0)])}, data[1]]  # one text, another target
    runs, cache = [], str(tmp_path / "cache")
    for layer_stack, folder in ((other, cache), (stack, cache), (stack, None)):
        args = config(
            stages=[{"hidden": [[1, 2]], "kl_weight": 1.0}], layer_stack=layer_stack, teacher_cache=folder,
            teacher_cache_logits=None, standardize_targets=False, learning_rate=0.0, per_device_train_batch_size=2,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        teacher = pairs(name, 2, seed=2)
        run = CurriculumDistillationTrainer(
            pairs(name, 1, seed=1), args, data_collator=pad, train_dataset=data, teacher_model=teacher
        )
        run.train()
        runs.append(run)
    _, cached, plain = runs
    for term, precision in (("hidden_mse", 1e-3), ("kl", 1e-5)):
        assert logged(cached, term) == pytest.approx(logged(plain, term), rel=precision)
    assert logged(cached, "teacher_flops")[3:] == logged(cached, "teacher_flops")[3:4] * 5  # the second pass is read


CHANGES = {
    "teacher": {"teacher": lambda: changed_by_one_bit(strong_teacher())},
    "teacher's configuration": {"teacher": lambda: strong_teacher(layer_norm_eps=1e-3)},
    "matrices": {"projection_seed": 1},
    "calibration": {"standardize_targets": False},
    "number of classes": {"teacher_cache_logits": 5},
    "temperature": {"temperature": 2.0},
    "precision": {"bf16": True},
    "teacher's precision": {"teacher_dtype": "bfloat16"},
    "attention": {"bf16": True, "attn_implementation": "eager"},
}


def changed_by_one_bit(model):
    with torch.no_grad():
        weight = model.bert.encoder.layer[1].output.dense.weight.view(torch.int32)
        weight[7, 13] ^= 1
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_targets_of_another_run_are_never_taken_for_this_ones(change, config, tmp_path):
    train(config, tmp_path / "shared", max_steps=12)
    fields = {"max_steps": 12} | CHANGES[change]
    make = fields.pop("teacher", strong_teacher)
    among, alone = (train(config, tmp_path / folder, make(), **fields) for folder in ("shared", "own"))
    assert_same_weights(among.model.state_dict(), alone.model.state_dict())
    assert logged(among, "loss") == logged(alone, "loss")


@pytest.mark.parametrize("change", [{"pooling": "cls"}, {"projection_seed": 1}, {"projection": "orthogonal"}], ids=str)
def test_embeddings_of_another_run_are_never_taken_for_this_ones(change, config, tmp_path):
    def losses(folder, **changed):
        fields = {"method": "one_shot", "pooling": "mean", "max_steps": 4, "teacher_cache_logits": None}
        run = make(config(**fields | changed, teacher_cache=str(tmp_path / folder)), width=24)
        run.train()
        return logged(run, "output_mse"), logged(run, "teacher_flops")

    losses("shared")
    assert losses("shared", **change) == losses("own", **change)
    assert losses("shared", **change)[1] == [0.0] * 4


def test_each_folder_says_whose_targets_it_holds(config, tmp_path):
    train(config, tmp_path / "cache")
    described = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob("*/description.json")]
    assert sorted((d["target"], d.get("teacher_layer"), d.get("k")) for d in described if d["target"] == "hidden") == [
        ("hidden", 2, None),
        ("hidden", 4, None),
    ]
    assert [d["k"] for d in described if d["target"] == "logits"] == [8]
