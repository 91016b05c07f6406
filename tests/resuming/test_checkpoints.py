"""A checkpoint is resumed from if and only if it was written to its end and is as it was written."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from conftest import in_fork, tiny_bert

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.files import check_writable
from hf_curriculum_distill.resuming.checkpoints import find_last_checkpoint, list_files, read_whole

SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def run(config, teacher, examples):
    """Train a student; returns its trainer."""

    def run(student=None, resume_from=None, **fields):
        args = config(**{"max_steps": 4} | SAVED | fields)
        student = student or tiny_bert(2, seed=1)
        trainer = CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher)
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    return run


@pytest.fixture
def output_dir(run):
    return Path(run().args.output_dir)


@pytest.mark.parametrize("fields", [{}, {"method": "online", "label_loss_weight": 0.5}], ids=["curriculum", "online"])
def test_a_checkpoint_is_whole_iff_every_file_has_its_bytes(run, fields):
    output_dir = Path(run(**fields).args.output_dir)
    checkpoint = output_dir / "checkpoint-4"
    assert read_whole(checkpoint)["step"] == 4
    files = list_files(checkpoint, output_dir / "_teacher" / "checkpoint-4")
    names = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"}
    if "method" in fields:
        names.add("../_teacher/checkpoint-4/optimizer.safetensors")
    else:
        names.add("projection_bank.safetensors")
    assert names < set(files) == set(read_whole(checkpoint)["files"])

    for name in [*files, "trainer_state.json", "curriculum.json"]:
        path = checkpoint / name
        content = path.read_bytes()
        for damaged in (content[:-1], content[: len(content) // 2], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            if damaged != content[:-1] or name not in ("trainer_state.json", "curriculum.json"):
                kinds = (OSError, ValueError) if damaged is None else ValueError
                with pytest.raises(kinds, match=Path(name).name):
                    read_whole(checkpoint)
                assert find_last_checkpoint(output_dir) == str(output_dir / "checkpoint-2")
            path.write_bytes(content)
        assert find_last_checkpoint(output_dir) == str(checkpoint)


def test_more_files_do_no_harm(output_dir):
    (output_dir / "checkpoint-4" / "notes.txt").write_text("mine")
    with open(output_dir / "checkpoint-4" / "README.md", "a") as card:  # nothing is resumed from it
        card.write("Mine.")
    assert find_last_checkpoint(output_dir) == str(output_dir / "checkpoint-4")


def test_the_state_of_another_step_is_found(output_dir):
    shutil.copy(output_dir / "checkpoint-2" / "trainer_state.json", output_dir / "checkpoint-4")
    with pytest.raises(ValueError, match=r"trainer_state.json is of step 2, the rest of 4"):
        read_whole(output_dir / "checkpoint-4")


def test_a_checkpoint_that_is_not_whole_is_refused_by_name_and_skipped_otherwise(run, output_dir):
    expected = json.loads((output_dir / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    model = output_dir / "checkpoint-4" / "model.safetensors"
    os.truncate(model, 100)
    with pytest.raises(ValueError, match=r"checkpoint-4 is not whole: model.safetensors has 100 bytes of \d+\. Resume"):
        run(resume_from=str(output_dir / "checkpoint-4"))
    assert model.stat().st_size == 100
    assert run(resume_from=True).state.log_history[: len(expected)] == expected
    assert model.stat().st_size > 100


def test_weights_alone_are_no_checkpoint_to_resume_from(run):
    output_dir = run(save_only_model=True).args.output_dir
    with pytest.raises(ValueError, match="the run ended while it was written, or it was saved with save_only_model"):
        run(resume_from=os.path.join(output_dir, "checkpoint-4"))


def test_a_folder_without_checkpoints_is_a_run_that_begins(run, config, caplog):
    begun = run(resume_from=True)
    assert begun.state.global_step == 4
    assert begun.state.log_history[0]["step"] == 1


# ---- disks ----


def test_a_folder_that_cannot_be_written_is_refused_before_training(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o555)

    def refused():
        if os.getuid() == 0:
            os.setuid(65534)  # root can write anywhere
        with pytest.raises(OSError, match=r"output_dir .*run cannot be written .*Permission denied"):
            check_writable(str(folder), "output_dir", "checkpoints")

    for parent in (tmp_path, *tmp_path.parents):
        if os.stat(parent).st_uid == os.getuid() and parent != Path("/"):
            os.chmod(parent, os.stat(parent).st_mode | 0o011)
    assert in_fork(refused) == 0
    assert os.listdir(folder) == []
    folder.rmdir()
    folder.write_text("a file")
    with pytest.raises(OSError):
        run()


@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.pt"])
def test_a_disk_that_is_full_ends_the_run_and_keeps_the_last_whole_checkpoint(run, tmp_path, what):
    """No file may grow beyond a limit from the second checkpoint on: what writing to a full disk looks like."""
    model = tiny_bert(2, seed=1)
    size = sum(p.numel() for p in model.parameters()) * 4  # the optimizer's state is twice that
    limit = size // 2 if what == "model.safetensors" else size * 3 // 2

    def fill_up():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails as on a full disk
        original = CurriculumDistillationTrainer._save_checkpoint

        def save(self, *args):
            if self.state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            original(self, *args)

        CurriculumDistillationTrainer._save_checkpoint = save
        message = r"checkpoint of step 4 could not be written to .*; the last whole one is .*checkpoint-2\. Make room"
        with pytest.raises(OSError, match=message):
            run(model, save_total_limit=1)

    assert in_fork(fill_up) == 0
    output_dir = tmp_path / "run"
    assert find_last_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-2")
    assert run(resume_from=True, save_total_limit=1).state.global_step == 4
    assert find_last_checkpoint(str(output_dir)) == str(output_dir / "checkpoint-4")
