"""With as many labels in every example, the trainer knows all shapes beforehand and never waits for the device."""

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import concatenate, slice_tensors
from conftest import StrictBert, assert_same_weights, tiny_bert, weights
from datasets import Dataset
from torch._dynamo.backends import registry
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForMaskedLM, TrainerCallback

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.batches.positions import LABEL_POSITIONS, counted_rows, with_label_positions
from hf_curriculum_distill.tasks.pcfg import LETTER_IDS, pcfg_tokenizer
from hf_curriculum_distill.tasks.text import MaskedBlocksCollator, mask_once

STAGES = [
    {"hidden": [[1, 2]], "until": 3},
    {"hidden": [[2, 4]], "kl_weight": 1.0, "until": 6},
    {"kl_weight": 1.0, "label_weight": 0.5},
]
TOKENIZER = pcfg_tokenizer()


def blocks(count=48, length=12):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(LETTER_IDS[0], LETTER_IDS[-1] + 1, (count, length), generator=generator)
    ids[:, 0], ids[:, -1] = TOKENIZER.cls_token_id, TOKENIZER.sep_token_id
    ids[::3, 5] = TOKENIZER.sep_token_id  # documents end within blocks, not all of them
    return [{"input_ids": row} for row in ids.tolist()]


def collator(fixed_count=True):
    return MaskedBlocksCollator(TOKENIZER, 0.3, LETTER_IDS, fixed_count=fixed_count)


def models(model_class=BertForMaskedLM, **config):
    sizes = {"model_class": model_class, "vocab_size": len(TOKENIZER)} | config
    return tiny_bert(2, seed=1, **sizes), tiny_bert(4, width=24, seed=2, initializer_range=0.3, **sizes)


def make(args, collate, data=None, trainer_class=CurriculumDistillationTrainer, **trainer):
    student, teacher = models(StrictBert)
    data = Dataset.from_list(blocks()) if data is None else data
    fields = {"train_dataset": data, "teacher_model": teacher, "data_collator": collate}
    return trainer_class(student, args, **fields | trainer)


def run(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return weights(trainer.model), [log for log in trainer.state.log_history if "loss" in log]


# ---- where the labels are ----


def unpromised(collate):
    return lambda examples: collate(examples)  # the same batches, and nothing is known of their counts


@pytest.mark.parametrize("fields", [{}, {"hidden_positions": "labels"}, {"logit_chunk_size": 3}], ids=str)
def test_labels_whose_places_are_known_train_the_same_student_to_the_bit(config, fields):
    fields = {"stages": STAGES, "gradient_accumulation_steps": 2, "max_steps": 9, **fields}
    expected = run(config("nonzero", **fields), unpromised(collator()))
    actual = run(config("positions", dataloader_num_workers=1, **fields), collator())
    assert_same_weights(actual[0], expected[0])
    times = ("train_runtime", "epoch")
    for log, other in zip(actual[1], expected[1], strict=True):
        assert {n: v for n, v in log.items() if n not in times} == {n: v for n, v in other.items() if n not in times}


def test_places_reach_the_trainer_in_training_from_rows_and_streams_and_no_model(config):
    seen = []

    class Looking(CurriculumDistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append((model.training, inputs.get(LABEL_POSITIONS), inputs["labels"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    rows = Dataset.from_list(blocks())
    for data in (rows, rows.to_iterable_dataset()):
        seen.clear()
        evaluated = {"eval_dataset": rows.select(range(8))}  # masked as it is read: its batches promise nothing
        args = config(stages=STAGES, max_steps=7, per_device_eval_batch_size=4)
        trainer = make(args, collator(), data, Looking, **evaluated)
        trainer.train()
        trainer.evaluate()
        assert len(seen) == 7 + 2
        for training, positions, labels in seen:
            assert training == (positions is not None)
            if training:
                assert positions.shape == (4, round(0.3 * 12))
                assert (labels.gather(1, positions) != -100).all()


def test_labels_that_the_data_bring_are_read_as_they_are(config):
    rows = mask_once(blocks(), TOKENIZER, 0.3, seed=0, random_ids=LETTER_IDS)
    assert len({sum(label != -100 for label in row["labels"]) for row in rows}) > 1
    fields = {"stages": STAGES, "max_steps": 8}
    expected = run(config("nonzero", **fields), unpromised(collator()), rows)
    assert_same_weights(run(config("positions", **fields), collator(), rows)[0], expected[0])


def test_places_survive_the_way_of_a_batch_that_one_process_loads_for_all():
    # what accelerate does with a stream: batches of all processes are joined, sent, and cut
    batches = [with_label_positions(collator(), blocks(8)[start : start + 4]) for start in (0, 4)]
    joined = concatenate(batches)
    for process, batch in enumerate(batches):
        part = slice_tensors(joined, slice(4 * process, 4 * process + 4))
        assert part.keys() == batch.keys()
        expected = counted_rows(models()[0], {n: v for n, v in batch.items() if n != LABEL_POSITIONS})
        for actual, wanted in zip(counted_rows(models()[0], part), expected, strict=True):
            assert torch.equal(actual, wanted)


# ---- one graph of fixed shapes a stage ----


class Graphs(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        self.seen = []

    def on_step_end(self, *args, **kwargs):
        self.seen.append(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("backend, fixed_count", [("aot_eager", True), ("eager", False)])
def test_each_stage_is_one_graph_whose_shapes_are_fixed_if_counts_are(config, monkeypatch, backend, fixed_count):
    symbolic = []
    compiler = registry.lookup_backend(backend)

    def recording(graph, example_inputs, **kwargs):
        sizes = [size for x in example_inputs if isinstance(x, torch.Tensor) for size in x.shape]
        symbolic.append(any(isinstance(size, torch.SymInt) for size in (*example_inputs, *sizes)))
        return compiler(graph, example_inputs, **kwargs)

    monkeypatch.setitem(registry._COMPILER_FNS, backend, recording)
    fields = {"stages": STAGES, "max_steps": 9, "gradient_accumulation_steps": 2}
    plain = run(config("plain", **fields), collator(fixed_count))
    counters.clear()
    graphs = Graphs()
    args = config("compiled", torch_compile=True, torch_compile_backend=backend, **fields)
    compiled = run(args, collator(fixed_count), callbacks=[graphs])
    assert graphs.seen == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert not counters["graph_break"]
    assert symbolic == ([False] * 3 if fixed_count else [False, True, True])  # stages with logits
    assert_same_weights(compiled[0], plain[0], rtol=1e-4, atol=1e-6)
    for actual, expected in zip(compiled[1], plain[1], strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


# ---- nothing waits for the device ----

SHORT_STAGES = [STAGES[0] | {"until": 2}, STAGES[1] | {"until": 4}, STAGES[2]]
NUM_STEPS = 6
NOWHERE = torch.device("meta")  # tensors there have no values, so that reading one raises


class AnyValue(TorchFunctionMode):
    """For code that may read values: zeros."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item):
            zeros = torch.zeros(args[0].shape, dtype=args[0].dtype)
            return zeros if function is torch.Tensor.cpu else zeros.tolist()
        if function is torch.allclose:
            return True
        return function(*args, **(kwargs or {}))


class MadeOnTheHost(TorchFunctionMode):
    """Counts tensors made of Python's numbers: these are copied, and the copy is waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == NOWHERE
        listed = function is torch.Tensor.__getitem__ and args[0].device == NOWHERE and _host_index(args[1])
        self.count += made or listed
        return function(*args, **kwargs)


def _host_index(index):
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, list) or (isinstance(p, torch.Tensor) and p.dim() and p.device != NOWHERE) for p in parts)


class Copies(TorchDispatchMode):
    """Notes of each copy from host to device whether it is waited for."""

    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, aten = kwargs or {}, torch.ops.aten
        if function is aten._to_copy.default:
            self._note(args[0], kwargs.get("device"), kwargs.get("non_blocking", False))
        elif function is aten.copy_.default:
            self._note(args[1], args[0].device, args[2:] == (True,))
        return function(*args, **kwargs)

    def _note(self, source, device, non_blocking):
        if device is not None and torch.device(device) == NOWHERE != source.device and source.dim():
            self.blocking.append(not non_blocking)


class Reached(Exception):
    pass


class OnceAStage(CurriculumDistillationTrainer):
    """A stage's first batch is checked and its operations are counted, which waits for the device: once."""

    def _enter_stage(self, inputs):
        first = self.stage_scheduler.index_at(self.state.global_step) != self._stage_index
        with AnyValue() if first else nullcontext():
            return super()._enter_stage(inputs)


class StopBeforeTheEnd(TrainerCallback):
    """The end of training reads the loss; so do logs, of which there are none."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            raise Reached


@contextmanager
def nowhere(monkeypatch, trainer):
    """Move a trainer to where no values are."""
    if trainer.projection_bank is not None:
        trainer.projection_bank.freeze().to(NOWHERE)
    for model in (trainer.model, trainer.teacher.model):
        model.to(NOWHERE).tie_weights()
    trainer.args.__dict__["_setup_devices"] = NOWHERE
    trainer.accelerator.state.device = PartialState._shared_state["device"] = NOWHERE
    # autocast does not know this device
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device=None: False)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def train_nowhere(monkeypatch, config, fixed_count=True, **fields):
    # the fused optimizer has no kernel for this device
    silent = {"optim": "adamw_torch", "logging_strategy": "no", "dataloader_pin_memory": False}
    sizes = {"max_steps": NUM_STEPS, "gradient_accumulation_steps": 2, "standardize_targets": False}
    asynchronous = {"accelerator_config": {"non_blocking": True}}
    args = config(**{"stages": SHORT_STAGES} | silent | sizes | asynchronous | fields)
    callbacks = [StopBeforeTheEnd()]
    trainer = make(args, collator(fixed_count), trainer_class=OnceAStage, callbacks=callbacks)
    with nowhere(monkeypatch, trainer), ExitStack() as stack:
        copies, made = stack.enter_context(Copies()), stack.enter_context(MadeOnTheHost())
        with pytest.raises(Reached):
            trainer.train()
    return copies.blocking, made.count


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_positions": "labels", "logit_chunk_size": 3},
        {"train_prefix": "block", "divergence": "jensen_shannon", "temperature": 2.0},
        {"hidden_loss": "cosine", "divergence": "hard"},
        {"stages": None, "method": "online"},
    ],
    ids=str,
)
def test_between_two_logs_no_step_waits_for_the_device(config, monkeypatch, fields):
    blocking, made = train_nowhere(monkeypatch, config, **fields)
    assert blocking == [False] * (NUM_STEPS * 2 * 3)  # tokens, labels and their places, batch by batch
    num_stages = len(fields.get("stages", SHORT_STAGES) or [None])
    assert made == 1 + num_stages  # the loss's zero, once; what a stage's operations are booked with


@pytest.mark.parametrize(
    "changed, read",
    [
        ({"fixed_count": False}, "nonzero"),  # how many labels there are
        ({"logging_nan_inf_filter": True}, "item"),  # whether a loss is finite: Trainer's default, not this library's
    ],
    ids=str,
)
def test_what_waits_for_the_device_is_found(config, monkeypatch, changed, read):
    with pytest.raises((NotImplementedError, RuntimeError, ValueError), match=read):
        train_nowhere(monkeypatch, config, **changed)


def test_copies_that_are_waited_for_are_found(config, monkeypatch):
    fields = {"stages": SHORT_STAGES[2:], "max_steps": 1, "accelerator_config": {"non_blocking": False}}
    blocking, _ = train_nowhere(monkeypatch, config, **fields)
    assert blocking == [True] * (2 * 3)
