# make distill   the whole pipeline on real text, in minutes on two CPU cores
# make test      lint and tests, in a random order; `pytest --randomly-seed=N FILE` repeats it
# make test-all  these, then the tests of packages that make every import slower, which are installed for them
# make docs      the documentation as a website, in build/site; a broken link is an error
# make dist      wheel and source archive, in dist; a toy job is run by what the wheel installs in a fresh environment
# All make their own environment in .venv first; nothing else is needed than Python 3.10 or newer and a package index.

PYTHON ?= python3
BIN := .venv/bin
QUANTISED := tests/test_quantised.py
QUICKSTART := recipes/configs/bert_large/quickstart.yaml

TOY := --dimension 8 --sparsity 2 --teacher_width 16 --student_width 8 --teacher_max_samples 64 --teacher_accuracy 0 \
	--teacher_finish_samples 0 --teacher_save_samples 64 --calibration_samples 16 --heldout_examples 16 --max_steps 4 \
	--methods curriculum one_shot --seeds 0 --use_cpu true

.PHONY: test test-all distill docs dist lint format clean

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore $(QUANTISED)

test-all: test
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[quantised]"
	$(BIN)/python -m pytest $(QUANTISED)

distill: .venv/installed
	$(BIN)/accelerate launch --cpu --num_processes 1 recipes/bert_large.py --config $(QUICKSTART) --overwrite_output_dir
	$(BIN)/python recipes/fill_mask.py recipes/data/bert_4_256 $(addprefix runs/quickstart/,curriculum/seed-42 one_shot/seed-42)

docs: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict --site-dir build/site

dist: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[release]"
	rm -rf dist build/fresh
	$(BIN)/python -m build
	! $(PYTHON) -m zipfile --list dist/*.whl | grep -E "^(tests|benchmarks|docs)/"
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python -m pip install --quiet --constraint constraints.txt torch
	build/fresh/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd "$$(mktemp -d)" && env -u PYTHONPATH "$(CURDIR)/build/fresh/bin/hf-curriculum-distill" train sparse_parity $(TOY)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone, at its tested version, so that no other package brings another build of it
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf .venv runs build dist *.egg-info
