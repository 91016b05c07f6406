"""Embeddings: models without a head, whose last stage compares pooled states, against loops written out by hand."""

import os

import pytest
import torch
import transformers as hf
from conftest import assert_same_weights, masked_lm_examples, tiny_bert, weights
from torch.utils.data import default_collate

from hf_curriculum_distill import CurriculumDistillationTrainer, ProjectionBank

ALONE = [{"kl_weight": 1.0}]
CONSISTENT = {"projection": "identity", "standardize_targets": False, "hidden_weight_in_logit_stage": 1.0}


def texts(count=16):
    return [{n: example[n] for n in ("input_ids", "attention_mask")} for example in masked_lm_examples(count)]


def pair(width=16):
    student = tiny_bert(2, seed=1, model_class=hf.BertModel)
    return student, tiny_bert(4, width, seed=2, model_class=hf.BertModel, initializer_range=0.3)


def make(args, width=16, models=None, **kwargs):
    student, teacher = models or pair(width)
    data = texts()
    return CurriculumDistillationTrainer(
        student, args, train_dataset=data, eval_dataset=data[:6], teacher_model=teacher, **kwargs
    )


def logged(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


# ---- the slow reference: one text at a time, without padding ----


def embedding(model, example, pooling):
    length = int(example["attention_mask"].sum())
    outputs = model(input_ids=example["input_ids"][None, :length])
    if pooling == "pooler":
        return outputs.pooler_output[0]
    states = outputs.last_hidden_state[0]
    return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]


def error(kind, ours, theirs):
    if kind == "mse":
        return sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(ours)
    return 1 - ours @ theirs / (ours.norm() * theirs.norm())


def trained_by_hand(student, teacher, pooling, loss, matrix, steps=3):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for example in texts():
            with torch.no_grad():
                target = matrix @ embedding(teacher, example, pooling)
            total = total + error(loss, embedding(student, example, pooling), target) / 16
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


@pytest.mark.parametrize("loss", ["mse", "cosine"])
@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "pooler"])
def test_a_stage_of_embeddings_alone_is_the_loop_by_hand(config, pooling, width, loss):
    fields = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    fields |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "projection": "orthogonal"}
    trainer = make(config(stages=ALONE, max_steps=3, pooling=pooling, hidden_loss=loss, **fields), width)
    trainer.train()
    matrix = torch.eye(16)
    if width != 16:
        matrix = trainer.projection_bank.tensors()["layer_2_4.weight"]
    else:
        assert trainer.projection_bank is None
    student, teacher = pair(width)
    losses = trained_by_hand(student.eval(), teacher.eval(), pooling, loss, matrix)
    assert [log["loss"] for log in logged(trainer)] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert [log[f"output_{loss}"] for log in logged(trainer)] == pytest.approx(losses, rel=1e-4, abs=1e-6)
    assert_same_weights(weights(trainer.model), weights(student), rtol=1e-3, atol=1e-5)
    similarity = []
    with torch.no_grad():
        for example in texts(6):
            target = matrix @ embedding(teacher, example, pooling)
            similarity.append(1 - error("cosine", embedding(student, example, pooling), target).item())
    metrics = trainer.evaluate()
    assert metrics["eval_cosine"] == pytest.approx(sum(similarity) / 6, abs=1e-4)
    assert not {"eval_kl", "eval_agreement", "eval_loss"} & metrics.keys()


CURRICULA = {
    "one basis": (16, CONSISTENT),
    "narrower": (24, {"projection": "pca", "standardize_targets": False, "hidden_weight_in_logit_stage": 1.0}),
    "standardised before": (24, {"layer_order": "together", "evaluate_layers": True}),
    "without stages": (24, {"method": "one_shot", "pooling": "cls", "hidden_loss": "cosine"}),
}


@pytest.mark.parametrize("width, fields", CURRICULA.values(), ids=CURRICULA)
def test_a_run_that_is_resumed_ends_as_if_never_interrupted_and_loads_without_the_library(config, width, fields):
    fields = {"pooling": "mean", "max_steps": 6, "save_strategy": "steps", "save_steps": 2} | fields
    fields |= {"eval_strategy": "steps", "eval_steps": 2}
    args = config(**fields)
    whole = make(args, width)
    whole.train()
    assert whole.stages[-1].needs_logits and whole.state.global_step == 6
    cosines = [log["eval_cosine"] for log in whole.state.log_history if "eval_cosine" in log]
    assert len(cosines) == 3
    resumed = make(config(**fields), width)
    resumed.train(resume_from_checkpoint=os.path.join(args.output_dir, "checkpoint-4"))
    assert_same_weights(weights(resumed.model), weights(whole.model))
    assert [log["eval_cosine"] for log in resumed.state.log_history if "eval_cosine" in log] == cosines
    loaded = hf.AutoModel.from_pretrained(os.path.join(args.output_dir, "checkpoint-6"))
    assert_same_weights(weights(loaded), weights(whole.model))
    with pytest.raises(ValueError, match=r"settings\.pooling changed from"):
        make(config(**fields | {"pooling": "last"}), width).train(resume_from_checkpoint=True)


def test_embeddings_are_learnt(config):
    trainer = make(config(**CONSISTENT, pooling="mean", max_steps=80, learning_rate=3e-3))
    before = trainer.evaluate()["eval_cosine"]
    trainer.train()
    assert trainer.evaluate()["eval_cosine"] > max(0.9, before + 0.2)


def test_the_teachers_projection_is_the_hidden_states_own(config):
    """Pooling and projecting are linear: the mean of projected states is the projected mean."""
    trainer = make(config(pooling="mean", projection="orthogonal", standardize_targets=False), 24)
    trainer.train()
    batch = default_collate(texts())
    with torch.no_grad():
        states = trainer.teacher.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        projected = (trainer.projection_bank.project(2, states) * mask).sum(1) / mask.sum(1)
        own = trainer.projection_bank.project_output((states * mask).sum(1) / mask.sum(1))
    torch.testing.assert_close(own, projected)


def test_a_cache_gives_back_the_embeddings(config, tmp_path):
    fields = {"stages": ALONE, "pooling": "mean", "max_steps": 8, "teacher_cache_logits": None}
    plain, cached = make(config(**fields), 24), make(config(**fields, teacher_cache=str(tmp_path / "cache")), 24)
    plain.train()
    cached.train()
    for one, other in zip(logged(plain), logged(cached), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-2)


def test_hidden_states_alone_are_evaluated_by_the_embeddings(config):
    trainer = make(config(method="hidden", pooling="mean", projection="identity", standardize_targets=False))
    assert not any(stage.needs_logits for stage in trainer.stages)
    trainer.train()
    assert -1 <= trainer.evaluate()["eval_cosine"] <= 1


def test_images_are_pooled_over_all_their_patches(config):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    student, teacher = (hf.ViTModel(hf.ViTConfig(num_hidden_layers=depth, **sizes)) for depth in (1, 2))
    images = [{"pixel_values": torch.randn(3, 16, 16)} for _ in range(8)]
    args = config(stages=ALONE, pooling="mean", max_steps=1, learning_rate=0.0, per_device_train_batch_size=8)
    trainer = CurriculumDistillationTrainer(student, args, train_dataset=images, teacher_model=teacher)
    trainer.train()
    with torch.no_grad():
        pixels = torch.stack([image["pixel_values"] for image in images])
        ours, theirs = (model.eval()(pixels).last_hidden_state.mean(1) for model in (student, teacher))
    assert logged(trainer)[0]["loss"] == pytest.approx((ours - theirs).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "width", "message"),
    [
        ({"pooling": "max"}, 16, "pooling is 'max'; use one of None, 'mean', 'cls', 'last', 'pooler'"),
        ({"method": "labels"}, 16, "method='labels' learns from labels, which embeddings have none of"),
        ({"method": "online"}, 16, "method='online' learns from labels"),
        ({"temperature": 2.0}, 16, "temperature is 2.0, but pooling='mean' compares embeddings"),
        ({"label_loss_weight": 0.5}, 16, "label_loss_weight is 0.5, but pooling='mean'"),
        ({"hidden_positions": "labels"}, 16, "hidden_positions is 'labels', but pooling='mean'"),
        ({"stages": [{"label_weight": 1.0}]}, 16, "Stage 'labels' learns from labels"),
        (
            {"teacher_cache": "cache"},
            16,
            r"teacher_cache_logits is 64, .* keep every number; set teacher_cache_logits=N",
        ),
        (
            {"hidden_weight_in_logit_stage": 1.0},
            24,
            "standardize_targets is True, but stage .* Set standardize_targets=",
        ),
        (
            CONSISTENT | {"projection": "gaussian"},
            16,
            "projection is 'gaussian', but stage .* can't be met. Set projection='identity'",
        ),
    ],
    ids=str,
)
def test_what_embeddings_cannot_be_learnt_with_is_refused_at_construction(config, fields, width, message):
    with pytest.raises(ValueError, match=message):
        make(config(**{"pooling": "mean"} | fields), width)


def test_models_that_cannot_be_pooled_are_refused_before_the_first_step(config):
    trainer = make(config(pooling="mean", stages=ALONE), models=(tiny_bert(2, seed=1), tiny_bert(4, seed=2)))
    with pytest.raises(ValueError, match=r"pooling='mean' needs the last_hidden_state of both models, .* AutoModel"):
        trainer.train()
    assert trainer.state.global_step == 0
    without = {"add_pooling_layer": False}
    models = [hf.BertModel(model.config, **without) for model in pair()]
    with pytest.raises(ValueError, match=r"pooling='pooler' needs the pooler_output"):
        make(config(pooling="pooler", stages=ALONE), models=models).train()
    t5 = hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="T5Model returns the states of its decoder; load the encoder alone"):
        make(config(pooling="mean"), models=(hf.T5Model(t5), hf.T5Model(t5)))


def test_a_bank_for_embeddings_alone_may_be_given(config):
    bank = ProjectionBank.create([(2, 4)], [16], [24], kind="orthogonal", seed=3)
    trainer = make(config(stages=ALONE, pooling="mean", standardize_targets=False), 24, projection_bank=bank)
    trainer.train()
    assert trainer.projection_bank is bank and bank.frozen
