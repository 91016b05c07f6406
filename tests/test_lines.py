"""Errors of commands are one printable line."""

import pytest

from hf_curriculum_distill.lines import CommandParser, errors_in_one_line

MESSAGE, LINE = "bad \x1b[2J\n   name", "bad \\x1b[2J name"


@pytest.mark.parametrize("kind", [ValueError, OSError, FileNotFoundError])
def test_an_error_in_what_is_given_ends_in_one_line(kind):
    with pytest.raises(SystemExit) as exit, errors_in_one_line():
        raise kind(MESSAGE)
    assert exit.value.code == LINE and isinstance(exit.value.__cause__, kind)


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault"), errors_in_one_line():
        raise RuntimeError("a fault of the library")


def test_a_wrong_command_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        CommandParser("tool").error(MESSAGE)
    assert exit.value.code == 2 and capsys.readouterr().err.endswith(f"tool: error: {LINE}\n")
