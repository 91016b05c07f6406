"""What `import hf_curriculum_distill` loads, in a fresh interpreter."""

import subprocess
import sys


def test_the_package_loads_no_metrics_plots_or_data_sets_that_transformers_does_not_load():
    script = """
import sys
from transformers import Trainer
before = {*sys.modules}
from hf_curriculum_distill import CurriculumDistillationTrainer
print(*({"evaluate", "matplotlib", "datasets"} & {*sys.modules} - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout.split()
