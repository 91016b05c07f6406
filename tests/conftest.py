"""What the tests share: an offline, single-threaded environment, tiny models, tiny data."""

import atexit
import gc
import os
import traceback
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # their lock, held by a fork that is killed, would stay locked
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and prints what it finds among results
os.environ["TRITON_INTERPRET"] = "1"  # runs Triton's kernels, which test_liger.py needs, on a CPU; read on import

import datasets
import pytest
import torch
import transformers
from hypothesis import settings
from transformers import BertConfig, BertForMaskedLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_curriculum_distill import CURRICULUM_EXTRACTION, CurriculumDistillationConfig

if find_spec("deepspeed"):
    import deepspeed  # noqa: F401  accelerate imports it where it is installed: once here, not in every fork

torch.set_num_threads(1)
atexit.register(gc.unfreeze)  # else Triton reports all that it finds in use at the end
datasets.disable_progress_bars()
transformers.logging.enable_propagation()  # as in CI: caplog listens at the root
settings.register_profile("tests", deadline=None, max_examples=40)
settings.load_profile("tests")

collect_ignore = [] if find_spec("deepspeed") else ["zero.py"]


def pytest_collection_finish():
    gc.freeze()  # every train() collects garbage, and what is imported and collected never is


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """A test starts alike whatever ran before it. pytest-randomly seeds Python and NumPy."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_warning()  # Trainer sets it as its log_level says
    unset_hf_deepspeed_config()  # one that an error left is there until the traceback is collected


def pytest_configure(config):
    config.addinivalue_line("markers", "needs_browser: may be skipped in CI, too, where no browser is installed.")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return never_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    return report if item.get_closest_marker("needs_browser") else never_skipped(report)


def never_skipped(report):
    """In CI a test that cannot run, as for want of a package, has failed; but no package brings a browser."""
    if report.skipped and os.environ.get("CI"):
        report.outcome = "failed"
    return report


VOCAB_SIZE = 50
STUDENT_DEPTH, TEACHER_DEPTH = 2, 4


def tiny_bert(depth, width=16, dropout=0.0, seed=0, model_class=BertForMaskedLM, **config):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return model_class(BertConfig(num_attention_heads=2, max_position_embeddings=32, **sizes | dropouts | config))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if tolerance:
            torch.testing.assert_close(actual[name], tensor, **tolerance)
        else:
            assert torch.equal(actual[name], tensor), name


class StrictBert(BertForMaskedLM):
    """A model that names its inputs and takes no others."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


def masked_lm_examples(count, seed=0, length=12):
    """Random tokens of which some are labelled; every third example ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        input_ids = torch.randint(5, VOCAB_SIZE, (length,), generator=generator)
        attention_mask = torch.ones(length, dtype=torch.long)
        if index % 3 == 2:
            attention_mask[length - 1 - index % 5 :] = 0
        labelled = (torch.rand(length, generator=generator) < 0.3) & attention_mask.bool()
        labelled[index % 4] = True  # the numbers of labels differ between examples and are never 0
        labels = torch.where(labelled, input_ids, -100)
        input_ids = torch.where(labelled, 4, input_ids)
        examples.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    return examples


@pytest.fixture
def student():
    return tiny_bert(STUDENT_DEPTH, seed=1)


@pytest.fixture
def teacher():
    # with the usual initialisation logits are nearly the same everywhere; larger weights make them differ
    return tiny_bert(TEACHER_DEPTH, width=24, seed=2, initializer_range=0.3)


@pytest.fixture
def examples():
    return masked_lm_examples(64)


@pytest.fixture
def config(tmp_path):
    """A [`CurriculumDistillationConfig`] of a short silent CPU run: `config(max_steps=8, ...)`.

    The curriculum is the paper's, which has several layer stages, and a logit stage that differs from them.
    """

    def make(folder="run", config_class=CurriculumDistillationConfig, **fields):
        defaults = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no"}
        silence = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
        if issubclass(config_class, CurriculumDistillationConfig):
            defaults |= CURRICULUM_EXTRACTION
        return config_class(str(tmp_path / folder), **silence | defaults | fields)

    return make


def start_fork(function, *args):
    """Call a function in a fork of this process, which can be killed; returns the fork's number."""
    child = os.fork()
    if child == 0:
        try:
            function(*args)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait_for_fork(child):
    """Its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_fork(function, *args):
    return wait_for_fork(start_fork(function, *args))
