"""The long haul: after its first rounds a run holds at the end of a round what it held a round before."""

import gc
import os
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from statistics import median_low

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from soak import ROUND, Options, count_files, soak

ROOT = Path(__file__).parents[1]
ROUNDS, STEPS_A_ROUND, EVERY = 8, 60, 30
WARM = 3  # rounds


def growth(held, name):
    return [getattr(after, name) - getattr(before, name) for before, after in pairwise(held)]


@pytest.fixture(autouse=True)
def frozen_again():
    yield
    gc.collect()
    gc.freeze()  # as conftest.py has done: `soak` leaves nothing frozen


@pytest.fixture(scope="module")
def stock_growth(tmp_path_factory):
    """How many objects more `transformers.Trainer` itself holds after a round: the loaders of evaluations, mostly."""
    _, (_, *rounds, _) = soak(Options(5 * STEPS_A_ROUND, 5, EVERY), "stock", str(tmp_path_factory.mktemp("stock")))
    return median_low(growth(rounds, "objects"))


@pytest.mark.parametrize("method", ["curriculum", "progressive", "online"])
def test_a_run_holds_what_it_held_a_round_before(method, stock_growth, tmp_path):
    trainer, (before, *rounds, after) = soak(Options(ROUNDS * STEPS_A_ROUND, ROUNDS, EVERY), method, str(tmp_path))
    settled, others = rounds[WARM - 1 :], len(rounds) - WARM
    assert [held.step for held in settled] == list(range(WARM * STEPS_A_ROUND, after.step, STEPS_A_ROUND))
    for name in ("tensors", "files", "hooks", "checkpoints", "state"):
        assert growth(settled, name) == [0] * others, name
    assert [held.in_cycles for held in (*rounds, after)] == [0] * ROUNDS
    assert settled[-1].mib - settled[0].mib < 4  # to keep the weights of both models each step would be 10

    # what grows is named: the log, what each stage costs, and what Trainer keeps of an evaluation
    assert growth(settled, "log") == [STEPS_A_ROUND // 5 + STEPS_A_ROUND // EVERY] * others
    assert growth(settled, "totals") == [6 * len(ROUND)] * others
    # the median: a module imported late, by anyone, adds a few once
    assert median_low(growth(settled, "objects")) <= stock_growth + 4 * len(ROUND)  # four lists a stage

    # what is left behind
    assert (before.hooks, after.hooks) == (0, 0)
    assert settled[0].hooks > 0
    assert after.files <= settled[0].files
    kept = {f"checkpoint-{after.step - EVERY}", f"checkpoint-{after.step}"}
    folders = {folder for folder, _, _ in os.walk(trainer.args.output_dir) if "checkpoint-" in folder}
    places = ["", "_teacher"] if method == "online" else [""]
    assert folders == {os.path.join(trainer.args.output_dir, place, name) for place in places for name in kept}


@pytest.mark.parametrize("method", ["curriculum", "progressive", "online"])
def test_a_finished_trainer_is_freed_whole(method, tmp_path):
    gc.collect()  # the trainers of other tests
    files = count_files()
    trainer, _ = soak(Options(STEPS_A_ROUND, 1, EVERY), method, str(tmp_path))
    parts = trainer, trainer.model, trainer.teacher.model, trainer.optimizer, trainer.projection_bank
    left = [weakref.ref(part) for part in parts]
    del trainer, parts
    gc.collect()
    assert [part() for part in left] == [None] * 5
    assert count_files() == files


def test_the_benchmark_prints_what_is_held_before_and_after():
    command = [sys.executable, "benchmarks/soak.py", "--steps", "10", "--rounds", "1", "--methods", "curriculum"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == ["curriculum", "step", "0", "10"]


def test_rounds_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"steps is 25; .* give a multiple of 20"):
        Options(steps=25, rounds=2)
