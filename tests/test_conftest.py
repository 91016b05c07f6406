import conftest
import pytest

LACKS_PACKAGE = "import pytest\npytest.importorskip('no_such_package')\ndef test_anything(): pass\n"
SKIPS = "import pytest\ndef test_anything(): pytest.skip('for no_such_package')\n"
BROWSER = "import pytest\n@pytest.mark.needs_browser\ndef test_anything(): pytest.skip('for no_such_package')\n"


@pytest.mark.parametrize("text", [LACKS_PACKAGE, SKIPS], ids=["module", "test"])
def test_what_is_skipped_has_failed_in_ci(tmp_path, monkeypatch, capsys, text):
    file = tmp_path / f"{tmp_path.name}.py"  # a name of its own: Python imports one once
    file.write_text(text)
    options = ["-rs", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file)]
    passed = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}
    for ci in ("", "true"):
        monkeypatch.setenv("CI", ci)
        assert (pytest.main(options, plugins=[conftest]) not in passed) == bool(ci)
        printed = capsys.readouterr().out
        assert "no_such_package" in printed and ("1 skipped" in printed) == (not ci)


def test_a_browser_may_be_missing_in_ci_too(tmp_path, monkeypatch, capsys):
    file = tmp_path / f"{tmp_path.name}.py"
    file.write_text(BROWSER)
    monkeypatch.setenv("CI", "true")
    options = ["-rs", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file)]
    assert pytest.main(options, plugins=[conftest]) == pytest.ExitCode.OK
    assert "1 skipped" in capsys.readouterr().out
