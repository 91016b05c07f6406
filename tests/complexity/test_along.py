"""Complexity while a student trains: measured by a callback, and from checkpoints."""

import json

import pytest
import torch
from conftest import assert_same_weights, weights
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_curriculum_distill import CurriculumDistillationTrainer, SupervisionComplexityCallback, empirical_ntk
from hf_curriculum_distill.complexity import class_targets, supervision_complexity
from hf_curriculum_distill.complexity.along import Point, load_model, measure_run, read_points, write_points
from hf_curriculum_distill.complexity.analysis import Drawn
from hf_curriculum_distill.complexity.supervision import SupervisionComplexity


def vit(layers, width, seed):
    torch.manual_seed(seed)
    sizes = {"image_size": 4, "patch_size": 2, "num_channels": 1, "num_labels": 3, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(hidden_size=width, num_hidden_layers=layers, intermediate_size=width, **sizes, **dropout)
    return ViTForImageClassification(config)


def images(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(1, 4, 4, generator=draw), "labels": n % 3} for n in range(count)]


def stacked(examples):
    return {name: torch.stack([torch.as_tensor(row[name]) for row in examples]) for name in examples[0]}


@pytest.fixture
def trainer(config):
    def make(**options):
        teacher = options.pop("teacher", None) or vit(2, 12, seed=1)
        args = config(max_steps=4, eval_strategy="steps", eval_steps=2, save_steps=2, calibration_samples=8, **options)
        data = {"train_dataset": images(16), "eval_dataset": images(12, seed=1)}
        return CurriculumDistillationTrainer(model=vit(1, 8, seed=2), args=args, teacher_model=teacher, **data)

    return make


def test_the_callback_measures_before_the_first_step_and_at_each_evaluation_and_changes_no_training(trainer):
    plain, measured = trainer(), trainer()
    plain.train()
    initial = {name: value.clone() for name, value in measured.model.state_dict().items()}
    measured.add_callback(SupervisionComplexityCallback(measured, 8))
    measured.train()
    measured.evaluate()  # at a step that has been measured
    assert_same_weights(weights(measured.model), weights(plain.model))
    points = read_points(measured.args.output_dir)
    assert [point.step for point in points] == [0, 2, 4]
    assert [list(point.complexity) for point in points] == [["labels", "random labels", "teacher", "layer 1"]] * 3
    # the last point by hand, on the examples that were drawn
    import random

    rows = sorted(random.Random(0).sample(range(12), 8))
    held_out = stacked([measured.eval_dataset[row] for row in rows])
    for model, point in ((measured.model, points[-1]), (vit(1, 8, seed=2), points[0])):
        if point.step == 0:
            model.load_state_dict(initial)
        kernel = empirical_ntk(model, {"pixel_values": held_out["pixel_values"]}, "trace")
        labels = class_targets(torch.nn.functional.one_hot(held_out["labels"], 3))
        assert point.complexity["labels"].value == pytest.approx(supervision_complexity(kernel, labels).value, rel=1e-4)


def test_with_checkpoints_the_online_teacher_is_that_of_the_step(trainer, tmp_path):
    folders = []
    for number in (1, 2):
        vit(2, 12, seed=number).save_pretrained(folder := tmp_path / f"teacher/checkpoint-{number}")
        folders.append(str(folder))
    measured = trainer(method="progressive", teacher=folders)
    measured.add_callback(SupervisionComplexityCallback(measured, 8))
    measured.train()
    first, middle, last = (point.complexity for point in read_points(measured.args.output_dir))
    assert first["online teacher"] != first["teacher"]
    assert middle["online teacher"] == middle["teacher"] and last["online teacher"] == last["teacher"]


def test_an_online_teacher_is_measured_as_it_is(trainer):
    measured = trainer(method="online")
    measured.add_callback(SupervisionComplexityCallback(measured, 6))
    measured.train()
    names = [list(point.complexity) for point in read_points(measured.args.output_dir)]
    assert names == [["labels", "random labels", "online teacher"]] * 3


def test_checkpoints_measured_afterwards_say_what_the_callback_said(trainer, tmp_path):
    vit(2, 12, seed=1).save_pretrained(tmp_path / "teacher")
    measured = trainer(teacher=str(tmp_path / "teacher"), save_strategy="steps")
    measured.add_callback(SupervisionComplexityCallback(measured, 12))  # all of them
    measured.train()
    inputs = stacked(measured.eval_dataset)
    after = list(measure_run(measured.args.output_dir, str(tmp_path / "teacher"), inputs))
    during = read_points(measured.args.output_dir)[1:]
    for one, other in zip(after, during, strict=True):
        assert one.step == other.step and one.complexity.keys() == other.complexity.keys()
        for name, value in one.complexity.items():
            assert value == pytest.approx(other.complexity[name], rel=1e-3), name


def test_a_resnet_is_measured_with_its_teachers_checkpoints(tmp_path):
    sizes = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    for name in ("run/checkpoint-10", "run/checkpoint-20", "teacher/checkpoint-5", "teacher/checkpoint-6"):
        ResNetForImageClassification(ResNetConfig(num_labels=3, **sizes)).save_pretrained(tmp_path / name)
    inputs = stacked([{**row, "pixel_values": torch.randn(1, 8, 8)} for row in images(6)])
    points = list(measure_run(str(tmp_path / "run"), str(tmp_path / "teacher"), inputs, drawn=Drawn(num_directions=2)))
    assert [point.step for point in points] == [10, 20]
    first, last = (point.complexity for point in points)
    assert first["online teacher"] != first["teacher"] and last["online teacher"] == last["teacher"]


def test_points_are_read_as_they_were_written_and_damage_is_said(tmp_path):
    points = [Point(0, 1.5, {"labels": SupervisionComplexity(1.0, 1.1, 0.9)}), Point(7, 2.0, {})]
    write_points(str(tmp_path), points)
    assert read_points(str(tmp_path)) == points
    for damage in ("[{}]", "{", "[1]", json.dumps([{"step": 1, "seconds": 1, "complexity": {"a": [1]}}])):
        (tmp_path / "complexity.json").write_text(damage)
        with pytest.raises(ValueError, match=r"complexity\.json is damaged"):
            read_points(str(tmp_path))


def test_what_cannot_be_measured_is_said(trainer, config, tmp_path):
    plain = CurriculumDistillationTrainer(model=vit(1, 8, 0), args=config(max_steps=1), train_dataset=images(4))
    with pytest.raises(ValueError, match="The trainer has no teacher_model"):
        SupervisionComplexityCallback(plain)
    without = trainer(method="one_shot")
    without.eval_dataset = None
    with pytest.raises(ValueError, match="The trainer has no eval_dataset"):
        SupervisionComplexityCallback(without)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, so it holds no model"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["MyViT"]}')
    with pytest.raises(ValueError, match="holds a MyViT, which is no class of transformers"):
        load_model(str(tmp_path))
