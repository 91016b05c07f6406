"""The embeddings recipe: from texts to the table, as its command line does it, and its parts."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from hf_curriculum_distill import ProjectionBank
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.report.launch import plan_runs

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes/configs/embeddings"
TINY = "--max_steps 4 --per_device_train_batch_size 4 --heldout_sentences 12 --calibration_samples 8 --seeds 0 "
TINY += "--use_cpu true --eval_steps 2 --save_steps 2 --logging_steps 2 --learning_rate 1e-2 --student teacher-1"


@pytest.fixture(scope="module")
def embeddings():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("embeddings", ROOT / "recipes/embeddings.py")
    module = sys.modules["embeddings"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder without a head, and documents of several sentences."""
    folder = tmp_path_factory.mktemp("embeddings")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, hidden_dropout_prob=0.0, initializer_range=0.2)).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(ROOT / "recipes/data/bert_uncased").save_pretrained(folder / "teacher")
    (folder / "texts").mkdir()
    for split, number in (("train", 9), ("validation", 8)):
        texts = [f"A title\nThe {split} river number {n} flows on. It is {n} miles long there." for n in range(number)]
        rows = [{"text": text} for text in texts]
        (folder / f"texts/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def launch(embeddings, monkeypatch, folder, *more):
    places = ["--dataset", str(folder / "texts"), "--teacher", str(folder / "teacher")]
    places += ["--output_dir", str(folder / "students")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["embeddings.py", *TINY.split(), *places, *more])
    embeddings.main()


def test_students_are_compared_before_and_after(embeddings, folder, monkeypatch, capsys):
    variants = {"narrower": {"student": "bert-1-8", "projection": "pca"}}
    projected = {"student": "bert-1-8", "projection": "gaussian", "shared_projection": True}
    variants["projected"] = projected | {"student_embeddings": "projected", "learning_rate": 0.0}
    methods = ["one_shot", "curriculum", "narrower", "projected"]
    launch(embeddings, monkeypatch, folder, "--methods", *methods, "--variants", json.dumps(variants))
    results = json.loads((folder / "students/results.json").read_text())
    assert [result["method"] for result in results] == methods
    for result in results:
        assert result["steps"] == 4 and -1 <= result["eval_cosine"] <= 1 and 0 <= result["neighbours"] <= 1
        assert AutoModel.from_pretrained(result["path"]).config.num_hidden_layers == 1
    copied = results[:2]
    assert copied[0]["cosine before"] == copied[1]["cosine before"]
    assert all(result["cosine"] > result["cosine before"] for result in copied)
    assert all(result["cosine"] == pytest.approx(result["eval_cosine"], abs=1e-4) for result in results)
    table = capsys.readouterr().out.strip().splitlines()
    matrix = ProjectionBank.create([(1, 1)], [8], [16], shared=True).tensors()["layer_1_1.weight"]
    theirs, ours = (AutoModel.from_pretrained(path) for path in (folder / "teacher", results[-1]["path"]))
    expected = theirs.get_input_embeddings().weight @ matrix.T
    torch.testing.assert_close(ours.get_input_embeddings().weight, expected)  # its learning rate is 0
    assert len(table) == 6 and all(line.count("|") == 9 for line in table)


def test_a_teacher_is_read_from_where_its_arguments_say(embeddings, folder, monkeypatch, tmp_path):
    shutil.copytree(folder / "teacher", tmp_path / "teacher/best")
    for path in (tmp_path / "teacher/best").glob("*token*"):
        path.rename(tmp_path / "teacher" / path.name)
    where = ["--teacher_model_init_kwargs", '{"subfolder": "best", "dtype": "bfloat16"}']
    places = ["--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "students")]
    launch(embeddings, monkeypatch, folder, *where, *places, "--methods", "curriculum", "--learning_rate", "0")
    student, teacher = (
        AutoModel.from_pretrained(path).get_input_embeddings().weight
        for path in (tmp_path / "students", folder / "teacher")
    )
    assert student.dtype == torch.float32 and torch.equal(student, teacher.bfloat16().float())


def test_a_student_starts_from_weights_or_is_made_by_a_configuration(embeddings, folder):
    teacher = AutoModel.from_pretrained(folder / "teacher")
    name = "encoder.layer.0.attention.self.query.weight"
    torch.manual_seed(1)  # not the teacher's
    for path, same in ((folder / "teacher", True), (folder / "teacher/config.json", False)):
        student = embeddings.find_student(str(path), teacher, 30522)
        assert torch.equal(student.get_parameter(name), teacher.get_parameter(name)) == same
        assert student.dtype == torch.float32


def test_neighbours_are_those_of_the_cosines(embeddings):
    torch.manual_seed(0)
    theirs, ours = torch.randn(12, 4), torch.randn(12, 3)
    assert embeddings.overlap(theirs * torch.rand(12, 1), theirs, 3) == 1.0
    shared = 0
    for index in range(12):
        nearest = []
        for vectors in (ours, theirs):
            others = [other for other in range(12) if other != index]
            others.sort(key=lambda other, v=vectors: -torch.cosine_similarity(v[index], v[other], dim=0).item())
            nearest.append({*others[:3]})
        shared += len(nearest[0] & nearest[1])
    assert embeddings.overlap(ours, theirs, 3) == pytest.approx(shared / 36)


def test_embeddings_do_not_depend_on_the_batch(embeddings, folder):
    model, tokenizer = (kind.from_pretrained(folder / "teacher") for kind in (AutoModel, AutoTokenizer))
    batch = tokenizer(["the sea", "a river flows to the sea"], padding=True, return_tensors="pt")
    together = embeddings.embed(model, [batch], "mean")
    alone = embeddings.embed(model, [tokenizer(["the sea"], return_tensors="pt")], "mean")
    torch.testing.assert_close(together[:1], alone)
    assert not model.training


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--pooling", "pooler"], 1, "pooling is 'pooler'; this recipe pools tokens"),
        (["--student_embeddings", "projected"], 1, "'teacher-1' has embeddings to start from"),
        (["--heldout_sentences", "10"], 2, "heldout_sentences is 10"),
        (["--student", "teacher-3"], 1, "num_layers is 3, but the teacher has 2 blocks"),
        (["--heldout_sentences", "30", "--dataset", "none.tsv"], 1, "none.tsv is no such file"),
    ],
)
def test_wrong_options_are_said_before_training(embeddings, folder, monkeypatch, capsys, more, status, message):
    with pytest.raises(SystemExit) as exit:
        launch(embeddings, monkeypatch, folder, "--output_dir", str(folder / "wrong"), *more)
    assert exit.value.code == 2 if status == 2 else len(str(exit.value.code).splitlines()) == 1
    assert message in str(exit.value.code) + capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_are_read_and_their_methods_exist(embeddings, path):
    arguments, args = parse_arguments([embeddings.RecipeArguments, embeddings.TrainingConfig], ["--config", str(path)])
    assert len(plan_runs(arguments, args)) == len(arguments.methods) * len(arguments.seeds)
