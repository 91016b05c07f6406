"""`curriculum.json`: what is written is read; what changed is said."""

import json

import pytest

from hf_curriculum_distill.record import FILE_NAME, FORMAT_VERSION, check_resumable, read_record, write_record
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
    "versions": {"torch": "2.13"},
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


@pytest.mark.parametrize("text", ["", "{", '{"step": 1}', "[]", "3", "null"])
def test_a_damaged_record_is_refused(text, tmp_path):
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match="is not a readable run record"):
        read_record(tmp_path)


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
    ],
)
def test_what_changed_is_said(change, messages, tmp_path):
    write_record(tmp_path, RECORD)
    with pytest.raises(ValueError, match=r"^folder was written by a run with other settings") as error:
        check_resumable(read_record(tmp_path), RECORD | change, "folder")
    assert all(message in str(error.value) for message in messages)


def test_a_teacher_that_moved_is_the_same_teacher():
    saved = {"teacher": {"name": "here", "revision": None, "fingerprint": "a"}}
    moved = {"teacher": {"name": "there", "revision": "main", "fingerprint": "a"}}
    check_resumable(saved, moved, "folder")
    moved["teacher"]["fingerprint"] = "b"
    with pytest.raises(ValueError, match=r"teacher\.fingerprint changed from 'a' to 'b'"):
        check_resumable(saved, moved, "folder")
