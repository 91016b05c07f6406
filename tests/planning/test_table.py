import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

QUICKSTART = ROOT / "recipes/configs/bert_large/quickstart.yaml"


def test_the_command_prints_the_quick_starts_plan(tmp_path):
    path, teacher = tmp_path / "plan.json", tmp_path / "teacher"
    argv = ["plan", "--config", QUICKSTART, "--teacher", teacher, "--flops_per_second", "1e10", "--json", path]
    command = [sys.executable, "-m", "hf_curriculum_distill.cli", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plan, lines = json.loads(path.read_text()), done.stdout.splitlines()
    assert {outcome for outcome, _, _ in plan["checks"]} == {"ok"}
    assert lines[:7] == [f"{outcome:5}  {name}: {detail}" for outcome, name, detail in plan["checks"]]
    assert "student layer 2 <- teacher layer 2" in lines
    cells = {line.split()[0]: line.split()[1:] for line in lines if re.search(r"\d-\d", line)}
    total = plan["total"]
    assert cells["total"] == ["1-600", "2,121,210", "0.9337", "0.83465", "1.7683", "2.9", "min"]
    # what `make distill` wrote into results.json: its collator, too, labels equally many tokens of each block
    assert (total["student_flops"], total["teacher_flops"]) == (933_698_764_800, 834_645_196_800)
    assert total["seconds"] == pytest.approx(total["flops"] / 1e10)
    assert lines[-1] == "not read, for these are options of a recipe: dataset, eval_blocks, teacher_steps, methods"
    assert not teacher.exists()
