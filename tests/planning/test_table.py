import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_bert

from hf_curriculum_distill.planning import format_plan

from .plans import planned

ROOT = Path(__file__).parents[2]

QUICKSTART = ROOT / "recipes/configs/bert_large/quickstart.yaml"


def test_the_command_prints_the_quick_starts_plan(tmp_path):
    path = tmp_path / "plan.json"
    argv = ["plan", "--config", QUICKSTART, "--flops_per_second", "1e10", "--json", path]
    command = [sys.executable, "-m", "hf_curriculum_distill.cli", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plan, lines = json.loads(path.read_text()), done.stdout.splitlines()
    assert {outcome for outcome, _, _ in plan["checks"]} == {"ok"}
    assert lines[:8] == [f"{outcome:5}  {name}: {detail}" for outcome, name, detail in plan["checks"]]
    assert "student layer 4 <- teacher layer 4" in lines
    cells = {line.split()[0]: line.split()[1:] for line in lines if re.search(r"\d-\d", line)}
    total = plan["total"]
    assert cells["total"] == ["1-300", "1,932,672", "3.6737", "4.3848", "8.0585", "13.4", "min"]
    # what `make distill` wrote into results.json: its collator, too, labels equally many tokens of each block
    assert (total["student_flops"], total["teacher_flops"]) == (3_673_659_801_600, 4_384_830_259_200)
    assert total["seconds"] == pytest.approx(total["flops"] / 1e10)
    assert lines[-1] == "not read, for these are options of a recipe: dataset, student_embeddings, eval_blocks, methods"


def test_the_forecast_says_how_long_how_much_memory_and_what_price(tmp_path):
    options = {"gpu": "l4", "num_processes": 2, "price_per_hour": 3.0, "flops_per_second": 1e6}
    plan = planned(tmp_path, tiny_bert(1), tiny_bert(1), options, use_cpu=False)
    hours = plan.total["flops"] / 2e6 / 3600
    assert plan.price == pytest.approx(hours * 2 * 3)
    line = format_plan(plan).split("\n\n")[-1].splitlines()[0]
    assert re.fullmatch(
        rf"forecast: [\d.]+ s on 2 x L4 24 GB, 0.0 GiB at most of 24 of each; price {plan.price:.2f}", line
    )
    plan.total["memory"]["total"] = 25 * 2**30
    assert "25.0 GiB at most, which is more than the 24 of each" in format_plan(plan)
    assert "\nforecast: " not in format_plan(planned(tmp_path, tiny_bert(1), tiny_bert(1)))
