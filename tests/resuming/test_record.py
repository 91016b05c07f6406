"""`curriculum.json`: what is written is read; what changed is said."""

import json

import pytest
from test_families import labels_alone, pairs

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.resuming.record import (
    FILE_NAME,
    FORMAT_VERSION,
    check_resumable,
    read_record,
    recorded_groups,
    resumed_at,
    write_record,
)
from hf_curriculum_distill.stages import Stage

RECORD = {
    "method": "curriculum",
    "step": 3,
    "max_steps": 8,
    "stages": [{"name": "kl", **vars(Stage(kl_weight=1.0, hidden=((1, 2),)))}],
    "settings": {"temperature": 1.0, "divergence": "forward_kl"},
    "teacher": {"name": "teacher", "revision": None, "fingerprint": "abc"},
    "projection_matrices": "def",
    "projection_bank": "ghi",
    "data": {"num_examples": 64, "seed": 42, "train_sampling_strategy": "random", "dataloader_drop_last": False},
    "samples_per_step": 16,
    "versions": {"torch": "2.13"},
}
CHECKPOINT = RECORD | {
    "epoch": 0,
    "batches": 3,
    "unlogged": {"total_loss": 1.5, "first_step": 0, "terms": ["kl"], "processes": [[1.0, 2.0, 0.5, 0.5]]},
    "student_flops": 1.0,
    "teacher_flops": 2.0,
    "flop_rates": {"0": [[1.0, 2.0], [0.0, 0.0]]},
    "files": {"model.safetensors": 100},
}


def test_a_record_is_read_as_it_was_written(tmp_path):
    write_record(tmp_path, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert read_record(tmp_path) == json.loads(json.dumps({"format_version": FORMAT_VERSION, **RECORD}))
    write_record(tmp_path, RECORD | {"step": 4})
    assert read_record(tmp_path)["step"] == 4


def test_a_folder_without_a_record_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"has no {FILE_NAME}, so it is no checkpoint of a distillation run"):
        read_record(tmp_path)


def refused(folder, text, message=""):
    """Reading such a record is an error of one short line."""
    (folder / FILE_NAME).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"is not a readable run record: .*{message}") as error:
        read_record(folder)
    assert "\n" not in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 600


@pytest.mark.parametrize("text", ["", "{", '{"step": 1}', "[]", "3", "null", "[" * 10**5, '{"a":' * 10**5, b"\xff\xfe"])
def test_a_damaged_record_is_refused(text, tmp_path):
    refused(tmp_path, text)


# The others may be None, or say what a run was made with; without `files` a record is not a checkpoint's.
REQUIRED = sorted(
    {"format_version", *CHECKPOINT} - {"teacher", "projection_matrices", "projection_bank", "versions", "files"}
)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_record_that_lacks_a_field_is_refused_by_its_name(name, tmp_path):
    record = {"format_version": FORMAT_VERSION, **CHECKPOINT}
    del record[name]
    refused(tmp_path, json.dumps(record), f"'{name}' is missing")


DEEP = json.loads("[" * 900 + "]" * 900)
WRONG = (None, True, "x", "\x1b[31m\n", "\ud800", 1.5, -1, [], {}, [1], DEEP, "x" * 10**6)


@pytest.mark.parametrize("name", [*REQUIRED, "files"])
def test_a_field_of_another_type_is_refused_with_its_name(name, tmp_path):
    right = CHECKPOINT.get(name, FORMAT_VERSION)
    kinds = (int, float) if isinstance(right, float) else type(right)
    for wrong in WRONG:
        if not isinstance(wrong, kinds) or isinstance(wrong, bool) or (wrong == -1 and kinds is int):
            refused(tmp_path, json.dumps({"format_version": FORMAT_VERSION, **CHECKPOINT, name: wrong}), f"{name} is ")


@pytest.mark.parametrize(
    "path, wrong, message",
    [
        (("unlogged", "total_loss"), "0", "total_loss is '0', not a number"),
        (("unlogged", "processes"), [["1"]], "one of one of processes is '1', not a number"),
        (("unlogged", "terms"), [1], "one of terms is 1, not a string"),
        (("stages",), [1], "one of stages is 1, not a dictionary"),
        (("student_flops",), "1", "student_flops is '1', not a number"),
    ],
)
def test_what_is_inside_a_field_is_checked_as_well(path, wrong, message, tmp_path):
    record = json.loads(json.dumps({"format_version": FORMAT_VERSION, **CHECKPOINT}))
    inner = record
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = wrong
    refused(tmp_path, json.dumps(record), message)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(number, tmp_path):
    text = json.dumps({"format_version": FORMAT_VERSION, **CHECKPOINT})
    for value in ("1.5", "1.0", "2.0", "0.5"):
        refused(tmp_path, text.replace(value, number, 1), f"{number} is not a finite number")


def test_another_format_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_text('{"format_version": 99}')
    with pytest.raises(ValueError, match=f"has format version 99, this library reads {FORMAT_VERSION}"):
        read_record(tmp_path)


def test_the_same_settings_resume(tmp_path):
    write_record(tmp_path, RECORD)
    saved = read_record(tmp_path)
    check_resumable(saved, RECORD, "folder")
    # where a run stands, and what it ran on, may differ
    check_resumable(saved, RECORD | {"step": 7, "versions": {"torch": "3.0"}, "projection_bank": "unfitted"}, "folder")


@pytest.mark.parametrize(
    "change, messages",
    [
        ({"max_steps": 9}, ["max_steps changed from 8 to 9"]),
        ({"method": "one_shot"}, ["method changed from 'curriculum' to 'one_shot'"]),
        (
            {"settings": {"temperature": 2.0, "divergence": "forward_kl"}},
            ["settings.temperature changed from 1.0 to 2.0"],
        ),
        ({"settings": {"temperature": 1.0}}, ["settings.divergence changed from 'forward_kl' to None"]),
        ({"teacher": RECORD["teacher"] | {"fingerprint": "xyz"}}, ["teacher.fingerprint changed from 'abc' to 'xyz'"]),
        ({"teacher": None}, ["teacher changed from {"]),
        ({"projection_matrices": None}, ["projection_matrices changed from 'def' to None"]),
        ({"stages": []}, ["stages changed from"]),
        ({"max_steps": 9, "method": "one_shot"}, ["max_steps changed", "method changed"]),
        ({"samples_per_step": 8}, ["samples_per_step changed from 16 to 8"]),
        ({"data": RECORD["data"] | {"seed": 0}}, ["data.seed changed from 42 to 0"]),
        ({"data": RECORD["data"] | {"num_examples": 65}}, ["data.num_examples changed from 64 to 65"]),
    ],
)
def test_what_changed_is_said(change, messages, tmp_path):
    write_record(tmp_path, RECORD)
    with pytest.raises(ValueError, match=r"^folder was written by a run with other settings") as error:
        check_resumable(read_record(tmp_path), RECORD | change, "folder")
    assert all(message in str(error.value) for message in messages)


def test_a_setting_that_an_earlier_version_did_not_have_was_its_default():
    saved, current = json.loads(json.dumps(RECORD)), json.loads(json.dumps(RECORD))
    current["settings"]["carry_optimizer"] = True
    check_resumable(saved, current, "folder")
    current["settings"]["carry_optimizer"] = False
    with pytest.raises(ValueError, match=r"settings\.carry_optimizer changed from True to False"):
        check_resumable(saved, current, "folder")


def test_a_record_from_before_there_was_a_choice_resumes_with_what_was_fixed_then():
    saved = json.loads(json.dumps(RECORD))
    check_resumable(saved, RECORD | {"settings": RECORD["settings"] | {"hidden_loss": "mse"}}, "folder")
    with pytest.raises(ValueError, match=r"settings\.hidden_loss changed from 'mse' to 'cosine'"):
        check_resumable(saved, RECORD | {"settings": RECORD["settings"] | {"hidden_loss": "cosine"}}, "folder")


def test_a_record_from_before_a_setting_was_compared_may_have_it_among_its_arguments():
    saved = json.loads(json.dumps(RECORD))
    encoder, decoder = (RECORD | {"settings": RECORD["settings"] | {"layer_stack": s}} for s in ("encoder", "decoder"))
    check_resumable(saved, encoder, "folder")
    check_resumable(saved | {"arguments": {"layer_stack": "decoder"}}, decoder, "folder")
    for arguments, current, change in (
        (None, decoder, "'encoder' to 'decoder'"),
        ({"layer_stack": "decoder"}, encoder, "'decoder' to 'encoder'"),
    ):
        with pytest.raises(ValueError, match=rf"settings\.layer_stack changed from {change}"):
            check_resumable(saved | {"arguments": arguments}, current, "folder")


CHANGES = {
    "class_weights": [1.0, *[2.0] * 49],
    "teacher_entropy_threshold": 0.5,
    "attn_implementation": "eager",
    "teacher_model_init_kwargs": {"attn_implementation": "eager"},
}


@pytest.mark.parametrize("name, value", CHANGES.items())
def test_what_changes_the_loss_may_not_change_when_a_run_is_resumed(config, student, teacher, examples, name, value):
    teacher.save_pretrained(config().output_dir + "/teacher")
    fields = {"stages": [{"kl_weight": 1.0, "label_weight": 1.0}], "max_steps": 2, "save_strategy": "steps"}

    def make(**changed):
        args = config(**fields, save_steps=1, **changed)
        folder = args.output_dir + "/teacher"
        return CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=folder)

    make().train()
    changed = make(**{name: value})
    setting = "teacher_attention" if name == "teacher_model_init_kwargs" else name
    with pytest.raises(ValueError, match=rf"settings\.{setting} changed from None to "):
        changed.train(resume_from_checkpoint=f"{changed.args.output_dir}/checkpoint-1")
    make().train(resume_from_checkpoint=f"{changed.args.output_dir}/checkpoint-1")


def test_a_run_that_matched_one_stack_may_not_go_on_with_the_other(config):
    def make(stack):
        args = config(max_steps=1, method="hidden", layer_stack=stack, save_strategy="steps", save_steps=1)
        models = {"model": pairs("t5", 1), "teacher_model": pairs("t5", 1)}
        return CurriculumDistillationTrainer(args=args, train_dataset=labels_alone("t5"), **models)

    make("encoder").train()
    with pytest.raises(ValueError, match=r"settings\.layer_stack changed from 'encoder' to 'decoder'"):
        make("decoder").train(resume_from_checkpoint=True)


def test_other_data_resume_where_their_order_need_not_go_on():
    saved = json.loads(json.dumps(RECORD))
    changed = RECORD | {"samples_per_step": 8, "data": RECORD["data"] | {"seed": 0}}
    check_resumable(saved, changed, "folder", same_data=False)
    with pytest.raises(ValueError, match=r"other settings: max_steps changed from 8 to 9\. Resume"):
        check_resumable(saved, changed | {"max_steps": 9}, "folder", same_data=False)


def test_a_stream_goes_on_after_as_many_steps_however_they_are_cut():
    record = CHECKPOINT | {"epoch": 1, "batches": 6, "arguments": {"gradient_accumulation_steps": 2}}
    assert [resumed_at(record, accumulation, "folder") for accumulation in (1, 2, 4)] == [(1, 3), (1, 6), (1, 12)]
    assert resumed_at(record | {"batches": 7}, 2, "folder") == (1, 7)
    assert resumed_at(record | {"arguments": None}, 4, "folder") == (1, 6)  # of a version that wrote none
    for damaged in ({"batches": 7}, *({"arguments": {"gradient_accumulation_steps": n}} for n in (0, "2", [DEEP]))):
        with pytest.raises(ValueError, match=r"folder was written after . micro-batches of a stream.* no whole number"):
            resumed_at(record | damaged, 1, "folder")


def test_micro_batches_may_change_if_none_is_dropped():
    two, one = ({"arguments": {"gradient_accumulation_steps": steps}} for steps in (2, 1))
    whole = json.loads(json.dumps(RECORD)) | {"data": RECORD["data"] | {"dataloader_drop_last": True}}
    check_resumable(whole | two, whole | one, "folder")
    cut = whole | {"data": whole["data"] | {"num_examples": 65}}
    check_resumable(cut, cut | one, "folder")  # of a version that wrote no arguments
    with pytest.raises(ValueError, match="gradient_accumulation_steps changed from 2 to 1"):
        check_resumable(cut | two, cut | one, "folder")


def test_what_a_damaged_file_holds_is_quoted_in_one_short_line():
    settings = RECORD["settings"] | {"temperature": DEEP, "divergence": "\ud800\n\x1b[31m", "\n\x1b": "x" * 10**6}
    with pytest.raises(ValueError, match=r"settings\.temperature changed from \[\[") as error:
        check_resumable(RECORD | {"settings": settings}, RECORD, "folder")
    assert str(error.value).isprintable() and len(str(error.value)) < 1500


def test_a_teacher_that_moved_is_the_same_teacher():
    saved = {"teacher": {"name": "here", "revision": None, "fingerprint": "a"}}
    moved = {"teacher": {"name": "there", "revision": "main", "fingerprint": "a"}}
    check_resumable(saved, moved, "folder")
    moved["teacher"]["fingerprint"] = "b"
    with pytest.raises(ValueError, match=r"teacher\.fingerprint changed from 'a' to 'b'"):
        check_resumable(saved, moved, "folder")


def test_a_run_that_measured_its_order_has_it_in_its_layer_stages():
    stages = [Stage(hidden=((2, 4),), until=2), Stage(hidden=((1, 2), (3, 6)), until=4), Stage(kl_weight=1.0)]
    named = [{"name": stage.name, **vars(stage)} for stage in stages]
    record = RECORD | {"stages": named, "arguments": {"layer_order": "complexity"}}
    read = json.loads(json.dumps(record))
    assert recorded_groups(read, "run") == [((2, 4),), ((1, 2), (3, 6))]
    for other in ({"arguments": {"layer_order": "last"}}, {"arguments": None}, {"arguments": 3}, {"method": "stages"}):
        with pytest.raises(ValueError, match="run was written by a run whose stages were not chosen by layer_order"):
            recorded_groups(read | other, "run")
    for damaged in ({"hidden": 3}, {"until": "x"}, {"further": 1}, {"kl_weight": None}):
        with pytest.raises(ValueError, match=r"run has a damaged curriculum\.json: .*; resume from another checkpoint"):
            recorded_groups(read | {"stages": [named[0] | damaged]}, "run")
