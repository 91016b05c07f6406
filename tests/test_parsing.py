"""Options come from dataclasses, a YAML file and the command line."""

import re
from dataclasses import dataclass, field

import pytest

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.parsing import parse_arguments


@dataclass
class Options:
    """Test options."""

    name: str = field(metadata={"help": "A required option."})
    rate: float = 1.0
    sizes: list[int] = field(default_factory=list)
    quiet: bool = field(default=False, metadata={"help": "Whether to say 10 % or less."})


@dataclass
class OtherDefaults(Options):
    """The same options, two of which have other defaults."""

    name: str = "a"
    rate: float = 2.0


def test_an_option_with_another_default_keeps_its_help(capsys):
    with pytest.raises(SystemExit):
        parse_arguments([OtherDefaults], ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--name NAME A required option. (default: a)" in out and "Whether to say 10 % or less. (default" in out
    assert parse_arguments([OtherDefaults], []) == (OtherDefaults(name="a", rate=2.0),)


def parse(tmp_path, yaml, *argv):
    file = tmp_path / "options.yaml"
    file.write_text(yaml)
    (options,) = parse_arguments([Options], ["--config", str(file), *argv])
    return options


def test_yaml_gives_defaults_and_the_command_line_wins(tmp_path):
    options = parse(tmp_path, "name: a\nrate: 1e-3\nsizes: [1, 2]\nquiet: true", "--rate", "2", "--quiet", "false")
    assert options == Options(name="a", rate=2.0, sizes=[1, 2], quiet=False)
    assert parse(tmp_path, "name: a\nrate: 1e-3").rate == 1e-3  # YAML 1.1 reads 1e-3 as a string
    assert parse(tmp_path, "rate: 3", "--name", "b") == Options(name="b", rate=3.0)


def test_stages_come_from_yaml_lists_and_json_alike(tmp_path):
    yaml = tmp_path / "stages.yaml"
    yaml.write_text("stages:\n- hidden: [[1, 2]]\n  until: 0.5\n- kl_weight: 1.0\n")
    common = ["--output_dir", str(tmp_path), "--use_cpu"]
    (from_yaml,) = parse_arguments([CurriculumDistillationConfig], ["--config", str(yaml), *common])
    json = '[{"hidden": [[1, 2]], "until": 0.5}, {"kl_weight": 1.0}]'
    (from_json,) = parse_arguments([CurriculumDistillationConfig], ["--stages", json, *common])
    assert from_yaml.stages == from_json.stages
    assert from_yaml.resolve_stages(1, 2)[0].hidden == ((1, 2),)


@pytest.mark.parametrize(
    ("yaml", "argv", "message"),
    [
        ("nam: a", [], "sets 'nam', which is no option; did you mean name?"),
        ("name: a\nzzzzzz: 1", [], "sets 'zzzzzz', which is no option; see --help."),
        ("- a", ["--name", "a"], "holds a list"),
        ("name: [", [], "is not valid YAML"),
        ("name: a\nrate: fast", [], "invalid float value: 'fast'"),
        ("name: a", ["--ratee", "1"], "the command line sets 'ratee', which is no option; did you mean rate?"),
        ("rate: 1", [], "the following arguments are required: --name"),
    ],
)
def test_wrong_options_end_with_status_2_and_one_line(tmp_path, capsys, yaml, argv, message):
    with pytest.raises(SystemExit) as error:
        parse(tmp_path, yaml, *argv)
    assert error.value.code == 2
    assert re.search(message.replace("?", r"\?"), capsys.readouterr().err)


def test_a_missing_file_ends_with_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([Options], ["--config", str(tmp_path / "none.yaml"), "--name", "a"])
    assert "No such file" in capsys.readouterr().err
