"""The Hub's client reads back what a model card says; what a user has written in it is kept."""

from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, metadata_load

from hf_curriculum_distill.report.card import make_metadata
from hf_curriculum_distill.report.card_file import write_card
from report.test_card import EVALUATION, FACTS, HISTORY, changed


def card(folder):
    return ModelCard.load(Path(folder, "README.md"))


def test_the_hubs_client_reads_back_what_the_facts_say(tmp_path):
    write_card(tmp_path, FACTS)
    data = card(tmp_path).data
    assert data.base_model == "google-bert/bert-large-uncased" and data.base_model_relation == "finetune"
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("transformers", "fill-mask", ["nyu-mll/glue"])
    assert data.tags == ["distillation", "curriculum", "generated_from_trainer", "mine"]
    assert data.model_name == "student"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name.removeprefix("eval_"): value for name, value in EVALUATION.items()
    }
    for result in data.eval_results:
        assert (result.task_type, result.dataset_type) == ("fill-mask", "nyu-mll/glue")
        assert (result.dataset_config, result.dataset_split) == ("cola", "validation")
    assert str(ModelCard(str(card(tmp_path)))) == Path(tmp_path, "README.md").read_text()
    assert metadata_load(tmp_path / "README.md") == make_metadata(FACTS)


def test_a_users_text_and_metadata_are_kept_and_ours_renewed(tmp_path):
    path = tmp_path / "README.md"
    write_card(tmp_path, FACTS, {"license": "mit", "tags": ["given"]})
    mine = ModelCard(path.read_text())
    mine.text = mine.text.replace("# student", "# My model\n\nFor bees.") + "\nThe end.\n"
    mine.data.language, mine.data.pipeline_tag = "en", "text-generation"
    mine.data.tags.append("bees")
    mine.data.eval_results.append(EvalResult("fill-mask", "bees", "Bees", "f1", 0.25))
    path.write_text(str(mine))
    local = {"name": "teacher", "revision": None, "fingerprint": "1"}
    later = [*HISTORY, {"eval_loss": 1.0, "eval_accuracy": 0.875, "step": 1000}]
    write_card(tmp_path, changed({"teacher": local, "method": "one_shot"}, log_history=later))
    kept = card(tmp_path)
    assert "# My model\n\nFor bees." in kept.text and kept.text.endswith("\nThe end.\n")
    assert "0.875" in kept.text and "0.625" not in kept.text and kept.text.count("distillation: begin") == 1
    data = kept.data.to_dict()
    assert data["tags"] == ["distillation", "one-shot", "generated_from_trainer", "mine", "given", "bees"]
    assert (data["license"], data["language"], data["pipeline_tag"]) == ("mit", "en", "text-generation")
    assert "base_model" not in data and "base_model_relation" not in data  # the teacher is another one now
    values = {(r.dataset_type, r.metric_type): r.metric_value for r in kept.data.eval_results}
    glue = "nyu-mll/glue"
    assert values == {(glue, "loss"): 1.0, (glue, "accuracy"): 0.875, ("bees", "f1"): 0.25}


@pytest.mark.parametrize(
    "own", ["# Mine\n\nAll my own.\n", "---\ntags:\n- bees\nlicense: mit\n---\n\n# Mine\n\nAll my own.\n"]
)
def test_a_users_own_card_only_gets_the_metadata_that_it_lacks(tmp_path, own):
    (tmp_path / "README.md").write_text(own)
    write_card(tmp_path, FACTS)
    first = (tmp_path / "README.md").read_text()
    assert first.endswith("# Mine\n\nAll my own.\n") and "BertForMaskedLM" not in first
    data = card(tmp_path).data
    assert data.base_model == "google-bert/bert-large-uncased"
    if "bees" in own:
        assert (data.tags, data.license) == (["bees"], "mit")
    write_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_text() == first


@pytest.mark.parametrize(
    "content", [b"---\na: [\n---\n", b"\xff\xfe", b"---\nmodel-index: 3\n---\n", b"---\n- a\n---\n"]
)
def test_a_card_that_cannot_be_read_stays_as_it_is(tmp_path, caplog, content):
    (tmp_path / "README.md").write_bytes(content)
    write_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_bytes() == content
    assert "stays as it is" in caplog.text


def test_a_folder_of_that_name_stays_too(tmp_path, caplog):
    (tmp_path / "README.md").mkdir()
    write_card(tmp_path, FACTS)
    assert "stays as it is" in caplog.text


def test_a_card_is_written_again_to_the_same_bytes(tmp_path):
    write_card(tmp_path, FACTS)
    before, time = (tmp_path / "README.md").read_bytes(), (tmp_path / "README.md").stat().st_mtime_ns
    write_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_bytes() == before
    assert (tmp_path / "README.md").stat().st_mtime_ns == time
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_names_cannot_end_the_comment(tmp_path):
    write_card(tmp_path, changed(tags=["--> end"]))
    assert "--> end" not in card(tmp_path).text and card(tmp_path).data.tags[-1] == "--> end"
    write_card(tmp_path, FACTS)
    assert card(tmp_path).data.tags[-1] == "mine"
