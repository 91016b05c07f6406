"""Labelled texts make a task, or it is said what they lack."""

import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_curriculum_distill.tasks import classification
from hf_curriculum_distill.tasks.classification import Task, class_numbers, draw_sentences, epochs, read_task


def written(folder, train, test=None):
    for name, rows in {"train": train, "test": test or train, "validation": train}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


TWO = [{"text": "yes", "label": "a"}, {"text": "no", "label": "b"}]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([TWO[0]] * 2, TWO, "All training texts of .* have the label 'a'; a classifier needs two or more classes"),
        (TWO, [*TWO, {"text": "?", "label": "c"}], "The test set of .* has the label 'c', which no training text has"),
        ([*TWO, {"text": None, "label": "a"}], TWO, "has rows without a text or a label"),
        (
            [{"text": "a", "sentence": "b", "label": 0}] * 2,
            None,
            "holds the texts is not clear; name one of text .string.",
        ),
        ([{"text": "a", "stars": 0.5}, {"text": "b", "stars": 1.5}], None, "holds the labels is not clear"),
    ],
)
def test_data_that_are_no_task_are_refused(tmp_path, train, test, message):
    with pytest.raises(ValueError, match=message):
        read_task(written(tmp_path, train, test))


@pytest.mark.parametrize("column", ["label", "stars", "class"])
def test_columns_are_found_where_there_is_one_choice(tmp_path, column):
    value = {"label": "x", "stars": 3, "class": "y"}[column]
    rows = [{"sentence": "yes", column: value}, {"sentence": "no", column: value * 2}]
    task = read_task(written(tmp_path, rows))
    assert task.train["text"] == ["yes", "no"] and task.names == {value: str(value), value * 2: str(value * 2)}


def test_labels_are_the_teachers_classes_by_name_or_else_by_number():
    named, numbered = (Task("some", None, None, names) for names in ({0: "bad", 1: "good"}, {0: "0", 1: "1"}))
    assert class_numbers(named, {0: "good", 1: "bad"}, "other") == {0: 1, 1: 0}
    assert class_numbers(numbered, {0: "good", 1: "bad"}, "other") == {0: 0, 1: 1}
    strings = Task("some", None, None, {"up": "up", "down": "down"})
    with pytest.raises(ValueError, match="other knows the classes good, bad, but some has up, down"):
        class_numbers(strings, {0: "good", 1: "bad"}, "other")


def test_a_hub_set_names_its_classes(monkeypatch):
    features = Features({"idx": Value("int64"), "sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = {"idx": [0, 1], "sentence": ["a", "b"], "label": [0, 1]}
    hidden = rows | {"label": [-1, -1]}  # as GLUE hides those of its test sets
    splits = {name: Dataset.from_dict(r, features) for name, r in (("train", rows), ("validation", rows))}
    splits["test"] = Dataset.from_dict(hidden, features)
    monkeypatch.setattr(classification, "read_dataset", lambda *_: DatasetDict(splits))
    assert read_task("glue", heldout_name="validation").names == {0: "no", 1: "yes"}
    with pytest.raises(ValueError, match=r"the label -1, which no training text has; .* --evaluate_on"):
        read_task("glue")


def test_every_epoch_has_each_row_once_and_seeds_differ():
    rows = epochs(5, 12, seed=0).tolist()
    assert sorted(rows[:5]) == sorted(rows[5:10]) == [*range(5)] and rows[:5] != rows[5:10]
    assert len(rows) == 12 and rows != epochs(5, 12, seed=1).tolist()
    assert rows[:7] == epochs(5, 7, seed=0).tolist() and len(epochs(5, 0, seed=0)) == 0


def test_documents_are_cut_into_sentences_in_an_order_of_the_seed():
    documents = Dataset.from_dict(
        {"text": ["It rains. Does it? Yes!\nA heading\n\nThe end", None, "Mr. e is 2.5 m tall."]}
    )
    sentences = draw_sentences(documents, "text", 100, seed=0)
    assert sorted(sentences) == sorted(
        ["It rains.", "Does it?", "Yes!", "A heading", "The end", "Mr.", "e is 2.5 m tall."]
    )
    assert draw_sentences(documents, "text", 3, seed=0) == sentences[:3]
    assert len({tuple(draw_sentences(documents, "text", 100, seed)) for seed in range(8)}) > 1
