"""What a terminal, a notebook and trackers show of the stages."""

import importlib
import json
import re
import sqlite3
import struct
import sys
from glob import glob
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PrinterCallback, ProgressCallback

from hf_curriculum_distill import CurriculumDistillationTrainer


def trained(student, args, examples, teacher, callback=None):
    trainer = CurriculumDistillationTrainer(
        student, args, train_dataset=examples, eval_dataset=examples[:8], teacher_model=teacher
    )
    if callback is not None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def test_logs_name_the_stage_and_so_does_what_is_printed_without_bars(student, teacher, examples, config, capsys):
    trainer = trained(student, config(max_steps=4, logging_steps=2), examples, teacher)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [(log["stage"], log["stage_name"]) for log in logs] == [(0, "layer 1"), (1, "layer 2"), (2, "kl")]
    assert re.findall("'stage_name': '(.*?)'", capsys.readouterr().out) == ["layer 1", "layer 2", "kl"]


def test_bars_name_the_stage_and_the_calibration_has_one(student, teacher, examples, config, capsys):
    args = config(max_steps=4, disable_tqdm=False)
    trained(student, args, examples, teacher)
    err = capsys.readouterr().err
    places = [err.index(name) for name in ("calibration: ", "layer 1: ", "layer 2: ", "kl: ")]
    assert places == sorted(places)


@pytest.fixture
def notebook(monkeypatch):
    """The callback of notebooks; where IPython is not installed, with a page of our own to display it on."""
    shown = []
    page = SimpleNamespace(update=shown.append)
    display = ModuleType("IPython.display")
    display.HTML, display.display = str, lambda html, **_: (shown.append(html), page)[1]
    package = ModuleType("IPython")
    package.display = display
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    module = importlib.import_module("transformers.utils.notebook")
    yield module.NotebookProgressCallback(), shown
    del sys.modules["transformers.utils.notebook"]


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_notebook_names_the_stage_in_its_bar_and_in_each_line_of_its_table(
    student, teacher, examples, config, notebook, evaluates
):
    callback, shown = notebook
    evaluations = {"eval_strategy": "steps", "eval_steps": 2} if evaluates else {}
    trained(student, config(max_steps=4, logging_steps=2, **evaluations), examples, teacher, callback)
    head, *lines = re.findall("<tr.*?</tr>", shown[-1], re.DOTALL)
    cells = [re.findall("<td>(.*?)</td>", line) for line in lines]
    columns = re.findall("<th>(.*?)</th>", head)
    stages = [line[columns.index("Stage")] for line in cells]
    steps = [int(line[columns.index("Step")]) for line in cells]
    expected = {2: "layer 2", 4: "kl"} if evaluates else {1: "layer 1", 2: "layer 2", 4: "kl"}
    assert dict(zip(steps, stages, strict=True)) == expected
    assert any("layer 1\n" in html for html in shown) and "kl\n" in shown[-1]


def test_the_callback_of_bars_is_transformers_own(student, teacher, examples, config):
    trainer = CurriculumDistillationTrainer(
        student, config(disable_tqdm=False), train_dataset=examples, teacher_model=teacher
    )
    assert [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)] == [
        ProgressCallback
    ]


def test_tensorboard_has_the_stage_of_every_step_and_its_name(student, teacher, examples, config):
    args = config(max_steps=4, report_to="tensorboard", eval_strategy="steps", eval_steps=2, evaluate_layers=True)
    trained(student, args, examples, teacher)
    (path,) = glob(f"{args.output_dir}/runs/*/*") or glob(f"{args.logging_dir}/*")
    events = EventAccumulator(path).Reload()
    stages = {event.step: event.value for event in events.Scalars("train/stage")}
    assert stages == {1: 0, 2: 1, 3: 2, 4: 2}
    names = events.Tensors("train/stage_name/text_summary")
    said = {event.step: event.tensor_proto.string_val[0].decode() for event in names}
    assert said == {1: "layer 1", 2: "layer 2", 3: "kl", 4: "kl"}
    assert {event.step for event in events.Scalars("train/hidden_mse")} == {1, 2}
    assert {event.step for event in events.Scalars("train/kl")} == {3, 4}
    assert {event.step for event in events.Scalars("eval/layer_1_mse")} == {2, 4}


def stages_of(logs):
    """Step, stage and its name of each log of a training that has them."""
    return [
        (log["train/global_step"], log["train/stage"], log["train/stage_name"]) for log in logs if "train/stage" in log
    ]


STAGES = [(1, 0, "layer 1"), (2, 1, "layer 2"), (4, 2, "kl")]


def test_trackio_has_the_stages_and_their_names(student, teacher, examples, config, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read on import
    pytest.importorskip("trackio")
    args = config(max_steps=4, logging_steps=2, report_to="trackio", project="stages", trackio_static_space_id=False)
    trained(student, args, examples, teacher)
    with sqlite3.connect(tmp_path / "trackio/stages.db") as database:
        logs = [json.loads(log) for (log,) in database.execute("select metrics from metrics order by step")]
    assert stages_of(logs) == STAGES


def read_wandb(path):
    """The records of an offline run, in the format of LevelDB's log: after a header of 7 bytes blocks of 32 KB, where a
    part of a record has a checksum, its length and a kind, which is 1 or 4 where the record ends."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""
    while at < len(content):
        if (room := 2**15 - at % 2**15) < 7:  # too little for another part
            at += room
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record, at = record + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def test_weights_and_biases_has_the_stages_and_their_names_offline(
    student, teacher, examples, config, monkeypatch, tmp_path
):
    wandb = pytest.importorskip("wandb")
    settings = {"MODE": "offline", "DIR": tmp_path, "CONFIG_DIR": tmp_path, "SILENT": "true", "CONSOLE": "off"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    trained(student, config(max_steps=4, logging_steps=2, report_to="wandb"), examples, teacher)
    wandb.teardown()
    (path,) = Path(tmp_path).glob("wandb/offline-run-*/*.wandb")
    items = [record.history.item for record in read_wandb(path) if record.WhichOneof("record_type") == "history"]
    logs = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in log} for log in items]
    assert stages_of(logs) == STAGES
