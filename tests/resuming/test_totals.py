"""Operations and loss terms added up over a run."""

import numpy as np
import pytest
import torch
from conftest import tiny_bert

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.cost import flop_rates, flop_units
from hf_curriculum_distill.resuming.totals import RunningTotals

STAGES = [{"hidden": [[1, 2]], "until": 4}, {"kl_weight": 1.0, "label_weight": 0.5}]
KINDS = {
    "fused": {},
    "eager": {"attn_implementation": "eager"},
}


class Collator:
    """Pads to the longest example of the batch."""

    def __call__(self, examples):
        length = max(len(e["input_ids"]) for e in examples)
        rows = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: torch.tensor([list(e[name]) + [fill] * (length - len(e[name])) for e in examples])
            for name, fill in rows.items()
        }


def uneven(count):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 33, (count,), generator=generator).tolist()
    examples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(5, 50, (length,), generator=generator).tolist()
        labels = [token if place % (2 + index % 3) == 0 else -100 for place, token in enumerate(ids)]
        examples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return examples


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grouped", [True, False])
def test_operations_of_uneven_lengths_are_those_of_each_batch_counted_alone(config, kind, grouped):
    data, seen = uneven(32), []

    class Watching(CurriculumDistillationTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            measured = self.teacher, self._read(self._prepare_inputs(inputs)), self.stage
            rates = flop_rates(self._objective, *measured)
            seen.append(np.array(rates).T @ np.array(flop_units(*measured)))
            return loss

    fields = {"train_sampling_strategy": "group_by_length"} if grouped else {}
    args = config(stages=STAGES, per_device_train_batch_size=4, **fields)
    trainer = Watching(
        tiny_bert(2, **KINDS[kind]), args, train_dataset=data, data_collator=Collator(), teacher_model=tiny_bert(4)
    )
    trainer.train()
    lengths = set(np.array(seen)[:, 0].tolist())
    assert len(lengths) > 2  # batches differ
    for step, log in enumerate(log for log in trainer.state.log_history if "loss" in log):
        expected = np.sum(seen[: step + 1], axis=0)
        assert [log["student_flops"], log["teacher_flops"]] == pytest.approx(expected.tolist(), rel=1e-9)


def test_the_clock_counts_while_it_runs_and_then_goes_on():
    totals = RunningTotals()
    assert totals.seconds == 0.0
    totals.start_clock()
    first = totals.seconds
    totals.stop_clock()
    stopped = totals.seconds
    assert 0 <= first <= stopped == totals.seconds
    totals.start_clock()
    assert stopped <= totals.seconds < stopped + 60
