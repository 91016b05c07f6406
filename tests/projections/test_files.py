"""A bank's file is found in a folder, or what is missing is said."""

import pytest

from hf_curriculum_distill.projections.files import FILE_NAME, find_file


def test_the_file_is_found_in_its_folder(tmp_path):
    (tmp_path / FILE_NAME).write_text("a bank")
    assert find_file(tmp_path) == find_file(str(tmp_path)) == str(tmp_path / FILE_NAME)


def test_a_folder_without_a_bank_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"There is no {FILE_NAME} in"):
        find_file(tmp_path)


def test_what_is_neither_a_folder_nor_a_repository_within_reach_is_an_oserror(tmp_path):
    for wrong in (tmp_path / "none", "no/such-repository"):
        with pytest.raises(
            OSError, match=f"is no folder, and there is no such Hub repository .* that holds {FILE_NAME}"
        ):
            find_file(wrong)
