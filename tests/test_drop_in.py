"""What scripts do with a Trainer: search hyperparameters, change arguments, override methods."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TEACHER_DEPTH, assert_same_weights, tiny_bert, weights
from torch.utils.data import default_collate
from transformers import BertForSequenceClassification

from hf_curriculum_distill import CurriculumDistillationTrainer

SHORT = [{"hidden": [[1, 2]], "until": 2}, {"kl_weight": 1.0}]


def make(student, teacher, args, data, trainer_class=CurriculumDistillationTrainer, **kwargs):
    return trainer_class(student, args, train_dataset=data, teacher_model=teacher, **kwargs)


# ---- arguments are those of the moment of training ----

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


# ---- overridden methods ----


def classifiers():
    kind = {"model_class": BertForSequenceClassification, "num_labels": 2}
    return tiny_bert(2, seed=1, **kind), tiny_bert(TEACHER_DEPTH, seed=2, initializer_range=0.3, **kind)


def classes(examples):
    return [example | {"labels": torch.tensor(index % 2)} for index, example in enumerate(examples)]


WEIGHTS = torch.tensor([1.0, 5.0])


class Weighted(CurriculumDistillationTrainer):
    """The pattern of Trainer's documentation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_replaces_the_stages_is_refused_before_the_first_step(config, examples):
    trainer = make(*classifiers(), config(), classes(examples), Weighted)
    with pytest.raises(ValueError, match=r"Weighted.compute_loss doesn't call .*super\(\).compute_loss"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_on_top_of_the_stages_gets_the_logits_of_the_rows_that_count(config, examples):
    seen = []

    class Added(CurriculumDistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if model.training:
                seen.append(None if outputs.logits is None else tuple(outputs.logits.shape))
                if outputs.logits is not None:
                    loss = loss + F.cross_entropy(outputs.logits, inputs["labels"], weight=WEIGHTS)
            return (loss, outputs) if return_outputs else loss

    student, teacher = classifiers()
    data = classes(examples)
    args = config(stages=SHORT, max_steps=3, learning_rate=0.0, per_device_train_batch_size=64)
    trainer = make(student, teacher, args, data, Added, eval_dataset=data[:8])
    trainer.train()
    assert seen == [None, None, (64, 2)]
    batch = default_collate(data)
    with torch.no_grad():
        added = F.cross_entropy(student.eval()(**batch).logits, batch["labels"], weight=WEIGHTS)
    log = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert log["loss"] == pytest.approx(log["kl"] + added.item(), rel=1e-5)
    assert trainer.evaluate()["eval_accuracy"] >= 0


def test_nothing_that_a_subclass_may_override_runs_in_the_constructor(config, student, teacher, examples):
    class Late(CurriculumDistillationTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.ready = True

        def get_train_dataloader(self):
            assert self.ready
            return super().get_train_dataloader()

        def _get_train_sampler(self, *args):
            assert self.ready
            return super()._get_train_sampler(*args)

        def set_initial_training_values(self, *args):
            assert self.ready
            return super().set_initial_training_values(*args)

    for fields in ({"max_steps": -1, "num_train_epochs": 1}, {"max_steps": 4}):
        trainer = make(copy.deepcopy(student), teacher, config(**fields), examples, Late)
        trainer.train()
    assert trainer.state.global_step == 4


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


def test_an_evaluation_loop_takes_its_arguments_by_position(config, student, teacher, examples):
    trainer = make(student, teacher, config(), examples, eval_dataset=examples[:8])
    loader = trainer.get_eval_dataloader()
    by_position = trainer.evaluation_loop(loader, "Evaluation", True, None, "test").metrics
    by_name = trainer.evaluation_loop(loader, description="Evaluation", metric_key_prefix="test").metrics
    for name in ("test_loss", "test_accuracy", "test_agreement", "test_kl"):
        assert by_position[name] == by_name[name]
