"""What scripts do with a Trainer: override methods, and call them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TEACHER_DEPTH, tiny_bert
from torch.utils.data import default_collate
from transformers import BertForSequenceClassification

from hf_curriculum_distill import CurriculumDistillationTrainer

SHORT = [{"hidden": [[1, 2]], "until": 2}, {"kl_weight": 1.0}]


def make(student, teacher, args, data, trainer_class=CurriculumDistillationTrainer, **kwargs):
    return trainer_class(student, args, train_dataset=data, teacher_model=teacher, **kwargs)


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


def test_an_evaluation_loop_takes_its_arguments_by_position(config, student, teacher, examples):
    trainer = make(student, teacher, config(), examples, eval_dataset=examples[:8])
    loader = trainer.get_eval_dataloader()
    by_position = trainer.evaluation_loop(loader, "Evaluation", True, None, "test").metrics
    by_name = trainer.evaluation_loop(loader, description="Evaluation", metric_key_prefix="test").metrics
    for name in ("test_loss", "test_accuracy", "test_agreement", "test_kl"):
        assert by_position[name] == by_name[name]
