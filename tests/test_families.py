"""Every architecture through the trainer, and teachers and students of different families."""

import pytest
import torch
import transformers as hf
from architectures import ARCHITECTURES, VOCAB_SIZE, build
from conftest import assert_same_weights, weights
from test_layers import blocks_of, same_randomness
from transformers import TrainerCallback

from hf_curriculum_distill import CurriculumDistillationTrainer


def examples(batch, count):
    """So many examples like the batch's first, with labels: the tokens themselves, the decoder's, or classes."""
    data = []
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        example = {}
        for name, tensor in batch.items():
            shape = (8,) if name in ("input_ids", "attention_mask") else tensor.shape[1:]
            if name in ("input_ids", "decoder_input_ids"):
                example[name] = torch.randint(3, VOCAB_SIZE, shape, generator=generator)
            elif name == "attention_mask":
                example[name] = (torch.arange(*shape) < shape[0] - index % 3).long()
            else:
                example[name] = torch.randn(shape, generator=generator)
        data.append(example)
    return data


def labelled(model, data):
    for index, example in enumerate(data):
        if "Classification" in type(model).__name__ and "Token" not in type(model).__name__:
            example["labels"] = torch.tensor(index % model.config.num_labels)
            continue
        tokens = example.get("decoder_input_ids", example.get("input_ids"))
        asked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(index)) < 0.5
        asked[1] = True
        if "attention_mask" in example and "decoder_input_ids" not in example:
            asked &= example["attention_mask"].bool()
        num_classes = model.config.num_labels if "TokenClassification" in type(model).__name__ else VOCAB_SIZE
        example["labels"] = torch.where(asked, tokens % num_classes, -100)
    return data


class Watch(TrainerCallback):
    """Weights, and which parameters have optimizer state, after each step."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        stateful = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
        self.steps.append((weights(model), stateful))

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps = [(weights(model), set())]


class SameDraws(CurriculumDistillationTrainer):
    """Dropout draws the same numbers in a step however many blocks ran in the steps before."""

    def training_step(self, *args):
        same_randomness()
        return super().training_step(*args)


def train(trainer_class, student, teacher, args, data):
    watch = Watch()
    trainer = trainer_class(student, args, train_dataset=data, teacher_model=teacher, callbacks=[watch])
    trainer.train()
    return trainer, watch.steps


def losses(trainer, name="loss"):
    return [log[name] for log in trainer.state.log_history if name in log]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_through_all_stages_and_truncation_changes_only_the_cost(config, name):
    stages = [{"hidden": [[1, 2]], "until": 1}, {"hidden": [[2, 3]], "until": 2}, {"kl_weight": 1.0}]
    runs = []
    for truncate in (True, False):
        student, block, batch = build(name, seed=1)
        data = labelled(student, examples(batch, 8))
        args = config(
            f"{truncate}",
            stages=stages,
            max_steps=3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            weight_decay=0.1,
            truncate=truncate,
        )
        trainer, steps = train(SameDraws, student, build(name, seed=2)[0], args, data)
        runs.append((trainer, steps))
    (truncated, steps), (whole, whole_steps) = runs
    assert [log["stage"] for log in truncated.state.log_history if "loss" in log] == [0, 1, 2]
    assert losses(truncated) == losses(whole)
    for (actual, _), (expected, _) in zip(steps, whole_steps, strict=True):
        assert_same_weights(actual, expected)

    names = {id(parameter): name for name, parameter in student.named_parameters()}
    for layer, step in ((1, 1), (2, 2)):
        beyond = {names[id(p)] for b in blocks_of(student, block)[layer:] for p in b.parameters() if id(p) in names}
        beyond -= {names[id(p)] for b in blocks_of(student, block)[:layer] for p in b.parameters()}  # shared biases
        assert beyond
        assert not beyond & steps[step][1]
        assert all(torch.equal(steps[step][0][name], steps[0][0][name]) for name in beyond)
        assert steps[step][1]  # while what is below has been trained
        assert any(not torch.equal(steps[step][0][name], steps[0][0][name]) for name in steps[step][1])


def test_a_parameter_that_is_a_modules_input_does_not_disturb_the_count_of_operations(config):
    changes = {"hidden_dropout_prob": 0.0, "norm_rel_ebd": "none"}  # position embeddings enter projections as they are
    student, teacher = model("deberta-v2", 1, **changes), model("deberta-v2", 2)
    args = config(stages=[{"hidden": [[1, 1]]}], max_steps=1)
    trainer, _ = train(CurriculumDistillationTrainer, student, teacher, args, text())
    assert trainer.state.log_history[0]["student_flops"] > trainer.state.log_history[0]["teacher_flops"] > 0


# ---- families ----


def text(count=16, token_types=True):
    data = examples({"input_ids": torch.zeros(1, 8), "attention_mask": torch.zeros(1, 8)}, count)
    if token_types:
        for index, example in enumerate(data):
            example["token_type_ids"] = (torch.arange(8) > 2 + index % 4).long()
    return data


def images():
    return examples({"pixel_values": torch.zeros(1, 3, 16, 16)}, 16)


def sounds():
    return examples({"input_values": torch.zeros(1, 400)}, 16)


def model(name, seed, **changes):
    model_class, config, _, _ = ARCHITECTURES[name]
    torch.manual_seed(seed)
    return model_class(type(config)(**config.to_dict() | changes))


# teacher, student, data; vocabularies agree
FAMILIES = {
    "bert -> modernbert": ("bert", "modernbert", text),
    "bert -> distilbert": ("bert", "distilbert", text),
    "roberta -> camembert": ("roberta", "camembert", lambda: text(token_types=False)),
    "modernbert -> deberta-v2": ("modernbert", "deberta-v2", text),
    "gpt2 -> llama": ("gpt2", "llama", lambda: text(token_types=False)),
    "llama -> mamba2": ("llama", "mamba2", lambda: text(token_types=False)),
    "vit -> dinov2": ("vit", "dinov2", images),
    "hubert -> wav2vec2": ("hubert", "wav2vec2", sounds),
}


@pytest.mark.parametrize("pair", FAMILIES)
def test_one_family_teaches_another(config, pair):
    teacher_name, student_name, data = FAMILIES[pair]
    teacher = model(teacher_name, seed=2)
    student = model(student_name, seed=1)
    stages = [{"hidden": [[1, 1]], "until": 20}, {"hidden": [[3, 3]], "until": 40}, {"kl_weight": 1.0}]
    args = config(stages=stages, max_steps=44, per_device_train_batch_size=8, learning_rate=5e-3)
    data = labelled(student, data())
    trainer = CurriculumDistillationTrainer(
        student, args, train_dataset=data, eval_dataset=data[:4], teacher_model=teacher
    )
    trainer.train()
    errors = torch.tensor(losses(trainer, "hidden_mse"))
    for stage in errors.view(2, 20):
        assert stage[-4:].mean() < 0.8 * stage[:4].mean()
    assert trainer.evaluate()["eval_agreement"] >= 0


def albert(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 36}
    return hf.AlbertForMaskedLM(hf.AlbertConfig(vocab_size=VOCAB_SIZE, embedding_size=16, **sizes))


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_model_that_shares_its_blocks_learns_and_teaches(config, who):
    student, teacher = (albert(1), model("bert", 2)) if who == "student" else (model("bert", 1), albert(2))
    stages = [{"hidden": [[1, 1]], "until": 20}, {"hidden": [[3, 3]], "until": 40}, {"kl_weight": 1.0}]
    args = config(stages=stages, max_steps=44, per_device_train_batch_size=8, learning_rate=5e-3)
    trainer, _ = train(CurriculumDistillationTrainer, student, teacher, args, labelled(student, text()))
    for stage in torch.tensor(losses(trainer, "hidden_mse")).view(2, 20):
        assert stage[-4:].mean() < 0.8 * stage[:4].mean()


@pytest.mark.parametrize("fields", [{"train_prefix": "block"}, {"freeze_matched_layers": True}], ids=str)
def test_layers_of_a_shared_block_are_not_frozen_apart(config, fields):
    with pytest.raises(ValueError, match="AlbertForMaskedLM runs one block for many layers"):
        CurriculumDistillationTrainer(albert(1), config(**fields), train_dataset=text(), teacher_model=model("bert", 2))


def test_a_student_that_leaves_blocks_out_is_refused_and_such_a_teacher_is_not(config):
    dropping, whole = model("hubert", 1, layerdrop=0.1), model("wav2vec2", 2)
    data = labelled(whole, sounds())
    with pytest.raises(ValueError, match=r"The student's layerdrop is 0\.1"):
        CurriculumDistillationTrainer(dropping, config(), train_dataset=data, teacher_model=whole)
    CurriculumDistillationTrainer(dropping, config(method="one_shot"), train_dataset=data, teacher_model=whole)
    trainer, _ = train(CurriculumDistillationTrainer, whole, dropping, config(), data)
    assert len(losses(trainer)) == 8


@pytest.mark.parametrize(
    "teacher, shapes", [("deit", r"\(4, 5, 32\).*\(4, 6, 32\)"), ("siglip", r"\(4, 5, 32\).*\(4, 4, 32\)")]
)
def test_another_number_of_positions_is_an_error_that_names_both(config, teacher, shapes):
    student, teacher = model("vit", 1), model(teacher, 2)  # one class token and four patches; two, none
    data = labelled(student, images())
    with pytest.raises(ValueError, match=shapes):
        train(CurriculumDistillationTrainer, student, teacher, config(), data)
    trainer, _ = train(CurriculumDistillationTrainer, student, teacher, config(method="one_shot"), data)
    assert len(losses(trainer)) == 8  # logits need no positions
