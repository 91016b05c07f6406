"""A model card says what its facts say, and nothing that is not known."""

import dataclasses

import datasets
import pytest

from hf_curriculum_distill.report.card import (
    CardFacts,
    describe_dataset,
    find_task,
    last_evaluation,
    make_metadata,
    make_text,
)

STAGES = [
    {"name": "layer 1", "hidden": [[1, 2]], "hidden_weight": 1.0, "kl_weight": 0.0, "label_weight": 0.0, "until": 4},
    {"name": "kl", "hidden": [], "hidden_weight": 1.0, "kl_weight": 1.0, "label_weight": 0.5, "until": None},
]
RECORD = {
    "method": "curriculum",
    "max_steps": 1000,
    "step": 1000,
    "samples_per_step": 8,
    "stages": STAGES,
    "settings": {"hidden_loss": "mse", "divergence": "forward_kl", "temperature": 2.0},
    "seed": 42,
    "teacher": {"name": "google-bert/bert-large-uncased", "revision": "0a1b", "fingerprint": "feed"},
    "projection_bank": "cafe",
    "student_flops": 1.5e15,
    "teacher_flops": 2.5e16,
    "train_seconds": 5400.0,
    "versions": {"hf_curriculum_distill": "0.3", "transformers": "5.24.0", "torch": "2.13"},
}
EVALUATION = {"eval_loss": 2.0, "eval_accuracy": 0.625, "eval_agreement": 0.75, "eval_kl": 0.125}
HISTORY = [
    {"eval_loss": 9.0, "eval_accuracy": 0.125, "step": 500},
    {"loss": 3.0, "step": 1000},
    EVALUATION | {"eval_runtime": 1.0, "eval_samples_per_second": 8.0, "step": 1000, "epoch": 1.0},
    {"train_runtime": 1.0, "step": 1000},
]
GLUE = {"id": "nyu-mll/glue", "config": "cola", "split": "validation"}
FACTS = CardFacts(
    "me/student", "BertForMaskedLM", RECORD, HISTORY, 1000, "2 x NVIDIA L4", ["mine"], train_data=GLUE, eval_data=GLUE
)


def changed(record=(), **fields):
    return dataclasses.replace(FACTS, record=RECORD | dict(record), **fields)


# ---- metadata ----


@pytest.mark.parametrize(
    ("facts", "missing"),
    [
        (changed({"teacher": {"name": "folder", "revision": None, "fingerprint": "1"}}), {"base_model"}),
        (changed({"teacher": None, "method": "labels"}), {"base_model"}),
        (changed(model_class="MyModel"), {"pipeline_tag", "model-index"}),
        (changed(train_data=None), {"datasets"}),
        (changed(log_history=[]), {"model-index"}),
    ],
    ids=["a local teacher", "no teacher", "another task", "unknown data", "no evaluation"],
)
def test_what_is_not_known_is_left_out(facts, missing):
    expected = make_metadata(FACTS).keys() - missing
    assert make_metadata(facts).keys() == expected - ({"base_model_relation"} if "base_model" in missing else set())


def test_an_adapters_base_is_the_model_that_it_is_put_into_and_not_the_teacher():
    metadata = make_metadata(changed(is_adapter=True))
    assert metadata["library_name"] == "peft" and "base_model" not in metadata


def test_a_teacher_that_is_only_compared_with_is_no_base_model():
    facts = changed({"method": "labels", "stages": [STAGES[1] | {"kl_weight": 0.0, "label_weight": 1.0}]})
    metadata = make_metadata(facts)
    assert not {"base_model", "base_model_relation"} & metadata.keys()
    assert metadata["tags"] == ["labels", "generated_from_trainer", "mine"]
    assert "This BertForMaskedLM was compared with [google-bert/bert-large-uncased]" in make_text(facts)
    assert "was distilled from [google-bert/bert-large-uncased]" in make_text(FACTS)


def test_checkpoints_of_a_teacher_on_the_hub_are_all_base_models():
    teacher = {"name": "org/step-1, org/step-2", "revision": "0a", "fingerprint": "1"}
    assert make_metadata(changed({"teacher": teacher}))["base_model"] == ["org/step-1", "org/step-2"]


@pytest.mark.parametrize(
    ("model_class", "task"),
    [
        ("BertForMaskedLM", "fill-mask"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertForSequenceClassification", "text-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("Wav2Vec2ForSequenceClassification", "audio-classification"),
        ("BertModel", "feature-extraction"),
        ("Nameless", None),
    ],
)
def test_tasks(model_class, task):
    assert find_task(model_class) == task


def test_a_data_set_is_known_by_the_repository_that_it_was_read_from():
    data = datasets.Dataset.from_dict({"x": [1]}, split="train")
    assert describe_dataset(data) is None and describe_dataset([{"x": 1}]) is None and describe_dataset(None) is None
    source = "hf://datasets/nyu-mll/glue@bcdcba79d07b/cola/train-00000-of-00001.parquet"
    data.info.download_checksums, data.info.config_name = {source: {"num_bytes": 1}}, "cola"
    assert describe_dataset(data.map(lambda row: row)) == {"id": "nyu-mll/glue", "config": "cola", "split": "train"}
    data.info.download_checksums[source.replace("nyu-mll/glue", "other/data")] = {}
    assert describe_dataset(data) is None


def test_the_evaluation_is_that_of_the_weights():
    assert last_evaluation(HISTORY, 1000) == {n.removeprefix("eval_"): v for n, v in EVALUATION.items()} | {
        "step": 1000
    }
    assert last_evaluation(HISTORY, 500)["accuracy"] == 0.125  # the best ones were loaded
    assert last_evaluation(HISTORY, 100) == last_evaluation([], 1000) == {}
    after = [*HISTORY, {"eval_accuracy": 0.5, "step": 1000}]
    assert last_evaluation(after, 500) == {"accuracy": 0.5, "step": 500}
    two = [{"eval_a_loss": 1.0, "step": 4}, {"eval_b_loss": 2.0, "step": 4}, {"eval_b_loss": float("nan"), "step": 4}]
    assert last_evaluation(two[:2], 4) == {"a_loss": 1.0, "b_loss": 2.0, "step": 4}
    assert last_evaluation(two[2:], 4) == {}


# ---- text ----


def test_the_text_has_every_fact():
    text = make_text(FACTS)
    for expected in (
        "[google-bert/bert-large-uncased](https://huggingface.co/google-bert/bert-large-uncased)",
        "| 1: layer 1 | 1 to 4 | 1 ← 2 | 1 | 0 | 0 |",
        "| 2: kl | 5 to 1,000 | - | - | 1 | 0.5 |",
        "temperature 2",
        "| accuracy on the labels that count | 0.625 |",
        "| agreement: share of predictions that are the teacher's, too | 0.75 |",
        "| KL divergence from the teacher (nats) | 0.125 |",
        "| training examples | 8,000 |",
        "| floating-point operations, student | 1.5e+15 |",
        "| floating-point operations, teacher | 2.5e+16 |",
        "| hours | 1.5 on 2 x NVIDIA L4 |",
        "`cafe`",
        "`feed`",
        "`0a1b`",
        "transformers 5.24.0",
        'BertForMaskedLM.from_pretrained("me/student")',
        "2503.17494",
    ):
        assert expected in text
    assert "comparison.png" not in text and "comparison.png" in make_text(FACTS, has_plot=True)
    assert "trains the head" not in text and "This is step" not in text


@pytest.mark.parametrize("method", ["curriculum", "one_shot", "progressive", "online", "hidden", "labels", "stages"])
def test_a_method_is_told_in_three_sentences(method):
    first = make_text(changed({"method": method, "teacher": {"name": "T", "revision": None, "fingerprint": "1"}}))
    assert first.split("\n\n")[0].count(". ") == 2


def test_a_checkpoint_of_a_layer_stage_says_that_its_head_is_untrained():
    text = make_text(changed(log_history=[{"eval_accuracy": 0.1, "step": 4}], step=4))
    assert "This is step 4 of 1,000." in text and "No stage up to this step trains the head." in text


def test_what_embeddings_learn_is_not_called_logits():
    settings = {"settings": RECORD["settings"] | {"hidden_loss": "cosine", "pooling": "mean"}}
    history = [{"eval_cosine": 0.875, "step": 1000}]
    text = make_text(changed(settings, model_class="BertModel", log_history=history))
    assert "logits" not in text and "forward_kl" not in text
    assert "and then the teacher's embeddings" in text and "`cosine` of embeddings (pooling: `mean`)" in text
    assert "| cosine similarity of embeddings to the teacher's | 0.875 |" in text
    assert "| hidden | logits | labels |" in make_text(FACTS)
