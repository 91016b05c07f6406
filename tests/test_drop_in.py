"""What scripts do with a Trainer: override methods, and call them."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import TEACHER_DEPTH, VOCAB_SIZE, assert_same_weights, tiny_bert, weights
from test_trainer import TASKS, task_data
from torch.utils.data import DataLoader, default_collate
from transformers import (
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

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


def test_the_constructor_calls_no_other_method_of_trainer_than_trainers_own(config, student, teacher, examples):
    called = []

    def watched(owner):
        def watch(name):
            def method(self, *args, **kwargs):
                called.append(name)
                return getattr(super(watching, self), name)(*args, **kwargs)

            return method

        names = [n for n, value in vars(Trainer).items() if inspect.isfunction(value) and n != "__init__"]
        watching = type("Watching", (owner,), {name: watch(name) for name in names})
        return watching

    Watched = watched(Trainer)
    Watched(copy.deepcopy(student), config("stock", TrainingArguments), train_dataset=examples)
    stock, called[:] = set(called), []
    make(student, teacher, config(max_steps=-1), examples, watched(CurriculumDistillationTrainer))
    assert called and set(called) <= stock


STAGES_OF_ALL_KINDS = {
    "hidden": ({"hidden": [[1, 2]]}, False),
    "divergence": ({"kl_weight": 1.0}, True),
    "labels": ({"label_weight": 1.0}, True),
    "all": ({"hidden": [[1, 2]], "kl_weight": 1.0, "label_weight": 1.0}, True),
}


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("stage, logits", STAGES_OF_ALL_KINDS.values(), ids=STAGES_OF_ALL_KINDS)
def test_every_stage_returns_outputs_with_the_logits_that_it_computes(
    config, student, teacher, examples, stage, logits, chunk_size
):
    seen = []

    class Watching(CurriculumDistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            seen.append((outputs.logits, inputs["labels"].ne(-100).sum().item()))
            return (loss, outputs) if return_outputs else loss

    make(student, teacher, config(stages=[stage], max_steps=1, logit_chunk_size=chunk_size), examples, Watching).train()
    ((found, rows),) = seen
    assert found is None if not logits else found.shape == (rows, VOCAB_SIZE)


def test_a_step_that_replaces_the_stages_is_refused_by_its_name(config, student, teacher, examples):
    class Own(CurriculumDistillationTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs)).loss
            loss.backward()
            return loss.detach()

    with pytest.raises(ValueError, match=r"Own.training_step doesn't call .*super\(\)\.training_step"):
        make(student, teacher, config(), examples, Own).train()


class OwnParts(CurriculumDistillationTrainer):
    """What scripts replace as a whole."""

    def floating_point_ops(self, inputs):
        return 0

    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(self.train_dataset, 4, collate_fn=default_collate))

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0)
        return self.lr_scheduler

    def log(self, logs, start_time=None):
        super().log(logs | {"mine": 1}, start_time)

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        output.metrics["eval_mine"] = 2
        return output


def test_parts_that_are_replaced_are_used(config, student, teacher, examples):
    trainer = make(copy.deepcopy(student), teacher, config(stages=SHORT, max_steps=4), examples, OwnParts)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [0, 0, 1, 1] and all(log["mine"] == 1 for log in logs)
    assert {"eval_mine", "eval_kl"} <= trainer.evaluate(examples[:4]).keys()
    with torch.no_grad():  # in the order of the data, because that loader does not shuffle
        first = default_collate(examples[:4])
        kept = first["attention_mask"].bool()
        student.eval()
        states = student(**first, output_hidden_states=True).hidden_states[1][kept]
        target = trainer.projection_bank.project(1, teacher(**first, output_hidden_states=True).hidden_states[2])[kept]
    assert logs[0]["loss"] == pytest.approx(F.mse_loss(states, target).item(), rel=1e-4)


def test_a_prediction_step_of_ones_own_keeps_the_comparison_or_says_that_it_is_lost(
    config, student, teacher, examples, caplog
):
    class Extended(CurriculumDistillationTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return 2 * loss, logits, labels

    class Replaced(CurriculumDistillationTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                outputs = model(**self._prepare_inputs(inputs))
            return outputs.loss, None, None

    plain, extended, replaced = (
        make(student, teacher, config(), examples, kind, eval_dataset=examples[:8]).evaluate()
        for kind in (CurriculumDistillationTrainer, Extended, Replaced)
    )
    assert extended["eval_loss"] == pytest.approx(2 * plain["eval_loss"])
    assert extended["eval_kl"] == plain["eval_kl"]
    assert replaced["eval_loss"] == plain["eval_loss"] and "eval_kl" not in replaced
    said = [record.message for record in caplog.records if "prediction_step" in record.message]
    assert len(said) == 1 and said[0].startswith("Replaced.prediction_step doesn't call")


# ---- sequence to sequence ----


class DistilsSequences(CurriculumDistillationTrainer, Seq2SeqTrainer):
    """Generates in evaluations."""


def translate(config, folder="run", kind=DistilsSequences, teacher=True, **fields):
    build, data = TASKS["seq2seq-t5"][0], task_data("seq2seq-t5", 8)
    given = {"predict_with_generate": True, "generation_max_length": 5, "generation_num_beams": 2}
    args = config(folder, Seq2SeqTrainingArguments, max_steps=6, eval_strategy="steps", eval_steps=3, **given | fields)
    args.eval_do_concat_batches = True
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"length": prediction.predictions.shape[-1]}

    trainer = kind(
        build(2, 1),
        args,
        train_dataset=data,
        eval_dataset=data[:4],
        compute_metrics=metrics,
        **({"teacher_model": build(4, 2)} if teacher else {}),
    )
    return trainer, seen


def test_sequences_are_generated_in_evaluations_of_a_distillation(config):
    trainer, seen = translate(config, save_strategy="steps", save_steps=3)
    trainer.train()
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 2
    assert all({"eval_length", "eval_accuracy", "eval_agreement", "eval_kl"} <= log.keys() for log in evaluated)
    tokens = trainer.model.generate(
        **{name: torch.stack([row[name] for row in trainer.eval_dataset]) for name in ("input_ids", "attention_mask")},
        max_length=5,
        num_beams=2,
    )
    assert torch.equal(torch.tensor(seen[-1])[:, : tokens.shape[1]], tokens)
    plain, _ = translate(config, "plain", CurriculumDistillationTrainer, predict_with_generate=False)
    plain.compute_metrics = None
    plain.train()
    assert_same_weights(weights(trainer.model), weights(plain.model))
    for one, other in zip(evaluated, (log for log in plain.state.log_history if "eval_loss" in log), strict=True):
        for name in ("eval_loss", "eval_accuracy", "eval_agreement", "eval_kl"):
            assert one[name] == pytest.approx(other[name], rel=1e-6)
    resumed, _ = translate(config, "run", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")
    assert_same_weights(weights(resumed.model), weights(trainer.model))


def test_without_a_teacher_sequences_are_trained_as_they_are_without_this_library(config):
    ours, _ = translate(config, "ours", teacher=False)
    stock, _ = translate(config, "stock", Seq2SeqTrainer, teacher=False)
    for trainer in (ours, stock):
        trainer.train()
    assert_same_weights(weights(ours.model), weights(stock.model))
    assert type(ours.args) is Seq2SeqTrainingArguments
