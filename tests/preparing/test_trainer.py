"""What depends on arguments is fixed anew at every training, and before there is a data loader as far as it can be."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import STUDENT_DEPTH, assert_same_weights, tiny_bert, weights
from test_drop_in import SHORT, make
from test_trainer import STAGES, step_logs
from transformers import logging

from hf_curriculum_distill import CurriculumDistillationTrainer

CHANGES = {
    "method": {"method": "labels"},
    "order": {"layer_order": "last", "layer_stage_fraction": 0.25},
    "bank": {"projection": "orthogonal", "projection_seed": 3, "shared_projection": True, "calibration_samples": 8},
    "steps": {"max_steps": 12},
    "epochs": {"max_steps": -1, "num_train_epochs": 0.5},
    "losses": {"divergence": "reverse_kl", "temperature": 2.0, "label_loss_weight": 0.5, "hidden_positions": "labels"},
    "stages": {"stages": SHORT},
    "layers": {"layer_map": [[2, 4]], "train_prefix": "block"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_arguments_set_after_construction_train_what_they_would_have_from_the_start(
    config, student, teacher, examples, change
):
    changed = make(copy.deepcopy(student), teacher, config("changed"), examples)
    for name, value in CHANGES[change].items():
        setattr(changed.args, name, value)
    changed.train()
    fresh = make(student, teacher, config("fresh", **CHANGES[change]), examples)
    fresh.train()
    assert changed.stages == fresh.stages
    assert_same_weights(weights(changed.model), weights(fresh.model))
    if fresh.projection_bank is not None:
        assert changed.projection_bank.fingerprint == fresh.projection_bank.fingerprint


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("temperature", -1.0, "temperature is -1.0"),
        ("layer_map", [[9, 9]], r"Layer pair \(9, 9\) names student layer 9"),
        ("method", "online", "another teacher. Make a new trainer"),
        ("teacher_dtype", "bfloat16", "another teacher. Make a new trainer"),
        ("attn_implementation", "eager", "another teacher. Make a new trainer"),
        ("max_steps", 2, "need max_steps >= 4"),
    ],
)
def test_arguments_set_after_construction_are_checked_before_the_first_step(
    config, student, teacher, examples, name, value, message
):
    trainer = make(student, teacher, config(), examples)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_training_again_keeps_the_bank(config, student, teacher, examples):
    trainer = make(student, teacher, config(), examples)
    trainer.train()
    first = trainer.projection_bank
    trainer.train()
    assert trainer.projection_bank is first


@pytest.mark.parametrize("depths", [[1, 2], [2, 2]], ids=str)
def test_a_search_trains_each_trial_by_its_own_arguments_and_student(config, teacher, examples, depths):
    pytest.importorskip("optuna")
    space = [("curriculum", "sequential", 0.5), ("labels", "last", 0.25), ("curriculum", "last", 1.0)]
    trained = []

    class Watching(CurriculumDistillationTrainer):
        def train(self, *args, **kwargs):
            output = super().train(*args, **kwargs)
            bank = self.projection_bank and self.projection_bank.fingerprint
            trained.append(([stage.name for stage in self.stages], bank, weights(self.model)))
            return output

    def student_of(number):
        return lambda: tiny_bert(depths[number % 2], seed=1)

    def hp_space(trial):
        method, order, weight = space[trial.number]
        return {"method": method, "layer_order": order, "label_loss_weight": weight}

    trainer = Watching(
        args=config(eval_strategy="no"),
        model_init=lambda trial: student_of(trial.number if trial else 0)(),
        train_dataset=examples,
        eval_dataset=examples[:8],
        teacher_model=teacher,
    )
    # without an objective Trainer adds up all metrics but the loss
    objective = {"compute_objective": lambda metrics: metrics["eval_loss"], "direction": "minimize"}
    found = trainer.hyperparameter_search(hp_space=hp_space, n_trials=3, backend="optuna", **objective)
    values = {}
    for number, (method, order, weight) in enumerate(space):
        fields = {"method": method, "layer_order": order, "label_loss_weight": weight}
        alone = CurriculumDistillationTrainer(
            args=config(f"{number}", **fields),
            model_init=student_of(number),
            train_dataset=examples,
            eval_dataset=examples[:8],
            teacher_model=teacher,
        )
        alone.train()
        names, bank, trained_weights = trained[number]
        assert names == [stage.name for stage in alone.stages]
        assert bank == (alone.projection_bank and alone.projection_bank.fingerprint)
        assert_same_weights(trained_weights, weights(alone.model))
        values[str(number)] = alone.evaluate()["eval_loss"]
    assert found.run_id == min(values, key=values.get)
    assert found.objective == pytest.approx(min(values.values()), rel=1e-5)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
def test_the_steps_of_epochs_are_known_before_there_is_a_loader(
    config, student, teacher, examples, drop_last, accumulation, epochs
):
    fields = {"dataloader_drop_last": drop_last, "gradient_accumulation_steps": accumulation}
    args = config(method="one_shot", max_steps=-1, num_train_epochs=epochs, learning_rate=0.0, **fields)
    trainer = make(student, teacher, args, examples[:30])
    forecast = trainer.stage_scheduler.max_steps
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == forecast


def test_model_init_makes_the_student_that_is_trained(config, teacher, examples):
    made = []

    def model_init():
        made.append(tiny_bert(STUDENT_DEPTH, seed=1))
        return made[-1]

    trainer = CurriculumDistillationTrainer(
        args=config(stages=STAGES), model_init=model_init, train_dataset=examples, teacher_model=teacher
    )
    untouched = weights(made[0])
    trainer.train()
    assert trainer.model is made[-1] is not made[0]
    assert_same_weights(weights(made[0]), untouched)
    assert {log["stage"] for log in step_logs(trainer)} == {0, 1, 2}
    for part in ("bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "cls"):
        named = [(name, tensor) for name, tensor in trainer.model.state_dict().items() if name.startswith(part)]
        assert any(not torch.equal(tensor, untouched[name]) for name, tensor in named)
    assert all("forward" not in model.__dict__ for model in [*made, teacher])


def test_a_trainer_shows_its_models_and_stages(config, student, teacher, examples):
    trainer = make(student, teacher, config(max_steps=4), examples)
    sizes = [f"{model.num_parameters():,}" for model in (student, teacher)]
    assert repr(trainer).splitlines() == [
        "CurriculumDistillationTrainer(",
        f"  student: BertForMaskedLM, 2 blocks, hidden size 16, {sizes[0]} parameters",
        f"  teacher: Teacher(BertForMaskedLM: BertForMaskedLM, 4 blocks, hidden size 24, {sizes[1]} parameters)",
        f"  projection_bank: {trainer.projection_bank}",
        "  stage 1: Stage(hidden=((1, 2),), until=1)",
        "  stage 2: Stage(hidden=((2, 4),), until=2)",
        "  stage 3: Stage(hidden_weight=0.0, kl_weight=1.0)",
        ")",
    ]
    assert "'kind': 'gaussian'" in repr(trainer.projection_bank) and "(1, 2): (16, 24)" in repr(trainer.projection_bank)


# ---- an order that is measured ----

MEASURED = {"layer_order": "complexity", "calibration_samples": 4}


def test_an_order_that_is_measured_changes_nothing_else(config, teacher, examples):
    """The run is that of the same stages, given from the start: neither the student nor what it draws is touched."""

    def student():
        return tiny_bert(STUDENT_DEPTH, seed=1, dropout=0.1)

    measured = make(student(), teacher, config("measured", **MEASURED), examples)
    assert [stage.name for stage in measured.stages] == ["layer 1", "layer 2", "kl"]
    measured.train()
    assert [stage.name for stage in measured.stages] == ["layer 2", "layer 1", "kl"]
    assert [stage.until for stage in measured.stages] == [2, 4, None]
    given = make(
        student(), teacher, config("given", stages=measured.stages), examples, projection_bank=measured.projection_bank
    )
    given.train()
    assert_same_weights(weights(measured.model), weights(given.model))
    assert step_logs(measured) == step_logs(given)


def test_a_run_whose_order_was_measured_resumes_with_the_order_of_its_checkpoint(
    config, student, teacher, examples, caplog
):
    """Not with that of its present student, nor with other settings."""
    saved = {"save_strategy": "steps", "save_steps": 3}
    make(copy.deepcopy(student), teacher, config("measured", **MEASURED, **saved), examples).train()
    checkpoint = Path(config("measured").output_dir, "checkpoint-3")
    record = json.loads((checkpoint / "curriculum.json").read_text())
    assert [stage["name"] for stage in record["stages"]] == ["layer 2", "layer 1", "kl"]
    caplog.set_level("INFO")
    logging.set_verbosity_info()
    resumed = make(student, teacher, config("resumed", **MEASURED), examples)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [stage.name for stage in resumed.stages] == ["layer 2", "layer 1", "kl"]
    assert "as a share of random targets'" not in caplog.text
    for fields, message in [
        ({"layer_stage_fraction": 0.25}, "stages changed from"),
        ({"layer_map": [[2, 4]]}, "projection_matrices changed from"),
        ({"layer_order": "sequential"}, "stages changed from"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(student, teacher, config("other", **MEASURED | fields), examples).train(str(checkpoint))


def test_a_run_whose_order_was_not_measured_is_no_beginning_of_one(config, student, teacher, examples):
    saved = {"save_strategy": "steps", "save_steps": 3}
    make(copy.deepcopy(student), teacher, config("given", **saved), examples).train()
    measured = make(student, teacher, config("measured", **MEASURED), examples)
    with pytest.raises(ValueError, match="not chosen by layer_order='complexity', but 'sequential'; resume"):
        measured.train(resume_from_checkpoint=str(Path(config("given").output_dir, "checkpoint-3")))


def test_where_no_layer_is_easier_than_random_targets_there_is_nothing_to_begin_with(
    config, student, teacher, examples
):
    fields = MEASURED | {"calibration_samples": 1, "hidden_positions": "labels"}  # too few to tell anything from them
    trainer = make(student, teacher, config(**fields), examples)
    with pytest.raises(ValueError, match=r"has no layer to begin with.*layer 1 1\.\d+ to .*; use another layer_order"):
        trainer.train()
    assert trainer.state.global_step == 0
