"""The page that compares runs: of a recipe, of single runs, of checkpoints, and of Trainer's own."""

import json
import re
from functools import partial

import pytest
from transformers import Trainer, TrainingArguments

from hf_curriculum_distill.cli import main
from hf_curriculum_distill.report.comparison import compare_on_page
from hf_curriculum_distill.report.results import read_results, settings_that_differ, write_results
from report.test_page import Reader
from report.test_tables import LAYERS, LOGITS, finished_run, several_methods


def rows_after(page, title):
    """The cells of the table below a heading."""
    part = page.decode().split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    rows = re.findall("<tr>(.*?)</tr>", part)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_the_page_has_the_summary_the_curves_the_runs_and_nothing_from_elsewhere(tmp_path):
    page = compare_on_page(several_methods(tmp_path))
    read = Reader(page)
    assert not read.foreign and not read.open
    assert page.count(b"<figure>") == 2  # accuracy by examples and by operations; no other metric is there
    assert {"one-shot (3 runs: mean and range)", "head untrained"} <= {text.strip() for text in read.text}
    assert "one_shot" not in {text.strip() for text in read.text}
    runs = rows_after(page, "Runs")
    assert len(runs) == 1 + len(several_methods(tmp_path / "again"))
    assert "broken: kl is nan" in read.text


def test_every_metric_that_all_runs_have_is_drawn_the_chosen_one_first(tmp_path):
    results = [finished_run(tmp_path, name, {2: 0.2, 4: 0.4}) for name in ("one_shot", "labels")]
    for result in results:
        path = tmp_path / f"{result['method']} 0" / "trainer_state.json"
        state = json.loads(path.read_text())
        state["log_history"] += [{"step": 4, "eval_kl": 0.5, "eval_loss": 1.0}]
        path.write_text(json.dumps(state))
    titles = re.findall("<h2>(.*?)</h2>", compare_on_page(results, "eval_loss").decode())
    drawn = ["Held-out loss", "Held-out accuracy", "Held-out KL from the teacher (nats)"]
    assert titles == [*drawn, "Runs", "Stages", "Settings that differ"]


def test_a_line_is_drawn_where_it_is_asked_for_and_chance_where_it_is_known(tmp_path):
    result = finished_run(tmp_path, accuracy={2: 0.2, 4: 0.4})
    assert not {"teacher", "chance"} & {*Reader(compare_on_page([result])).text}
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {str(n): str(n) for n in range(4)}}
    (tmp_path / "one_shot 0" / "config.json").write_text(json.dumps(config))
    assert {"teacher", "chance"} <= {*Reader(compare_on_page([result], lines={"teacher": 0.9})).text}


def test_stages_and_settings_that_differ_are_tables(tmp_path):
    stages = [LAYERS | {"until": 2, "name": "layer 1", "hidden": [[1, 2]], "hidden_weight": 0.5}]
    stages.append(LOGITS | {"until": None, "name": "kl"})
    run = partial(finished_run, tmp_path, accuracy={4: 0.4}, layers_until=2)
    same = {"weight_decay": 0.1}
    results = [
        run("curriculum", stages=stages, max_steps=4, arguments=same | {"learning_rate": 1e-3}),
        run("one_shot", arguments=same | {"learning_rate": 2e-3, "<b>": [1]}),
    ]
    page = compare_on_page(results)
    assert rows_after(page, "Stages")[1:3] == [
        ["curriculum", "layer 1", "1 to 2", "1 ← 2", "0.5", "0.0", "0.0"],
        ["curriculum", "kl", "3 to 4", "-", "-", "1.0", "0.0"],
    ]
    assert settings_that_differ(results) == {"learning_rate": [1e-3, 2e-3], "<b>": [None, [1]]}
    differing = rows_after(page, "Settings that differ")
    assert differing[1:] == [["learning_rate", "0.001", "0.002"], ["&lt;b&gt;", "-", "[1]"]]


@pytest.fixture
def stock_runs(tmp_path, student, examples):
    """Two runs of Trainer itself, 4 steps of 2 x 4 examples; the first saved its state, the second a checkpoint."""
    for name, saves in (("a", "no"), ("b", "steps")):
        args = TrainingArguments(
            str(tmp_path / name),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy=saves,
            save_steps=4,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(student, args, train_dataset=examples, eval_dataset=examples[:8])
        trainer.train()
        if saves == "no":
            trainer.save_state()
    return tmp_path / "a", tmp_path / "b" / "checkpoint-4"


def test_any_two_runs_of_trainer_can_be_compared_and_checkpoints(stock_runs, tmp_path, capsys, caplog):
    finished, checkpoint = stock_runs
    main(["compare", str(finished), str(checkpoint), "--html", str(tmp_path / "page.html"), "--output", str(tmp_path)])
    assert "eval_loss at the end" in capsys.readouterr().out  # there is no accuracy
    first, second = read_results([str(finished), str(checkpoint)])
    assert first["method"] != second["method"] and first["method"].startswith("trainer")
    assert (first["samples"], second["samples"]) == (32, 16)
    assert "does not say how many examples a step took" in caplog.text  # of the checkpoint, half are not known of
    page = (tmp_path / "page.html").read_bytes()
    state = json.loads((finished / "trainer_state.json").read_text())
    assert f"{state['total_flos']:.2e}" in page.decode() and page.count(b"<figure>") == 2


def test_a_line_needs_a_name_and_a_finite_value(tmp_path, capsys):
    write_results(tmp_path, [finished_run(tmp_path, accuracy={4: 0.4})])
    for wrong in ("0.9", "teacher", "teacher=nan", "=1"):
        with pytest.raises(SystemExit):
            main(["compare", str(tmp_path), "--line", wrong])
        assert f"--line is {wrong!r}; write NAME=VALUE" in capsys.readouterr().err
