import json

import pytest

from hf_curriculum_distill.report import format_table, plot_comparison, write_results


def finished_run(folder, method, layer_stage_end):
    """A run of 4 steps of 8 examples that evaluated after steps 2 and 4."""
    path = folder / method
    path.mkdir()
    history = [{"step": step, "student_flops": 10.0 * step, "teacher_flops": 5.0 * step} for step in (1, 2, 4)] + [
        {"step": step, "eval_accuracy": step / 10} for step in (2, 4)
    ]
    (path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    layers = {"until": layer_stage_end, "kl_weight": 0.0, "label_weight": 0.0}
    logits = {"until": None, "kl_weight": 1.0, "label_weight": 0.0}
    stages = [layers, logits] if layer_stage_end else [logits]
    (path / "curriculum.json").write_text(json.dumps({"stages": stages}))
    return {
        "method": method, "seed": 0, "eval_accuracy": 0.4, "eval_agreement": 0.5, "eval_kl": 1.25, "samples": 32,
        "steps": 4, "student_flops": 40.0, "teacher_flops": 20.0, "seconds": 3.0, "finite": True, "path": str(path),
    }  # fmt: skip


def test_the_table_has_a_line_a_model_and_aligned_columns(tmp_path):
    results = [finished_run(tmp_path, "curriculum", 2), {"method": "one_shot", "finite": False}]
    header, rule, first, second = format_table(results).splitlines()
    assert header.split() == ["method", "accuracy", "agreement", "KL", "samples", "FLOPs", "seconds"]
    assert first.split() == ["curriculum", "0.4000", "0.5000", "1.2500", "32", "6.00e+01", "3"]
    assert second.split() == ["one_shot", "-", "-", "-", "-", "-", "-"]
    assert len({len(line) for line in (header, rule, first, second)}) == 1


def test_results_are_written_as_a_list(tmp_path):
    results = [finished_run(tmp_path, "curriculum", 2)]
    write_results(tmp_path / "new", results)
    assert json.loads((tmp_path / "new/results.json").read_text()) == results


@pytest.mark.parametrize("layer_stage_end", [2, None])
def test_the_plot_draws_every_evaluation_against_samples_and_operations(tmp_path, layer_stage_end):
    from matplotlib import pyplot as plt

    results = [finished_run(tmp_path, "curriculum", layer_stage_end), finished_run(tmp_path, "one_shot", None)]
    drawn = []
    close = plt.close
    try:
        plt.close = lambda figure: drawn.append(figure)
        plot_comparison(results, str(tmp_path / "plot.png"), "title")
    finally:
        plt.close = close
    samples, operations = drawn[0].axes
    assert [line.get_xydata().tolist() for line in samples.lines] == [[[16.0, 0.2], [32.0, 0.4]]] * 2
    assert [line.get_xydata().tolist() for line in operations.lines] == [[[30.0, 0.2], [60.0, 0.4]]] * 2
    assert len(samples.patches) == (1 if layer_stage_end else 0)
    close(drawn[0])
