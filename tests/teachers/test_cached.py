"""A cached target is the teacher's, whichever student computed it, whenever it is read, and after damage."""

import logging
import math
import os
import resource
import signal

import pytest
import torch
from architectures import build
from conftest import VOCAB_SIZE, assert_same_weights, in_fork, masked_lm_examples, tiny_bert
from hypothesis import given
from hypothesis import strategies as st
from resuming.test_trainer import Killer, die, outcome
from test_families import examples as examples_like
from test_families import labelled
from transformers import BertForSequenceClassification

import hf_curriculum_distill.teachers.records as store_module
from hf_curriculum_distill import (
    CURRICULUM_EXTRACTION,
    CurriculumDistillationConfig,
    CurriculumDistillationTrainer,
    ProjectionBank,
    Stage,
)
from hf_curriculum_distill.batches.batch import BatchReader
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.losses import kl_divergence, top_kl_divergence, top_logits
from hf_curriculum_distill.teachers.cached import CachedTeacher, epoch_that_pays
from hf_curriculum_distill.teachers.target_store import TargetStore
from hf_curriculum_distill.teachers.teacher import Targets, Teacher

AHEAD = Stage(hidden=[[1, 2], [2, 4]], kl_weight=1.0)


def strong_teacher(seed=2, **config):
    return tiny_bert(4, width=24, seed=seed, initializer_range=0.3, **config)


def train(
    config, folder=None, teacher=None, student=None, data=None, trainer_class=CurriculumDistillationTrainer, **fields
):
    callbacks = fields.pop("callbacks", [])
    run = trainer_class(
        tiny_bert(2, seed=1) if student is None else student,
        config(**{"teacher_cache": folder and str(folder), "teacher_cache_logits": 8, "max_steps": 24} | fields),
        train_dataset=masked_lm_examples(32) if data is None else data,
        teacher_model=strong_teacher() if teacher is None else teacher,
        callbacks=callbacks,
    )
    run.train()
    return run


def logged(run, name):
    return [log[name] for log in run.state.log_history if "loss" in log]


def files(folder):
    return {
        os.path.join(root, name): os.path.getsize(os.path.join(root, name))
        for root, _, names in os.walk(folder)
        for name in names
        if name != "description.json"
    }


class Counting(Teacher):
    """Its targets say which example and position they belong to, by the sum of the tokens seen so far."""

    times = 0

    def targets(self, batch, stage):
        self.times += 1
        states = batch.inputs["input_ids"].cumsum(1)[..., None].expand(-1, -1, 16).float()
        return Targets({1: states, 2: -states}, states.flatten(0, 1)[batch.rows][:, :3])


def cached_teacher(folder):
    bank = ProjectionBank.create([(1, 2), (2, 4)], [16, 16], [24, 24]).freeze()
    args = CurriculumDistillationConfig(folder, teacher_cache=os.path.join(folder, "cache"), report_to="none")
    teacher = Counting(strong_teacher())
    cached = CachedTeacher(teacher, TargetStore(teacher, bank, args), [AHEAD])
    return cached, teacher, BatchReader(PartialForward(tiny_bert(2)), teacher.partial_forward, args)


def padded(texts, length, left=False):
    ids, mask_ = torch.zeros(len(texts), length, dtype=torch.long), torch.zeros(len(texts), length, dtype=torch.long)
    for index, text in enumerate(texts):
        place = slice(length - len(text), length) if left else slice(len(text))
        ids[index, place], mask_[index, place] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask_}


# ---- training ----


@pytest.mark.parametrize(
    "fields", [{}, {"projection": "pca"}, {"projection": "rotated_pca", "standardize_targets": False}], ids=str
)
def test_an_empty_cache_and_a_filled_one_train_the_same_to_the_bit(config, tmp_path, fields):
    empty = train(config, tmp_path / "cache", **fields)
    written = files(tmp_path / "cache")
    filled = train(config, tmp_path / "cache", **fields)
    assert_same_weights(filled.model.state_dict(), empty.model.state_dict())
    assert logged(filled, "loss") == logged(empty, "loss")
    assert files(tmp_path / "cache") == written
    assert logged(filled, "teacher_flops") == [0.0] * 24


FAMILIES = ("bert-classifier", "bert-tagger", "gpt2", "t5", "whisper", "vit", "wav2vec2")


@pytest.mark.parametrize("name", FAMILIES)
def test_with_all_logits_a_cached_run_is_one_without_cache_in_every_family(name, config, tmp_path):
    teacher, _, batch = build(name, seed=1)
    data = labelled(teacher, examples_like(batch, 8))
    runs = []
    for folder in (None, tmp_path / "cache"):
        student = build(name)[0]
        stages = {"stages": [{"kl_weight": 1.0, "label_weight": 0.5}], "train_sampling_strategy": "sequential"}
        fields = {"max_steps": 6, "teacher_cache_logits": None, "divergence": "reverse_kl"} | stages
        runs.append(train(config, folder, teacher, student, data, **fields))
    assert_same_weights(runs[1].model.state_dict(), runs[0].model.state_dict())
    assert logged(runs[1], "teacher_flops")[:2] == logged(runs[0], "teacher_flops")[:2]
    assert logged(runs[1], "teacher_flops")[2:] == logged(runs[0], "teacher_flops")[1:2] * 4
    # and the curriculum, with dropout's draws and hidden states, reads what it wrote
    both = [train(config, tmp_path / "layers", teacher, build(name)[0], data, max_steps=6) for _ in range(2)]
    assert_same_weights(both[1].model.state_dict(), both[0].model.state_dict())
    assert logged(both[1], "teacher_flops")[-1] == 0


def test_a_batch_that_is_read_costs_no_teacher_and_one_that_is_not_costs_all_stages(config, tmp_path):
    cached, plain = train(config, tmp_path / "cache"), train(config, method="one_shot")
    whole = logged(plain, "teacher_flops")
    assert logged(cached, "teacher_flops")[:8] == pytest.approx(whole[:8], rel=0.05)  # 32 examples are 8 batches
    assert logged(cached, "teacher_flops")[7:] == logged(cached, "teacher_flops")[7:8] * 17
    assert logged(cached, "student_flops") == logged(train(config), "student_flops")


def test_accumulated_micro_batches_are_read_as_they_were_written(config, tmp_path):
    fields = {"gradient_accumulation_steps": 2, "max_steps": 12}
    runs = [train(config, tmp_path / "cache", **fields) for _ in range(2)]
    assert_same_weights(runs[1].model.state_dict(), runs[0].model.state_dict())


def test_two_students_share_what_both_want_and_write_nothing_twice(config, tmp_path):
    train(config, tmp_path / "cache")
    before = files(tmp_path / "cache")
    other = tiny_bert(1, seed=5)  # its only layer learns from the teacher's last
    shuffled = train(config, tmp_path / "cache", student=tiny_bert(2, seed=4), seed=7, per_device_train_batch_size=2)
    assert files(tmp_path / "cache") == before
    assert logged(shuffled, "teacher_flops")[-1] == 0
    train(config, tmp_path / "cache", student=other)
    added = {path: size for path, size in files(tmp_path / "cache").items() if path not in before}
    assert len(added) == 2 and not set(before.items()) - set(files(tmp_path / "cache").items())


def test_a_damaged_target_is_computed_again_and_reported(config, tmp_path, caplog):
    fields = {"train_sampling_strategy": "sequential"}
    expected = train(config, tmp_path / "cache", **fields)
    for path, size in files(tmp_path / "cache").items():
        if path.endswith(".data"):
            with open(path, "r+b") as file:
                file.seek(size // 2)
                file.write(b"\xff" * 40)
    again = train(config, tmp_path / "cache", **fields)
    assert_same_weights(again.model.state_dict(), expected.model.state_dict())
    assert "is damaged; it is computed again" in caplog.text
    assert 0 < logged(again, "teacher_flops")[-1] < logged(expected, "teacher_flops")[-1]


class Noise(torch.utils.data.Dataset):
    """The same examples, of which some tokens are drawn again each time."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        example = dict(masked_lm_examples(16)[index])
        example["input_ids"] = torch.where(torch.rand(12) < 0.3, 4, example["input_ids"])
        return example


def test_random_masks_leave_nothing_to_read_and_that_is_said_before_and_after(config, tmp_path, caplog):
    train(config, tmp_path / "cache", data=Noise(), max_steps=8)
    before, *after = [
        r.message for r in caplog.records if r.levelno == logging.WARNING and "teacher_cache" in r.message
    ]
    assert "it does not pay in this run" in before and "0 % of a sample of 16 examples were the same" in before
    assert "mask once, beforehand" in before
    assert len(after) == 1 and "only 0.0 % of the examples of epoch 2 were found" in after[0]


# ---- killed and resumed ----

SAVED = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 1, "logging_steps": 3}


class DeadlyRow:
    """Of an index; ends the process as it is about to be written, its record being written already."""

    size, iter_unpack = store_module._ROW.size, store_module._ROW.iter_unpack

    def __init__(self, number):
        self.number, self.own = number, store_module._ROW

    def pack(self, *values):
        self.number -= 1
        return self.own.pack(*values) if self.number else die()


def train_killed(folder, event=None, step=None):
    """Two passes over 24 examples and a half, in three stages, with dropout."""
    args = CurriculumDistillationConfig(
        str(folder), max_steps=15, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none", use_cpu=True,
        disable_tqdm=True, teacher_cache_logits=8,
        teacher_cache=str(folder.parent / f"cache_of_{folder.name}"), **SAVED | CURRICULUM_EXTRACTION,
    )  # fmt: skip
    if event == "between record and index":
        store_module._ROW = DeadlyRow(step)
    trainer = CurriculumDistillationTrainer(
        tiny_bert(2, dropout=0.1, seed=1), args, train_dataset=masked_lm_examples(24), teacher_model=strong_teacher(),
        callbacks=[Killer(event, step)] if event and event != "between record and index" else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    trainer.save_state()


def without_teacher_flops(logs):
    """Targets that a killed process had computed are read by its successor, and count as no operations."""
    return [{n: value for n, value in log.items() if n not in ("teacher_flops", "total_flos")} for log in logs]


def test_a_run_with_a_cache_killed_again_and_again_is_one_that_was_never_interrupted(tmp_path):
    assert in_fork(train_killed, tmp_path / "whole") == 0
    # the forecast writes 12 records, elsewhere; each batch then 12, of three targets
    kills = [("between record and index", n) for n in (17, 13)] + [("step_end", 3)]
    kills += [("between record and index", n) for n in (21, 13)] + [("optimizer_step", 5), ("step_end", 7), ("save", 8)]
    kills += [("step_begin", 10), ("step_end", 14)]
    for event, step in kills:
        assert in_fork(train_killed, tmp_path / "killed", event, step) == -signal.SIGKILL, (event, step)
    assert in_fork(train_killed, tmp_path / "killed") == 0
    (tensors, logs, step), (killed, killed_logs, killed_step) = (outcome(tmp_path / n) for n in ("whole", "killed"))
    assert_same_weights(killed, tensors)
    assert without_teacher_flops(killed_logs) == without_teacher_flops(logs) and killed_step == step == 15
    rows = [
        sum(size for path, size in files(tmp_path / f"cache_of_{name}").items() if path.endswith(".index"))
        for name in ("whole", "killed")
    ]
    assert rows == [3 * 24 * 36] * 2  # no target was written twice


def test_a_resume_with_another_number_of_logits_or_without_cache_is_refused(config, tmp_path):
    train(config, tmp_path / "cache", save_strategy="steps", save_steps=20)
    for fields, change in (({"teacher_cache_logits": 9}, "from 8 to 9"), ({"teacher_cache": None}, "from 8 to None")):
        args = {"teacher_cache": str(tmp_path / "cache"), "teacher_cache_logits": 8, "max_steps": 24} | fields
        run = CurriculumDistillationTrainer(
            tiny_bert(2), config(**args), train_dataset=masked_lm_examples(32), teacher_model=strong_teacher()
        )
        with pytest.raises(ValueError, match=f"cached_logits changed {change}"):
            run.train(resume_from_checkpoint=True)


# ---- room ----


def written_bytes(folder):
    return sum(files(folder).values())


@pytest.mark.parametrize("task", ["masked words", "classes"])
def test_the_forecast_is_what_will_be_written_to_the_byte(task, config, tmp_path, monkeypatch):
    forecasts, forecast = [], CachedTeacher.forecast
    monkeypatch.setattr(CachedTeacher, "forecast", lambda *args: forecasts.append(forecast(*args)))
    classes = {"model_class": BertForSequenceClassification, "num_labels": 3} if task == "classes" else {}
    data = masked_lm_examples(32)
    if classes:
        data = [example | {"labels": torch.tensor(index % 3)} for index, example in enumerate(data)]
    for _ in range(2):
        run = {"student": tiny_bert(2, **classes), "teacher": strong_teacher(**classes)}
        train(config, tmp_path / "cache", data=data, **run)
    assert forecasts == [written_bytes(tmp_path / "cache"), 0]
    tokens = sum(int(example["attention_mask"].sum()) for example in data)
    rows = 32 if classes else sum(int((example["labels"] != -100).sum()) for example in data)
    assert forecasts[0] == 3 * 32 * 36 + 2 * tokens * 16 * 2 + rows * (3 if classes else 2 * 8 + 1) * 4


def test_too_little_room_is_said_before_training(tmp_path):
    cached, _, read = cached_teacher(str(tmp_path))
    batch = read(padded([[5, 6, 7, 8]], 6)).with_rows(torch.tensor([1]))
    with pytest.raises(OSError, match=r"GB free, but [0-9.]+ GB will be written; make room"):
        cached.forecast([batch], [batch], 10**15, [(2.0, AHEAD)])


def train_on_a_small_disk(config, folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"teacher_cache .* cannot be written .* Make room and resume"):
        train(config, folder)


def test_a_full_disk_ends_the_run_with_a_clear_error_and_what_was_written_stays_good(config, tmp_path):
    assert in_fork(train_on_a_small_disk, config, tmp_path / "cache") == 0
    assert written_bytes(tmp_path / "cache")
    resumed, expected = train(config, tmp_path / "cache"), train(config, tmp_path / "other")
    assert_same_weights(resumed.model.state_dict(), expected.model.state_dict())
    assert 0 < logged(resumed, "teacher_flops")[-1] < logged(expected, "teacher_flops")[-1]


costs = st.floats(0.01, 10)


@given(spans=st.lists(st.tuples(st.integers(1, 5), costs), min_size=1, max_size=4), first=costs, later=costs)
def test_the_epoch_that_pays_is_the_first_that_ends_ahead(spans, first, later):
    each = [cost for epochs, cost in spans for _ in range(epochs)]
    ahead = [sum(each[:n]) - first - later * (n - 1) for n in range(1, len(each) + 1)]
    if min(map(abs, ahead)) > 1e-9:
        assert epoch_that_pays(spans, first, later) == next((n + 1 for n, gain in enumerate(ahead) if gain > 0), None)


# ---- the likeliest classes ----

seeds = st.integers(0, 10**6)


def random_logits(seed, rows, classes):
    return torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(seed)) * 3


@given(seed=seeds, rows=st.integers(1, 5), classes=st.integers(2, 12), data=st.data())
def test_merging_classes_only_hides_differences(seed, rows, classes, data):
    student, teacher = random_logits(seed, rows, classes)
    temperature = data.draw(st.sampled_from((0.5, 1.0, 3.0)))
    values = [
        float(top_kl_divergence(student, top_logits(teacher, k, temperature), temperature)) for k in range(1, classes)
    ]
    exact = float(kl_divergence(student, teacher, temperature))
    assert all(b >= a - 1e-4 * max(1, exact) for a, b in zip(values, [*values[1:], exact], strict=True))
    assert values[0] >= -1e-4
    assert values[-1] == pytest.approx(exact, rel=1e-4, abs=1e-4)  # then the rest is one class


@given(seed=seeds, rows=st.integers(0, 5), k=st.integers(1, 6))
def test_the_divergence_and_its_gradient_are_those_of_a_slow_reference(seed, rows, k):
    student, teacher = random_logits(seed, rows, 8)
    own, temperature = student.clone().requires_grad_(), 2.0
    value = top_kl_divergence(own, top_logits(teacher, k, temperature), temperature)
    value.backward()
    slow, total = student.double().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for row, target in zip(slow, teacher.double(), strict=True):
        q, p = (row / temperature).softmax(0), (target / temperature).softmax(0)
        chosen = target.argsort(descending=True)
        for group in [[c] for c in chosen[:k]] + [chosen[k:].tolist()]:
            together = sum(p[c] for c in group)
            total = total + temperature**2 * together * (together / sum(q[c] for c in group)).log()
    if rows:
        total.backward()
        torch.testing.assert_close(own.grad, slow.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value.double(), total, rtol=1e-4, atol=1e-4)


def test_the_rest_may_be_as_unlikely_as_it_likes():
    logits = torch.tensor([[0.0, -200.0, -200.0]])
    student = torch.tensor([[0.0, -90.0, -300.0]], requires_grad=True)
    value = top_kl_divergence(student, top_logits(logits, 1))
    value.backward()
    assert math.isfinite(value.item()) and student.grad.isfinite().all()


# ---- what cannot be cached ----


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method": "online", "standardize_targets": False}, "method='online', in which the teacher changes"),
        ({"method": "progressive"}, "method='progressive', in which the teacher changes"),
        ({"method": "labels"}, "method='labels', in which no teacher is used"),
        ({"stages": [{"label_weight": 1.0}]}, "no stage needs the teacher"),
        ({"divergence": "reverse_kl"}, f"'reverse_kl', but of {VOCAB_SIZE} classes teacher_cache keeps 8"),
        ({"teacher_cache_logits": 0}, "teacher_cache_logits is 0; it must be a number between 1"),
        ({"teacher_cache_logits": 2.5}, "teacher_cache_logits is 2.5"),
        ({"teacher_cache": ""}, "teacher_cache is ''; give the name of a folder"),
    ],
)
def test_what_cannot_be_cached_is_refused_at_construction(fields, message, config, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "cache", **fields)


def test_a_folder_that_cannot_be_written_is_refused_at_construction(config, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"teacher_cache .* cannot be written"):
        train(config, tmp_path / "cache")


def test_other_divergences_need_all_logits(config, tmp_path):
    stages = [{"hidden": [[1, 2]]}]
    train(config, tmp_path / "cache", divergence="reverse_kl", stages=stages, max_steps=2)
    train(config, tmp_path / "cache", divergence="jensen_shannon", teacher_cache_logits=VOCAB_SIZE, max_steps=8)


def test_hard_labels_from_a_cache_of_a_single_class_are_those_of_all_logits(config, tmp_path):
    fields = {"method": "one_shot", "divergence": "hard", "max_steps": 8}
    cached = train(config, tmp_path / "cache", teacher_cache_logits=1, **fields)
    plain = train(config, **fields)
    assert logged(cached, "hard_label_loss") == pytest.approx(logged(plain, "hard_label_loss"), rel=1e-5)
