"""What the library writes is there whole or not at all, and nothing that a link points to is written over."""

import os
import resource
import signal
import stat

import pytest
import torch
from conftest import in_fork
from resuming.test_record import RECORD

from hf_curriculum_distill import CurriculumDistillationTrainer, ProjectionBank
from hf_curriculum_distill.files import check_writable, replacing
from hf_curriculum_distill.resuming.record import read_record, write_record
from hf_curriculum_distill.teachers.records import RecordStore


def test_a_file_is_what_was_written_and_nothing_else_is_left(tmp_path):
    for text in ("first", "second"):
        with replacing(tmp_path / "file") as path, open(path, "w") as file:
            file.write(text)
            if text == "second":
                assert (tmp_path / "file").read_text() == "first"  # until it is whole
        assert (tmp_path / "file").read_text() == text
        assert os.listdir(tmp_path) == ["file"]


def test_it_can_be_read_by_whom_other_files_can(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "file"):
        pass
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "file")]
    assert modes[0] == modes[1]


def test_where_writing_fails_the_file_before_stays_and_nothing_else_is_left(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as path, open(path, "w") as file:
        file.write("half")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def write_bank(folder):
    ProjectionBank.create([(1, 2)], [3], [4]).freeze().save_pretrained(folder)


WRITERS = {
    "curriculum.json": lambda folder: write_record(folder, RECORD),
    "projection_bank.safetensors": write_bank,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_is_replaced_and_what_it_points_to_stays(name, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    for link in (name, f"{name}.partial"):
        (folder / link).symlink_to(victim)
    WRITERS[name](folder)
    assert victim.read_text() == "mine"
    assert (folder / name).is_file() and not (folder / name).is_symlink()
    readers = {
        "curriculum.json": lambda: read_record(folder)["step"] == RECORD["step"],
        "projection_bank.safetensors": lambda: ProjectionBank.from_pretrained(folder).layer_pairs == ((1, 2),),
    }
    assert readers[name]()


@pytest.mark.parametrize("kind", ["index", "data"])
@pytest.mark.parametrize("target", ["victim", "nothing"])
def test_a_cache_writes_to_no_file_that_it_did_not_make(kind, target, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / f"000000.{kind}").symlink_to(tmp_path / target)
    RecordStore(folder).write({b"k" * 16: b"value"})
    assert victim.read_text() == "mine" and not (tmp_path / "nothing").exists()
    assert bytes(RecordStore(folder).read(b"k" * 16)) == b"value"


def test_a_description_of_a_cache_is_no_exception(config, student, teacher, examples, tmp_path):
    def train(student):
        args = config(method="one_shot", max_steps=1, teacher_cache=str(tmp_path / "cache"))
        CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher).train()

    train(student)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (description,) = (tmp_path / "cache").glob("*/description.json")
    described = description.read_text()
    description.unlink()
    description.symlink_to(victim)
    train(student)
    assert victim.read_text() == "mine" and description.read_text() == described


def test_a_full_disk_leaves_the_file_before(tmp_path):
    write_bank(tmp_path)
    before = (tmp_path / "projection_bank.safetensors").read_bytes()

    def fill_up():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        with pytest.raises(Exception, match=r"File too large|os error 27"):
            ProjectionBank.create([(1, 2)], [30], [40]).freeze().save_pretrained(tmp_path)

    assert in_fork(fill_up) == 0
    assert (tmp_path / "projection_bank.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["projection_bank.safetensors"]
    assert torch.equal(ProjectionBank.from_pretrained(tmp_path).project(1, torch.zeros(4)), torch.zeros(3))


def test_a_folder_is_made_and_left_empty_or_it_is_an_error_that_says_whose(tmp_path):
    folder = tmp_path / "new" / "folder"
    check_writable(str(folder), "teacher_cache", "the teacher's targets")
    assert list(folder.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"teacher_cache .*file cannot be written .*, and the teacher's targets go there"):
        check_writable(str(tmp_path / "file"), "teacher_cache", "the teacher's targets")
