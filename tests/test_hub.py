"""What is pushed to the Hub, with its real client over HTTP: by each strategy, and where something fails."""

import json
import os
import subprocess
import sys

import hub
import pytest
from huggingface_hub import ModelCard

STUDENT = {
    "README.md",
    "config.json",
    "curriculum.json",
    "model.safetensors",
    "projection_bank.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHECKPOINT = STUDENT | {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}

# Only what everybody has who loads a model of transformers: of this library, not even the files can be found.
LOADS = """
from transformers import pipeline
filled = pipeline("fill-mask", model="me/every_save", device="cpu")("a [MASK] c")
try:
    import hf_curriculum_distill
except ModuleNotFoundError:
    print(len(filled), sum(each["score"] for each in filled) <= 1)
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The server after everything, what happened, and the environment of a client."""
    folder = tmp_path_factory.mktemp("hub")
    with hub.serving() as server:
        server.failures["me/flaky"] = [None, 403, 403, 403, 403]  # the client tries again where the connection ends
        server.unreachable.add("me/unreachable")
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_token"}
        environment |= {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, hub.__file__, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        yield server, json.loads(done.stdout.splitlines()[-1]), environment


@pytest.mark.parametrize("strategy", hub.STRATEGIES)
def test_each_strategy_pushes_a_whole_student_and_nothing_that_names_the_teachers_folder(pushed, strategy):
    server, happened, _ = pushed
    files = server.repositories[f"me/{strategy}"]
    folders = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}.get(strategy, [])
    expected = STUDENT | {f"{folder}/{name}" for folder in folders for name in CHECKPOINT}
    others = {path for path in files if "training_args.bin" not in path} - expected
    assert files.keys() >= expected and others and all(path.startswith("runs/") for path in others)
    assert [path for path, content in files.items() if b"secret-place" in content] == []
    assert happened[strategy]  # weights and projection bank can be loaded from there
    students = [commit for commit in server.commits[f"me/{strategy}"] if "model.safetensors" in commit]
    assert len(students) == (1 if strategy == "end" else 3) and all(STUDENT.issubset(commit) for commit in students)


def test_the_pushed_card_is_of_the_last_evaluation_and_was_validated(pushed):
    server, _, _ = pushed
    card = ModelCard(server.repositories["me/end"]["README.md"].decode())
    assert str(card) in server.validated  # by the client, before it pushes
    assert card.data.license == "mit" and card.data.pipeline_tag == "fill-mask" and "eval_accuracy" not in card.text
    assert {"loss", "accuracy", "agreement", "kl"} == {result.metric_type for result in card.data.eval_results}
    assert 'BertForMaskedLM.from_pretrained("me/end")' in card.text


def test_a_pushed_checkpoint_goes_on_to_the_same_student(pushed):
    assert pushed[1]["resumed"]


def test_a_pushed_student_needs_nothing_of_this_library(pushed, tmp_path):
    _, _, environment = pushed
    environment = environment | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    loads = f"import sys; sys.modules['hf_curriculum_distill'] = None\n{LOADS}"  # where it is installed, too
    done = subprocess.run([sys.executable, "-I", "-c", loads], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["5", "True"], done.stderr


def test_training_goes_on_where_pushes_fail_and_is_told_of_it(pushed):
    happened = pushed[1]
    assert happened["flaky"] == 4
    assert happened["messages"]  # one or two: the first push may have failed before the second began
    assert all("not pushed to me/flaky" in m and "The quota is used up." in m for m in happened["messages"])
    assert all("trainer.push_to_hub() after the training" in message for message in happened["messages"])


def test_what_was_not_pushed_in_training_is_pushed_after_it(pushed):
    assert STUDENT.issubset(pushed[0].repositories["me/flaky"])


@pytest.mark.parametrize("case", ["no token", "wrong token", "someone else's", "no network"])
def test_who_may_not_push_is_told_before_the_training(pushed, case):
    message = pushed[1][case]
    assert message.startswith("OSError: Nothing can be pushed to ") and "\n" not in message
    why = {"someone else's": "403 Forbidden", "no network": "Server disconnected"}.get(case, "401 Unauthorized")
    assert "`hf auth login`" in message and why in message


def test_a_name_that_no_repository_can_have_is_refused_before_the_training(pushed):
    assert pushed[1]["wrong name"].startswith("HFValidationError: ") and "me/my/student" in pushed[1]["wrong name"]
