import logging
from itertools import accumulate

import pytest
import torch
from conftest import STUDENT_DEPTH, VOCAB_SIZE, tiny_bert
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.planning import PlannedConfig
from hf_curriculum_distill.planning.costs import RunCosts, add_up
from hf_curriculum_distill.planning.dry_run import DryRun
from hf_curriculum_distill.planning.optimizer import OptimizerMemory
from hf_curriculum_distill.stages import StageScheduler

from .plans import LENGTH, Watch, examples_for, planned, tiny_gpt

RUNS = {
    "curriculum": {},
    "blocks": {"train_prefix": "block", "freeze_matched_layers": True},
    "cumulative": {"layer_order": "cumulative", "hidden_weight_in_logit_stage": 0.5, "label_loss_weight": 1.0},
    "whole models": {"truncate": False},
    "accumulated": {"gradient_accumulation_steps": 2},
    "embeddings": {"stages": [{"hidden": [[0, 0]], "until": 2}, {"hidden": [[2, 1]], "until": 5}, {"kl_weight": 1.0}]},
    "one_shot": {"method": "one_shot"},
    "online": {"method": "online"},
    "segments": {"train_prefix": "independent", "layer_order": "together"},
    "frozen embeddings": {"freeze_embeddings_in_layer_stages": True, "carry_optimizer": False},
    "annealed": {"hidden_weight_in_logit_stage": 0.5, "hidden_weight_at_end": 0.0, "finished_layer_rate": 0.3},
    "labels": {"method": "labels"},
    "hidden": {"method": "hidden"},
    "pooled": {"pooling": "mean", "standardize_targets": False},
    "pooled, layers first": {"pooling": "cls", "hidden_weight_in_logit_stage": 0.0},
    "pooled, no layers": {"pooling": "pooler", "method": "one_shot"},
    "teacher or label": {
        "label_loss_weight": 1.0,
        "class_weights": [0.5, *[2.0] * (VOCAB_SIZE - 1)],
        "teacher_entropy_threshold": 0.9,
    },
}


def several_labels(depth):
    kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
    return tiny_bert(depth, model_class=BertForSequenceClassification, **kind)


def bert(model_class):
    return lambda depth: tiny_bert(depth, model_class=model_class)


def encoder(depth):
    return tiny_bert(depth, width=8 * depth, model_class=BertModel)


@pytest.mark.parametrize(
    ("run", "make"),
    [(run, encoder if run.startswith("pooled") else tiny_bert) for run in RUNS]
    + [("curriculum", tiny_gpt), ("curriculum", bert(BertForSequenceClassification))]
    + [("curriculum", bert(BertForQuestionAnswering)), ("curriculum", several_labels)]
    + [("curriculum", bert(BertForMultipleChoice)), ("curriculum", bert(BertForTokenClassification))]
    + [("hidden", encoder), ("pooled", bert(BertModel))],
)
def test_a_plan_says_what_the_run_then_books_and_trains(tmp_path, config, run, make):
    student, teacher = make(STUDENT_DEPTH), make(4)
    plan = planned(tmp_path, student, teacher, **RUNS[run])
    watch = Watch()
    trainer = CurriculumDistillationTrainer(
        model=student,
        args=config(**RUNS[run]),
        train_dataset=examples_for(student),
        teacher_model=teacher,
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    assert not plan.errors and [row["name"] for row in plan.stages] == [stage.name for stage in trainer.stages]
    spent = {log["step"]: log for log in trainer.state.log_history if "student_flops" in log}
    for name in ("student_flops", "teacher_flops"):
        sums = list(accumulate(row[name] for row in plan.stages))
        assert [round(spent[row["last_step"]][name]) for row in plan.stages] == sums
        assert plan.total[name] == sums[-1]
    assert [row["trained_parameters"] for row in plan.stages] == list(watch.trained.values())
    assert [row["memory"]["gradients"] for row in plan.stages] == [4 * n for n in watch.trained.values()]
    assert [row["memory"]["optimizer"] for row in plan.stages] == list(watch.states.values())


def test_weights_states_and_projections_are_counted_to_the_byte(tmp_path):
    student, teacher = tiny_bert(2), tiny_bert(4, width=24)
    numbers = [sum(tensor.numel() for tensor in model.parameters()) for model in (student, teacher)]
    positions = 2 * 32 * 8  # buffers: positions and token types
    projections = 2 * (16 * 24 + 2 * 16) * 4
    row = planned(tmp_path, student, teacher, gradient_accumulation_steps=2).total["memory"]
    assert row["teacher"] == 4 * numbers[1] + positions + projections
    assert row["student"] == 4 * numbers[0] + positions
    assert row["optimizer"] == 2 * row["gradients"] == 8 * numbers[0]
    assert row["total"] == sum(size for name, size in row.items() if name != "total")
    alone = planned(tmp_path, student, teacher).total["memory"]  # whose gradients come as activations go
    assert alone | {"total": row["total"]} == row and alone["total"] < row["total"]
    half = planned(tmp_path, student, teacher, teacher_dtype="bfloat16", optim="sgd").total["memory"]
    assert half["teacher"] == 2 * numbers[1] + positions + projections and half["optimizer"] == 0
    loaded = planned(tmp_path, student, teacher, teacher_model_init_kwargs={"dtype": "bfloat16"}, optim="sgd")
    assert loaded.total["memory"] == half
    online = planned(tmp_path, student, teacher, method="online").total["memory"]
    assert online["teacher"] == 16 * numbers[1] + positions  # with gradients and two states each
    assert online["activations"] > planned(tmp_path, student, teacher, method="one_shot").total["memory"]["activations"]


def test_a_model_that_cannot_be_run_without_values_is_refused_in_one_sentence(tmp_path, monkeypatch):
    class Mixes(BertForMaskedLM):
        def forward(self, input_ids, **kwargs):
            torch.bmm(*[torch.ones(2, 3, 3, dtype=kind, device=input_ids.device) for kind in (torch.half, torch.float)])

    logged = []
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handle", logged.append)
    with FakeTensorMode() as mode:
        student = PartialForward(tiny_bert(2, model_class=Mixes))
    args = PlannedConfig(str(tmp_path), method="labels", stages=[{"label_weight": 1.0}], max_steps=8, use_cpu=True)
    costs = RunCosts(DryRun(mode, student, None, args, (4, LENGTH), (4, LENGTH), 4), OptimizerMemory(args))
    with pytest.raises(ValueError, match=r"^Stage 'labels' cannot be run without values \(.*\): a model whose"):
        costs.of_stages(StageScheduler(args.resolve_stages(2, None), 8))
    assert not logged


def test_a_total_sums_what_is_spent_and_keeps_the_stage_that_holds_most():
    first, second, third = (
        {"name": f"stage {n}", "first_step": 10 * n + 1, "last_step": 10 * n + 10, "trained_parameters": 7 - n}
        | {
            "student_flops": n,
            "teacher_flops": 2,
            "flops": n + 2,
            "seconds": 0.5,
            "memory": {"student": n, "total": most},
        }
        for n, most in enumerate((3, 9, 5))
    )
    spent = {"student_flops": 3, "teacher_flops": 6, "flops": 9, "seconds": 1.5, "memory": {"student": 1, "total": 9}}
    steps = {"name": "all", "first_step": 1, "last_step": 30, "trained_parameters": 7}
    assert add_up("all", [first, second, third]) == steps | spent
