"""method="hidden": the hidden states of any model with a stack of blocks, whatever its head; and heads not known."""

import os

import pytest
import torch
import transformers as hf
from conftest import VOCAB_SIZE, assert_same_weights, masked_lm_examples, tiny_bert, weights
from torch import nn

from hf_curriculum_distill import CurriculumDistillationTrainer

VIT = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
VIT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPEECH = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 40, "layerdrop": 0.0}
SPEECH |= {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}


def headless(depth):
    return tiny_bert(depth, model_class=hf.BertModel)


def pretraining(depth):
    return tiny_bert(depth, model_class=hf.BertForPreTraining)


def masked_images(depth):
    return hf.ViTForMaskedImageModeling(hf.ViTConfig(num_hidden_layers=depth, encoder_stride=8, **VIT))


def masked_autoencoder(depth):
    decoder = {f"decoder_{name}": VIT[name] for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    config = hf.ViTMAEConfig(num_hidden_layers=depth, decoder_num_hidden_layers=2, mask_ratio=0.5, **VIT | decoder)
    return hf.ViTMAEForPreTraining(config)


def transcribing(depth):
    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(num_hidden_layers=depth, **SPEECH))


def detecting(depth):
    backbone = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_layers": depth, "decoder_layers": 2, "num_queries": 4}
    return hf.DetrForObjectDetection(hf.DetrConfig(backbone_config=hf.ResNetConfig(**backbone), **sizes))


def texts():
    return [{n: example[n] for n in ("input_ids", "attention_mask")} for example in masked_lm_examples(8)]


def images(size=16):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, size, size, generator=generator)} for _ in range(8)]


def partly_masked():
    return [image | {"bool_masked_pos": torch.arange(4) % 2 == index % 2} for index, image in enumerate(images())]


def boxed():
    box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    return [image | {"labels": box} for image in images(64)]


def recordings():
    generator = torch.Generator().manual_seed(0)
    return [{"input_values": torch.randn(400, generator=generator), "labels": torch.tensor([3, 4])} for _ in range(8)]


def in_lists(examples):
    return {
        n: [e[n] for e in examples] if n == "labels" else torch.stack([e[n] for e in examples]) for n in examples[0]
    }


# the model; its auto class; its data; and what it has for Trainer
CASES = {
    "no head": (headless, "AutoModel", texts, {}),
    "several heads": (pretraining, "AutoModelForPreTraining", texts, {}),
    "masked images": (
        masked_images,
        "AutoModelForMaskedImageModeling",
        partly_masked,
        {"label_names": ["bool_masked_pos"]},
    ),
    "masked autoencoder": (
        masked_autoencoder,
        "AutoModelForPreTraining",
        images,
        {"label_names": ["pixel_values"]},
    ),
    "speech": (transcribing, "AutoModelForCTC", recordings, {}),
    "boxes": (detecting, "AutoModelForObjectDetection", boxed, {"remove_unused_columns": False}),
}
LOSSLESS = {"no head", "several heads"}  # on these data


def make(case, args, teacher=None):
    build, _, data, _ = CASES[case]
    torch.manual_seed(1)
    student = build(2)
    torch.manual_seed(2)
    teacher = build(4) if teacher is None else teacher
    collator = in_lists if case == "boxes" else None
    evaluated = None if case == "boxes" else data()[:4]  # the loss of boxes needs another package
    return CurriculumDistillationTrainer(
        student, args, collator, train_dataset=data(), eval_dataset=evaluated, teacher_model=teacher
    )


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_any_head_or_none_learns_is_resumed_and_loads_without_the_library(config, case):
    fields = CASES[case][3] | {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "evaluate_layers": True}
    args = config(method="hidden", per_device_train_batch_size=2, **fields)
    whole = make(case, args)
    whole.train()
    assert [stage.name for stage in whole.stages] == ["layer 1", "layer 2"]
    assert whole.stage_scheduler.spans == [(0, 3), (3, 6)]
    resumed = make(case, args)
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-2"))
    assert_same_weights(weights(resumed.model), weights(whole.model))
    loaded = getattr(hf, CASES[case][1]).from_pretrained(os.path.join(args.output_dir, "checkpoint-6"))
    assert type(loaded) is type(whole.model)
    assert_same_weights(weights(loaded), weights(whole.model))
    if whole.eval_dataset is None:
        return
    metrics = whole.evaluate()
    assert ("eval_loss" in metrics) == (case not in LOSSLESS)
    assert {name for name in metrics if name.endswith("_mse")} == {"eval_layer_1_mse", "eval_layer_2_mse"}


@pytest.mark.parametrize("case", ["no head", "masked images", "speech"])
def test_a_head_changes_nothing_that_its_blocks_learn(config, case):
    build, _, data, fields = CASES[case]
    runs = []
    for model_class in (lambda depth: build(depth), lambda depth: build(depth).base_model):
        torch.manual_seed(1)
        student = model_class(2)
        torch.manual_seed(2)
        args = config(method="hidden", per_device_train_batch_size=2, **fields | {"label_names": None})
        examples = [{n: v for n, v in example.items() if n != "labels"} for example in data()]
        trainer = CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=model_class(4))
        trainer.train()
        runs.append([log["hidden_mse"] for log in trainer.state.log_history if "hidden_mse" in log])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


def test_a_teacher_of_another_task_teaches_hidden_states_alone(config):
    args = config(method="hidden", evaluate_layers=True)
    trainer = make("no head", args, teacher=tiny_bert(4))
    trainer.train()
    assert not {"eval_kl", "eval_agreement"} & trainer.evaluate().keys()
    with pytest.raises(ValueError, match=r"their logits mean different things\. Use two models of one task"):
        make("no head", config(), teacher=tiny_bert(4))


def test_the_models_of_a_masked_autoencoder_read_the_same_patches(config):
    trainer = make("masked autoencoder", config(method="hidden", max_steps=2, label_names=["pixel_values"]))
    seen = {}
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher.model)):
        seen[name] = []
        model.register_forward_pre_hook(
            lambda _, args, inputs, noises=seen[name]: noises.append(inputs["noise"]), with_kwargs=True
        )
    trainer.train()
    ours, theirs = ([noise for noise in noises if len(noise) == 4] for noises in seen.values())
    assert all(any(torch.equal(noise, other) for other in theirs) for noise in ours)
    assert len({tuple(noise.flatten().tolist()) for noise in ours}) >= 2  # drawn again in each step


@pytest.mark.parametrize("order, number", [("cumulative", 2), ("together", 1), ("last", 1)])
def test_layer_stages_of_any_order_share_all_steps(config, order, number):
    trainer = make("no head", config(method="hidden", layer_order=order))
    assert len(trainer.stages) == number
    assert trainer.stage_scheduler.spans[-1][1] == 8
    assert not any(stage.needs_logits for stage in trainer.stages)


def test_stages_that_do_not_fit_into_the_steps_are_refused(config):
    with pytest.raises(ValueError, match=r"2 layer stages in 1 steps need max_steps >= 2; raise it"):
        make("no head", config(method="hidden", max_steps=1))


@pytest.mark.parametrize(
    "fields",
    [
        {"label_loss_weight": 0.5},
        {"hidden_weight_at_end": 0.1},
        {"freeze_matched_layers": True},
    ],
    ids=str,
)
def test_what_changes_the_logit_stage_is_refused_without_one(config, fields):
    with pytest.raises(ValueError, match=rf"{next(iter(fields))} is .*method='hidden' has no logit stage"):
        config(method="hidden", **fields)


# ---- heads that are not known, where logits are asked for ----


class Odd(hf.BertPreTrainedModel):
    """Three numbers a token, of which nothing says what they are."""

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.head = hf.BertModel(config), nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.head(states)}


def test_a_head_that_nothing_explains_is_refused_before_the_first_step_unless_hidden_states_are_matched(config):
    student, teacher = (tiny_bert(depth, model_class=Odd, vocab_size=VOCAB_SIZE) for depth in (2, 4))
    given = {"model": student, "train_dataset": texts(), "teacher_model": teacher}
    trainer = CurriculumDistillationTrainer(args=config(), **given)
    with pytest.raises(ValueError, match=r"Odd is of no task that this library knows, .*method='hidden'"):
        trainer.train()
    assert trainer.state.global_step == 0
    CurriculumDistillationTrainer(args=config(method="hidden"), **given).train()


@pytest.mark.parametrize("case", ["no head", "several heads", "masked images", "masked autoencoder"])
def test_a_head_without_logits_is_refused_before_the_first_step_and_pointed_to_hidden_states(config, case):
    with pytest.raises(ValueError, match="method='hidden'"):
        make(case, config()).train()
