"""Table and plot of complexity along runs, and the command that makes them."""

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_curriculum_distill.cli import main
from hf_curriculum_distill.complexity.along import Point, write_points
from hf_curriculum_distill.complexity.supervision import SupervisionComplexity
from hf_curriculum_distill.report.complexity import format_complexity, plot_complexity, read_runs


def point(step, **values):
    names = {name.replace("_", " "): value for name, value in values.items()}
    return Point(step, 2.0, {name: SupervisionComplexity(v, v * 1.1, v * 0.8) for name, v in names.items()})


@pytest.fixture
def runs(tmp_path):
    """Two runs in a folder, whose order is broken at one point of one of them."""
    for seed, teacher in ((0, 1.5), (1, 2.5)):
        points = [
            point(0, labels=2.0, random_labels=3.0, teacher=1.0, online_teacher=0.5, layer_1=0.7),
            point(5, labels=2.0, random_labels=4.0, teacher=teacher, online_teacher=0.5, layer_1=0.7),
        ]
        write_points(str(tmp_path / f"seed-{seed}"), [*points, point(7, labels=1.0)][: 3 - seed])
    return tmp_path


def test_the_table_says_means_where_the_order_holds_and_what_it_cost(runs):
    table = format_complexity(read_runs([str(runs)]))
    lines = [line.split() for line in table.splitlines()]
    assert table.startswith("adjusted supervision complexity, mean over 2 runs")
    assert ["5", "2.000", "±", "0.000", "4.000", "±", "0.000", "2.000", "±", "0.707"] in [line[:10] for line in lines]
    assert "random labels >= labels: at 4 of 4 points" in table
    assert "labels >= teacher: at 3 of 4 points" in table
    assert "teacher >= online teacher: at 4 of 4 points" in table
    assert "changes a value by at most 20.0%" in table and "cost: 2.0 s a point, 10 s in all" in table


def test_layers_are_drawn_beside_the_logits(runs):
    figure = plot_complexity(read_runs([str(runs)]), str(runs / "complexity.png"))
    left, right = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in left.lines if not line.get_label().startswith("_")}
    assert drawn["teacher"] == [1.0, 2.0] and set(drawn) == {"labels", "random labels", "teacher", "online teacher"}
    assert [line.get_label() for line in right.lines if not line.get_label().startswith("_")] == ["layer 1"]
    assert left.get_yscale() == right.get_yscale() == "linear"
    assert (runs / "complexity.png").is_file() and (runs / "complexity.svg").is_file()


def test_the_command_shows_runs_that_were_measured(runs, capsys):
    main(["complexity", str(runs / "seed-0"), str(runs / "seed-1"), "--output", str(runs / "out")])
    out = capsys.readouterr().out
    assert "mean over 2 runs" in out and (runs / "out/complexity.png").is_file()


def test_the_command_measures_checkpoints(tmp_path, capsys):
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10, "num_attention_heads": 1}
    for name in ("run/checkpoint-1", "run/checkpoint-2", "teacher/checkpoint-3", "teacher/checkpoint-4"):
        torch.manual_seed(len(name))
        config = ViTConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=1, **sizes)
        ViTForImageClassification(config).save_pretrained(tmp_path / name)
    given = ["complexity", str(tmp_path / "run"), "--teacher", str(tmp_path / "teacher"), "--dataset", "digits"]
    main([*given, "--examples", "6"])
    out = capsys.readouterr().out
    assert "step 2:" in out and "online teacher" in out and (tmp_path / "run/complexity.png").is_file()
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2 and "has no complexity.json yet; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["none"], "none has no complexity.json; train with SupervisionComplexityCallback"),
        (["none", "--teacher", "t"], "--teacher and --dataset belong together"),
    ],
)
def test_what_cannot_be_shown_is_said(tmp_path, monkeypatch, capsys, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["complexity", *given])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_runs_without_a_common_step_are_refused(tmp_path):
    for step in (1, 2):
        write_points(str(tmp_path / f"{step}"), [point(step, labels=1.0)])
    with pytest.raises(ValueError, match="were measured at no common step"):
        read_runs([str(tmp_path)])
