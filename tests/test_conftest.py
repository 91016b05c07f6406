import conftest
import pytest

LACKS_PACKAGE = "import pytest\npytest.importorskip('no_such_package')\ndef test_anything(): pass\n"
SKIPS = "import pytest\ndef test_anything(): pytest.skip('for no_such_package')\n"


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
