"""Plots of finished runs: what is drawn, and where."""

import json
from functools import partial

import pytest

from hf_curriculum_distill.report.figures import choose_looks, find_chance, plot_comparison
from report.test_tables import LAYERS, LOGITS, finished_run


@pytest.mark.parametrize("layers_until", [2, None])
def test_the_plot_draws_every_evaluation_against_samples_and_operations(tmp_path, layers_until):
    results = [
        finished_run(tmp_path, "curriculum", {2: 0.2, 4: 0.4}, layers_until),
        finished_run(tmp_path, "one_shot", {2: 0.2, 4: 0.4}),
        finished_run(tmp_path, "broken"),
    ]
    figure = plot_comparison(results, str(tmp_path / "plot.png"), "title")
    samples, operations = figure.axes
    assert [line.get_xydata().tolist() for line in samples.lines] == [[[16.0, 0.2], [32.0, 0.4]]] * 2
    costs = [[6.0, 36.0] if layers_until else [30.0, 60.0], [30.0, 60.0]]
    assert [line.get_xdata().tolist() for line in operations.lines] == costs
    strips = [(strip.get_x(), strip.get_width()) for axis in figure.axes for strip in axis.patches]
    assert strips == ([(0.0, 16.0), (0.0, 6.0)] if layers_until else [])
    assert [line.get_color() for line in samples.lines] == ["#0072b2", "0.25"]  # the baseline is grey
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["curriculum", "one-shot"]
    assert figure.get_suptitle() == "title" and samples.get_ylabel() == "held-out accuracy"
    assert [axis.get_xscale() for axis in figure.axes] == ["linear", "linear"]
    assert (tmp_path / "plot.png").read_bytes()[1:4] == b"PNG"
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_a_method_is_the_mean_and_the_range_of_its_runs_where_all_were_evaluated(tmp_path):
    accuracies = [{1: 0.0, 2: 0.2, 3: 0.6, 4: 0.8}, {2: 0.4, 4: 0.6}]  # at step 3 the second is at 0.5
    results = [finished_run(tmp_path, "one_shot", accuracies[seed], seed=seed) for seed in (0, 1)]
    figure = plot_comparison(results, str(tmp_path / "plot.png"))
    for axis, unit in zip(figure.axes, (8.0, 15.0), strict=True):
        (line,), (band,) = axis.lines, axis.collections
        assert line.get_xdata() == pytest.approx([2 * unit, 3 * unit, 4 * unit])
        assert line.get_ydata() == pytest.approx([0.3, 0.55, 0.7])
        corners = {(round(x / unit), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
        assert corners == {(2, 0.2), (2, 0.4), (3, 0.5), (3, 0.6), (4, 0.6), (4, 0.8)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one-shot (2 runs)"]
    assert figure.legends[0].get_title().get_text() == "mean and range over runs"


@pytest.mark.parametrize(("steps", "scale"), [(40, "linear"), (44, "log")])
def test_the_axes_are_logarithmic_when_methods_spend_more_than_ten_times_as_much(tmp_path, steps, scale):
    results = [
        finished_run(tmp_path, "one_shot", {4: 0.4}),
        finished_run(tmp_path, "curriculum", {4: 0.1, steps: 0.4}, layers_until=None, steps=steps),
        finished_run(tmp_path, "last", {4: 0.1}, layers_until=2),
    ]
    figure = plot_comparison(results[:2], str(tmp_path / "plot.png"))
    assert [axis.get_xscale() for axis in figure.axes] == [scale, scale]
    samples, _ = plot_comparison(results, str(tmp_path / "plot.png")).axes
    assert (samples.patches[0].get_x() > 0) == (scale == "log")  # a strip from 0 would have no end


def test_dots_mark_evaluations_that_are_few(tmp_path):
    results = [finished_run(tmp_path, str(n), dict.fromkeys(range(1, n + 1), 0.5), steps=n) for n in (40, 41)]
    figure = plot_comparison(results, str(tmp_path / "plot.png"))
    assert [line.get_marker() for line in figure.axes[0].lines] == ["o", "None"]


def test_another_metric_and_baseline_are_drawn_as_such(tmp_path):
    results = [finished_run(tmp_path, name, {4: 1.0}, metric="eval_kl") for name in ("one_shot", "curriculum")]
    figure = plot_comparison(results, str(tmp_path / "plot.png"), metric="eval_kl", baseline="curriculum")
    assert [line.get_color() for line in figure.axes[0].lines] == ["#0072b2", "0.25"]
    assert figure.axes[0].get_ylabel() == "held-out KL from the teacher (nats)"


def test_names_are_drawn_as_they_are_written(tmp_path):
    names = ["$x^$", "_hidden", "50 % of $3"]
    figure = plot_comparison([finished_run(tmp_path, n, {4: 0.5}) for n in names], str(tmp_path / "plot.png"))
    assert [text.get_text().strip().replace("\\$", "$") for text in figure.legends[0].get_texts()] == names


@pytest.mark.parametrize("length", [30, 60, 300])
def test_the_legend_has_room_for_long_names(tmp_path, length):
    names = [letter + length // 6 * " rate=" for letter in "abcdef"]
    results = [finished_run(tmp_path / name[0], "one_shot", {2: 0.2, 4: 0.5}) | {"method": name} for name in names]
    figure = plot_comparison(results, str(tmp_path / "plot.png"))
    (left, bottom), (right, top) = figure.legends[0].get_window_extent().get_points()
    assert 0 <= left < right <= figure.bbox.width and 0 <= bottom < top <= figure.bbox.height


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_is_not_written_through_a_link(tmp_path, suffix):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f"plot.{suffix}").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=rf"plot\.{suffix} is a symbolic link, and what it leads to is not overwritten"):
        plot_comparison([finished_run(tmp_path, accuracy={4: 0.5})], str(tmp_path / "plot.png"))
    assert (tmp_path / "victim").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"one_shot 0", "victim", f"plot.{suffix}"}


def test_nothing_is_drawn_of_runs_that_are_not_finite(tmp_path):
    with pytest.raises(ValueError, match="No run is finite"):
        plot_comparison([finished_run(tmp_path)], str(tmp_path / "plot.png"))


def test_the_layer_stages_before_any_stage_of_logits_say_that_the_head_is_untrained(tmp_path):
    stages = [LAYERS | {"until": 1}, LOGITS | {"until": 2}, LAYERS | {"until": 3}, LOGITS | {"until": None}]
    run = partial(finished_run, tmp_path, accuracy={1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    for results, texts, hollow in (
        ([run("first", layers_until=2)], ["head untrained"], 2),
        ([run("later", stages=[stages[1], stages[2], stages[3]])], ["layer stages"], 0),
    ):
        axis, _ = plot_comparison(results, str(tmp_path / "plot.png")).axes
        assert [text.get_text().strip() for text in axis.texts] == texts
        assert sum(len(dots.get_offsets()) for dots in axis.collections) == hollow


@pytest.mark.parametrize("cached", [0, 1])
def test_the_layer_stages_end_at_the_mean_cost_of_runs_that_cost_unequally(tmp_path, cached):
    results = [finished_run(tmp_path, "curriculum", {2: 0.1, 3: 0.3, 4: 0.5}, 2, seed=seed) for seed in (0, 1)]
    path = tmp_path / f"curriculum {cached}/trainer_state.json"
    state = json.loads(path.read_text())
    for entry in state["log_history"]:
        if "teacher_flops" in entry:  # the student's alone: 4 operations in the layer stage and 24 at the end
            entry["teacher_flops"] = 0.0
    path.write_text(json.dumps(state))
    figure = plot_comparison(results, str(tmp_path / "plot.png"))
    for axis, costs in zip(figure.axes, ([16, 24, 32], [5, 17.5, 30]), strict=True):
        assert axis.lines[0].get_xdata().tolist() == costs
        assert [(strip.get_x(), strip.get_width()) for strip in axis.patches] == [(0, costs[0])]
        (hollow,) = [dots for dots in axis.collections if len(dots.get_offsets()) and dots.get_zorder() == 4]
        assert hollow.get_offsets().tolist() == [[costs[0], 0.1]]


def test_a_title_names_the_metric_and_lines_are_drawn_across(tmp_path):
    result = finished_run(tmp_path, accuracy={2: 0.2, 4: 0.4})
    figure = plot_comparison([result], str(tmp_path / "plot.png"), lines={"teacher": 0.9, "chance": 0.25})
    assert figure.get_suptitle() == "Held-out accuracy, by examples and by operations"
    for axis in figure.axes:
        assert [text.get_text() for text in axis.texts] == ["teacher", "chance"]
        assert [line.get_ydata() for line in axis.lines[1:]] == [[0.9, 0.9], [0.25, 0.25]]


def test_ranges_that_overlap_are_all_visible(tmp_path):
    results = [finished_run(tmp_path, m, {2: 0.2, 4: 0.4 + s}, seed=s) for m in ("a", "b") for s in (0, 1)]
    axis, _ = plot_comparison(results, str(tmp_path / "plot.png")).axes
    first, second = axis.collections
    for band in (first, second):
        assert band.get_facecolor()[0, 3] < 0.2 and band.get_edgecolor()[0, 3] == 1
    assert (first.get_edgecolor() != second.get_edgecolor()).any()
    assert all(line.get_zorder() > first.get_zorder() for line in axis.lines)


def test_methods_have_the_colours_of_okabe_and_ito_and_then_other_lines():
    looks = list(choose_looks([*map(str, range(8)), "one_shot"], "one_shot").values())
    colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
    assert looks[:6] == [("-", color) for color in colors] and looks[6:] == [
        *(("--", c) for c in colors[:2]),
        ("-", "0.25"),
    ]


@pytest.mark.parametrize(("architecture", "labels", "chance"), [
    ("BertForSequenceClassification", {"0": "a", "1": "b", "2": "c", "3": "d"}, 0.25),
    ("ViTForImageClassification", None, 0.5),
    ("BertForMaskedLM", None, None),
])  # fmt: skip
def test_chance_is_known_of_classifiers(tmp_path, architecture, labels, chance):
    result = finished_run(tmp_path, accuracy={4: 0.4})
    config = {"architectures": [architecture]} | ({"id2label": labels} if labels else {})
    (tmp_path / "one_shot 0" / "config.json").write_text(json.dumps(config))
    assert find_chance([result]) == chance
    for metric, drawn in (("eval_accuracy", chance), ("eval_kl", None)):
        results = [result | {metric: 0.4}, finished_run(tmp_path / metric, "broken")]
        axis, _ = plot_comparison(results, str(tmp_path / "plot.png"), metric=metric).axes
        assert [text.get_text() for text in axis.texts] == ([] if drawn is None else ["chance"])
