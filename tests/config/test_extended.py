"""Training arguments of any class get the fields of the config, and stay the object that they are."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from transformers import GenerationConfig, Seq2SeqTrainingArguments, TrainingArguments

from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer
from hf_curriculum_distill.config import extended


@dataclasses.dataclass
class ScriptArguments(TrainingArguments):
    """A script's own arguments."""

    margin: float = 0.5
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2], kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        self.run = f"margin {self.margin}"


CLASSES = {
    TrainingArguments: {},
    Seq2SeqTrainingArguments: {"predict_with_generate": True, "generation_config": GenerationConfig(max_length=7)},
    ScriptArguments: {"margin": 2.0, "sizes": [3]},
}


@pytest.fixture(params=CLASSES, ids=lambda kind: kind.__name__)
def given(request, config):
    more = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "bf16": True, "seed": 7}
    return config("given", request.param, **more | CLASSES[request.param])


def test_the_object_stays_the_same_and_keeps_its_values_and_its_class(given):
    kind, before = type(given), json.loads(given.to_json_string())
    assert extended(given) is given
    assert isinstance(given, kind) and isinstance(given, CurriculumDistillationConfig)
    ours = {field.name: field.default for field in dataclasses.fields(CurriculumDistillationConfig)}
    ours = {n: v for n, v in ours.items() if n not in before}
    defaults = {"logging_nan_inf_filter": False, "ddp_find_unused_parameters": True}
    assert json.loads(given.to_json_string()) == before | ours | defaults
    assert extended(given) is given


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))])
def test_a_copy_has_the_same_class_and_values(given, copied):
    other = copied(extended(given))
    assert type(other) is type(given)
    assert other.to_dict() == given.to_dict()
    other.temperature = 2.0
    assert given.temperature == 1.0


def test_a_new_one_of_the_class_is_made_and_checked_as_any_other(given):
    made = dataclasses.replace(extended(given), temperature=2.0)
    assert made.to_dict() == given.to_dict() | {"temperature": 2.0}
    with pytest.raises(ValueError, match="temperature is -1"):
        dataclasses.replace(given, temperature=-1)


def test_a_field_with_a_name_of_ours_is_ours(config):
    @dataclasses.dataclass
    class Tempered(TrainingArguments):
        temperature: float = 3.0

    assert extended(config("a", Tempered)).temperature == 3.0
    with pytest.raises(ValueError, match="temperature is 0"):
        extended(config("b", Tempered, temperature=0))


def test_a_config_of_ours_is_left_alone(config):
    @dataclasses.dataclass
    class Both(CurriculumDistillationConfig, Seq2SeqTrainingArguments):
        """How a script has the fields of both on its command line."""

    args = config("both", Both, predict_with_generate=True, temperature=2.0, logging_nan_inf_filter=True)
    assert extended(args) is args and type(args) is Both
    assert (args.predict_with_generate, args.temperature, args.logging_nan_inf_filter) == (True, 2.0, True)


def test_a_representation_shows_no_token(config):
    assert "secret" not in repr(config(hub_token="secret"))


def test_the_object_that_was_passed_is_in_force(config, student, teacher, examples):
    args = config("run", ScriptArguments, margin=2.0, max_steps=4, save_strategy="steps", save_steps=3)

    class Script(CurriculumDistillationTrainer):
        def compute_loss(self, *args, **kwargs):
            assert self.args.margin == 3.0
            return super().compute_loss(*args, **kwargs)

    def make():
        return Script(student, args, train_dataset=examples, teacher_model=teacher)

    trainer = make()
    assert trainer.args is args and args.run == "margin 2.0"
    args.margin, args.max_steps, args.layer_order = 3.0, 6, "last"
    trainer.train()
    assert trainer.state.global_step == 6
    assert [stage.name for stage in trainer.stages] == ["layer 2", "kl + layer 2"]
    checkpoint = f"{args.output_dir}/checkpoint-3"
    saved = torch.load(f"{checkpoint}/training_args.bin", weights_only=False)
    assert type(saved) is type(args) and saved.margin == 3.0
    with open(f"{checkpoint}/curriculum.json") as file:
        assert json.load(file)["arguments"]["margin"] == 3.0
    resumed = make()
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 6
