"""The launch files in recipes/accelerate are what accelerate reads, say how to use them, and start a script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_deepspeed_available

FOLDER = Path(__file__).parents[1] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
EVERY_FILE = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
# what the launcher does with a file's section: the prefix of its command-line options
SECTIONS = {"fsdp_config": "fsdp_", "deepspeed_config": "", "dynamo_config": "dynamo_", "fp8_config": "fp8_"}


def launch_arguments(file, *options):
    arguments = launch_command_parser().parse_args(["--config_file", str(file), *options, "script.py"])
    return _validate_launch_command(arguments)[0]


def test_there_is_one_file_for_each_kind_of_launch():
    kinds = {"one_gpu", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "two_nodes"}
    assert {file.stem for file in FILES} == kinds


@EVERY_FILE
def test_the_header_gives_the_command_and_says_what_was_tested(file):
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file recipes/accelerate/{file.name} " in line for line in header)
    assert any(line.startswith("# Tested: ") for line in header)


@EVERY_FILE
def test_accelerate_reads_it_and_knows_every_key(file):
    """Its loader refuses unknown keys at the top; those below are options of its command line."""
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "bf16"
    options = vars(launch_command_parser().parse_args(["script.py"]))
    for section, values in yaml.safe_load(file.read_text()).items():
        for key in values if isinstance(values, dict) else ():
            prefix = SECTIONS[section]
            assert (key if key.startswith(prefix) else prefix + key) in options, (section, key)


@EVERY_FILE
def test_the_launcher_takes_it_as_meant(file):
    if file.stem.startswith("deepspeed") and not is_deepspeed_available():
        pytest.skip("deepspeed is not installed")
    arguments = launch_arguments(file)
    expected = {
        "one_gpu": {"num_processes": 1, "multi_gpu": False},
        "ddp": {"multi_gpu": True, "num_machines": 1},
        "fsdp2": {"use_fsdp": True, "fsdp_version": "2", "fsdp_state_dict_type": "FULL_STATE_DICT"},
        "deepspeed_zero2": {"use_deepspeed": True, "zero_stage": 2},
        "deepspeed_zero3": {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True},
        "two_nodes": {"multi_gpu": True, "num_machines": 2, "num_processes": 16},
    }[file.stem]
    for name, value in expected.items():
        assert str(getattr(arguments, name)) == str(value), name
    assert arguments.mixed_precision == "bf16"
    assert launch_arguments(file, "--mixed_precision", "no").mixed_precision == "no"


def test_a_machine_of_two_is_named_on_the_command_line():
    arguments = launch_arguments(FOLDER / "two_nodes.yaml", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert (arguments.machine_rank, arguments.main_process_ip, arguments.main_process_port) == (1, "10.0.0.1", 29500)


def test_the_file_for_one_gpu_starts_a_training_on_a_cpu(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from two_processes import STAGES, example, train\nfrom pathlib import Path\n"
        f"train(Path({str(tmp_path / 'run')!r}), 16, 1, [example(i) for i in range(16)], None, None, stages=STAGES)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "one_gpu.yaml")]
    command += ["--cpu", "--mixed_precision", "no", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model.safetensors").is_file()
