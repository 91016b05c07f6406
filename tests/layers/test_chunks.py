"""Logits a chunk of rows at a time against all of them at once, differentiated by autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from conftest import assert_same_weights, masked_lm_examples, tiny_bert, weights
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import step_logs, train
from torch import nn

from hf_curriculum_distill.cost import count_flops
from hf_curriculum_distill.layers.chunks import RowLogits, sum_over_chunks
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.losses import DIVERGENCES, cross_entropy
from hf_curriculum_distill.planning.memory import PeakMemory
from layers.test_forward import TOKEN_LOGITS, assert_equal_gradients, same_randomness

WIDTH, CLASSES = 5, 11
BEHIND_THE_HEAD = ("bert-to-bert", "bert-tagger")


class Head(nn.Module):
    """A language model's head: its last weight may also be used before and after the last module."""

    def __init__(self, bias, tied, used_after):
        super().__init__()
        self.dense, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES, bias=bias)
        self.offset = nn.Parameter(torch.randn(CLASSES))
        self.unused = nn.Parameter(torch.randn(3))
        self.tied, self.used_after = tied, used_after

    def forward(self, hidden):
        hidden = torch.tanh(self.dense(hidden))
        if self.tied:
            hidden = hidden + self.last.weight[:1]
        logits = self.last(hidden) + self.offset
        return logits + self.last.weight.sum(1) if self.used_after else logits


def losses_of(name, teacher, labels):
    def losses(logits, rows):
        temperature = 1.0 if name == "hard" else 2.0
        terms = {
            "kl": DIVERGENCES[name](logits, teacher[rows], temperature),
            "label_loss": cross_entropy(logits, labels[rows]),
        }
        return terms["kl"] + 0.5 * terms["label_loss"], terms

    return losses


def gradients_of(total, tensors):
    return torch.autograd.grad(total, tensors, allow_unused=True)


@given(
    name=st.sampled_from(list(DIVERGENCES)),
    num_rows=st.integers(0, 9),
    size=st.integers(1, 12),
    seed=st.integers(0, 999),
    factor=st.sampled_from([1.0, 0.25]),
    bias=st.booleans(),
    tied=st.booleans(),
    used_after=st.booleans(),
    frozen=st.booleans(),
    lazy_teacher=st.booleans(),
)
def test_chunks_have_the_sum_and_the_gradients_of_all_rows_at_once(
    name, num_rows, size, seed, factor, bias, tied, used_after, frozen, lazy_teacher
):
    torch.manual_seed(seed)
    head, labels = Head(bias, tied, used_after), torch.randint(CLASSES, (num_rows,))
    body = torch.randn(num_rows, WIDTH, requires_grad=not frozen)
    teacher, read = torch.randn(num_rows, CLASSES), torch.randn(num_rows, WIDTH)
    if lazy_teacher:
        with torch.no_grad():
            teaching = Head(bias, tied, used_after)
            teacher, whole = RowLogits(read, teaching, teaching.last, size), teaching(read)
    else:
        whole = teacher
    tensors = [*head.parameters()] + ([] if frozen else [body])
    hidden = body * 2.0
    expected, expected_terms = losses_of(name, whole, labels)(head(hidden), slice(None))
    expected_gradients = gradients_of(factor * expected, tensors)

    hidden = body * 2.0
    actual, terms = sum_over_chunks(losses_of(name, teacher, labels), RowLogits(hidden, head, head.last, size))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert terms.keys() == expected_terms.keys()
    for term, value in terms.items():
        torch.testing.assert_close(value, expected_terms[term].detach(), rtol=1e-5, atol=1e-6)
    for gradient, wanted in zip(gradients_of(factor * actual, tensors), expected_gradients, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@given(num_rows=st.integers(0, 50), size=st.integers(1, 60))
def test_chunks_are_all_rows_once_in_order_and_as_few_as_fit(num_rows, size):
    logits = RowLogits(torch.arange(num_rows).float()[:, None], lambda hidden: hidden, nn.Identity(), size)
    lengths = [len(logits[rows]) for rows in logits.chunks()]
    assert torch.equal(torch.cat([logits[rows] for rows in logits.chunks()]), logits.hidden)
    assert max(lengths) <= size
    assert len(lengths) == max(1, -(-num_rows // size))
    assert max(lengths) - min(lengths) <= 1


def test_two_operands_of_one_sum_do_not_share_the_memory_that_is_added_to():
    hidden, first, second = torch.randn(6, WIDTH), *(nn.Parameter(torch.randn(WIDTH, CLASSES)) for _ in range(2))
    logits = RowLogits(hidden, lambda rows: rows @ (first + second), nn.Identity(), 2)
    total, _ = sum_over_chunks(lambda chunk_logits, rows: (chunk_logits.square().sum(), {}), logits)
    expected = gradients_of((hidden @ (first + second)).square().sum(), [first, second])
    for gradient, wanted in zip(gradients_of(total, [first, second]), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_gradients_are_taken_once_and_a_second_time_is_an_error():
    head = Head(True, False, False)
    total, _ = sum_over_chunks(lambda a, rows: (a.sum(), {}), RowLogits(torch.randn(4, WIDTH), head, head.last, 2))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        total.backward()


def test_bfloat16_parameters_lose_no_more_than_one_rounding():
    torch.manual_seed(0)
    head, hidden = Head(True, False, False).bfloat16(), torch.randn(512, WIDTH, dtype=torch.bfloat16)
    total, _ = sum_over_chunks(lambda a, rows: (a.float().sum(), {}), RowLogits(hidden, head, head.last, 1))
    (gradient,) = gradients_of(total, [head.last.weight])
    read = torch.tanh(head.dense(hidden)).double().sum(0).expand(CLASSES, WIDTH)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), read, rtol=2**-8, atol=1e-3)


def test_neither_the_logits_nor_a_second_gradient_of_the_last_weight_are_ever_whole():
    head, hidden = nn.Linear(4, 1000), torch.randn(200, 4, requires_grad=True)
    of_logits = lambda chunk_logits, rows: (F.log_softmax(chunk_logits, -1)[:, 0].sum(), {})  # noqa: E731
    peaks = []
    for run in (
        lambda: of_logits(head(hidden), None)[0],
        lambda: sum_over_chunks(of_logits, RowLogits(hidden, head, head, 10))[0],
    ):
        with PeakMemory() as memory:
            run().backward()
        peaks.append(memory.peak)
        head.zero_grad()
    assert peaks[0] > 3 * 200 * 1000 * 4
    assert peaks[1] < 6 * 10 * 1000 * 4 + 2 * 4000 * 4 < peaks[0] / 5

    wide = nn.Linear(1000, 1000, bias=False)
    with PeakMemory() as memory:
        of_logits_of = RowLogits(torch.randn(20, 1000), wide, wide, 1)
        sum_over_chunks(of_logits, of_logits_of)[0].backward()
    assert memory.peak < 1.2 * wide.weight.nbytes


# ---- in a model ----


@pytest.mark.parametrize("name", TOKEN_LOGITS)
@pytest.mark.parametrize("size", [1, 3])
def test_every_head_gives_the_same_logits_in_chunks_as_for_all_rows(name, size):
    model, _, batch = build(name)
    rows, kinds, partial = torch.tensor([1, 3, 4, 8]), [], PartialForward(model)
    same_randomness()
    hidden, logits = partial(model, batch, [2], logits=True, rows=rows)
    targets = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))

    def losses(chunk_logits, rows):
        total = (F.log_softmax(chunk_logits, -1) * targets[rows]).sum()
        return total, {"total": total}

    (losses(logits, slice(None))[0] + hidden[2].square().mean()).backward()
    expected = {n: parameter.grad for n, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    def reduce(chunked, outputs):
        kinds.append(type(chunked))
        return sum_over_chunks(losses, chunked)

    same_randomness()
    forwards = {module: module.__dict__.get("forward") for module in model.modules() if module is not model}
    hidden, (total, _) = partial(model, batch, [2], logits=True, rows=rows, chunk_size=size, reduce=reduce)
    assert all(module.__dict__.get("forward") is forward for module, forward in forwards.items())
    assert kinds == [torch.Tensor if name in BEHIND_THE_HEAD else RowLogits]
    torch.testing.assert_close(total, losses(logits, slice(None))[0], rtol=1e-4, atol=1e-4)
    (total + hidden[2].square().mean()).backward()
    actual = {n: parameter.grad for n, parameter in model.named_parameters()}
    assert_equal_gradients(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart", "whisper"])
def test_chunks_run_nothing_but_the_head_again(name):
    model, _, batch = build(name)
    rows = torch.tensor([1, 3, 4, 8])
    counts = []
    for size in (None, 1, 2):
        same_randomness()
        partial = PartialForward(model)
        flops = count_flops(lambda p=partial, s=size: p(model, batch, logits=True, rows=rows, chunk_size=s))
        counts.append(flops.tolist())
    assert counts == counts[:1] * 3


def test_a_head_that_reads_more_than_its_rows_says_what_to_do():
    model, _, batch = build("bert")
    own = model.cls.forward
    model.cls.forward = lambda hidden: own(torch.cat([hidden, hidden], dim=1))
    _, logits = PartialForward(model)(model, batch, logits=True, rows=torch.tensor([1, 2]), chunk_size=1)
    message = r"BertForMaskedLM returns logits of shape \(1, 2, 99\) for 1 rows.*set logit_chunk_size=0"
    with pytest.raises(ValueError, match=message):
        logits.run()


# ---- in training ----

TERMS = [{"hidden": [[1, 2]], "until": 2}, {"kl_weight": 1.0, "label_weight": 0.5, "hidden": [[2, 4]]}]


LOSS_TERMS = ("hidden_mse", "hidden_layer_norm_mse", "kl", "hard_label_loss", "label_loss")


def assert_same_training(actual, expected):
    for log, reference in zip(step_logs(actual), step_logs(expected), strict=True):
        assert log.keys() == reference.keys()
        for name in {"loss", "grad_norm", "teacher_loss", *LOSS_TERMS} & reference.keys():
            assert log[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-6), name
        for name in ("student_flops", "teacher_flops"):
            assert log[name] == pytest.approx(reference[name], rel=1e-12)
    assert_same_weights(weights(actual.model), weights(expected.model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    "fields",
    [
        {"stages": TERMS},
        {"stages": TERMS, "gradient_accumulation_steps": 2},
        {"stages": TERMS, "gradient_checkpointing": True},
        {"stages": TERMS, "freeze_matched_layers": True, "divergence": "jensen_shannon", "temperature": 2.0},
        {"method": "one_shot", "divergence": "reverse_kl"},
        {"stages": TERMS, "divergence": "hard", "hidden_loss": "layer_norm_mse"},
        {"method": "online", "label_loss_weight": 0.5},
    ],
    ids=["terms", "accumulation", "checkpointing", "frozen", "reverse", "hard", "online"],
)
def test_training_in_chunks_is_the_same_training(config, student, teacher, examples, fields, size):
    runs = []
    for chunk_size in (0, size):
        args = config(str(chunk_size), logit_chunk_size=chunk_size, **fields)
        runs.append(train(copy.deepcopy(student), copy.deepcopy(teacher), args, examples))
    assert_same_training(*reversed(runs))


def test_bfloat16_training_in_chunks_is_the_same_to_rounding(config, student, teacher, examples):
    runs = [
        train(
            copy.deepcopy(student), teacher, config(f"{size}", bf16=True, stages=TERMS, logit_chunk_size=size), examples
        )
        for size in (0, 3)
    ]
    for log, reference in zip(*map(step_logs, runs), strict=True):
        assert log["loss"] == pytest.approx(reference["loss"], rel=1e-3)
        assert log["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-2)


def test_a_large_vocabulary_is_cut_by_default_and_a_small_one_is_not(config, monkeypatch):
    cut = []
    monkeypatch.setattr(
        "hf_curriculum_distill.objective.sum_over_chunks",
        lambda losses, logits: cut.append(isinstance(logits, RowLogits)) or sum_over_chunks(losses, logits),
    )
    for vocabulary, expected in ((50, []), (2**18, [True])):
        models = [tiny_bert(depth, width=4, vocab_size=vocabulary) for depth in (1, 2)]
        args = config(method="one_shot", max_steps=1, per_device_train_batch_size=64)
        train(*models, args, masked_lm_examples(64))  # more than 96 rows, below which no vocabulary is cut
        assert cut == expected


def test_chunks_together_with_what_needs_whole_logits_are_refused(config):
    with pytest.raises(ValueError, match="logit_chunk_size is 8, but with torch_compile"):
        config(logit_chunk_size=8, torch_compile=True)
    with pytest.raises(ValueError, match="but with fp16 logits are computed at once"):
        config(logit_chunk_size=8, fp16=True)
    assert config(torch_compile=True).logit_chunk_size is None
