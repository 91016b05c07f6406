import re
import shutil
from pathlib import Path

import pytest
from conftest import tiny_bert
from transformers import BertModel, T5Config

from hf_curriculum_distill.cli import main
from hf_curriculum_distill.planning import PlanArguments, PlannedConfig, format_plan, make_plan

from .plans import LENGTH, folder_of, planned, saved, tiny_gpt

ROOT = Path(__file__).parents[2]

TOKENIZER = ROOT / "recipes/data/bert_uncased"


def test_models_larger_than_any_machine_are_planned():
    options = PlanArguments(student="bert-2-131072", teacher="bert-2-131072")
    plan = make_plan(options, PlannedConfig("none", max_steps=1, per_device_train_batch_size=1, method="one_shot"))
    assert plan.total["memory"]["student"] > 2**40 and not Path("none").exists()


def test_one_shot_costs_what_one_shot_costs(tmp_path):
    student, teacher = tiny_bert(2), tiny_bert(4)
    plan = planned(tmp_path, student, teacher, method="one_shot")
    assert plan.one_shot | {"name": "total"} == plan.total
    assert "operations: 1.000 of one_shot's" in format_plan(plan)
    curriculum = planned(tmp_path, student, teacher)
    assert curriculum.one_shot["flops"] == plan.total["flops"] > curriculum.total["flops"]


def test_a_cache_is_not_counted_and_that_is_said(tmp_path):
    plain, cached = (
        planned(tmp_path, tiny_bert(2), tiny_bert(4), teacher_cache=folder) for folder in (None, str(tmp_path / "none"))
    )
    assert cached.total == plain.total and not (tmp_path / "none").exists()
    assert [line.split(":")[0] for line in cached.assumptions if line not in plain.assumptions] == ["teacher_cache"]


def test_of_an_order_that_is_measured_a_stage_for_each_layer_is_counted_and_that_is_said(tmp_path):
    plan = planned(tmp_path, tiny_bert(2), tiny_bert(4), layer_order="complexity", hidden_weight_in_logit_stage=0.0)
    assert [stage["name"] for stage in plan.stages] == ["layer 1", "layer 2", "kl"]
    assert "layer_order='complexity': counted as a stage for each layer, lowest first" in format_plan(plan)


def test_a_progressive_run_is_planned_from_the_teachers_checkpoints(tmp_path):
    for step in (2, 4):
        tiny_bert(4, seed=step).save_pretrained(tmp_path / f"teacher/checkpoint-{step}")
    options = PlanArguments(saved(tmp_path / "s", tiny_bert(2)), str(tmp_path / "teacher"), block_size=LENGTH)
    plan = make_plan(options, PlannedConfig("out", max_steps=8, method="progressive"))
    assert not plan.errors and [row["name"] for row in plan.stages] == ["kl"]
    shutil.rmtree(tmp_path / "teacher/checkpoint-4")
    BertModel(tiny_bert(4).config).save_pretrained(tmp_path / "teacher/checkpoint-4")
    plan = make_plan(options, PlannedConfig("out", max_steps=8, method="progressive"))
    assert re.search(r"checkpoint-4' has no weights for cls", plan.errors[0])


def other_tokenizer(tmp_path):
    folder = Path(folder_of(tmp_path, "teacher", tiny_bert(4, vocab_size=30522)))
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    first, *others = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*others[:-1], first, others[-1]]))
    student = folder_of(tmp_path, "student", tiny_bert(2, vocab_size=30522))
    return ["--student", student, "--teacher", str(folder), "--tokenizer", str(TOKENIZER)]


def written(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return ["--config", str(tmp_path / "run.yaml")]


def t5(tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    return ["--student", str(tmp_path / "t5")]


def _with(tmp_path, model, text):
    (tmp_path / model / "config.json").write_text(text)
    return []


def gpt(tmp_path):
    return ["--student", folder_of(tmp_path, "gpt", tiny_gpt(2))]


WRONG = {
    "student": (lambda _: ["--student", "no/where"], r"models: 'no/where' has no configuration within reach; give a"),
    "teacher": (lambda _: ["--teacher", "no/where"], r"models: 'no/where' has no configuration within reach; give a"),
    "no teacher": (lambda _: ["--teacher", ""], r"layer map: There is no teacher and there are no stages"),
    "vocabulary": (
        lambda t: ["--student", folder_of(t, "s", tiny_bert(2, vocab_size=51))],
        r"vocabulary: .* 51 .* 50;",
    ),
    "tokenizer": (other_tokenizer, r"vocabulary: The tokenizer of .* map tokens to different ids"),
    "small vocabulary": (lambda _: ["--tokenizer", str(TOKENIZER)], r"30,522 tokens, but the student's vocabulary 50"),
    "no tokenizer": (lambda t: ["--tokenizer", str(t)], r"tokenizer: "),
    "layers": (lambda _: ["--layer_map", "[[1, 9]]"], r"layer map: Layer pair \(1, 9\) names teacher layer 9, but"),
    "projection": (lambda _: ["--student", "bert-2-32", "--projection", "identity"], r"layer map: .*identity"),
    "no steps": (lambda _: ["--max_steps", "-1"], r"steps: max_steps is -1; a plan has no data set"),
    "few steps": (
        lambda _: ["--max_steps", "2", "--layer_order", "sequential"],
        r"steps: 2 layer stages in 50 % of 2 steps.* need max_steps >= 4",
    ),
    "length": (lambda _: ["--block_size", "33"], r"batch: block_size is 33, but the student reads at most 32 tokens\."),
    "no labels": (lambda _: ["--mlm_probability", "0.001"], r"batch: mlm_probability is 0.001, with which no label"),
    "encoder-decoder": (t5, r"models: A t5 is no single stack of blocks"),
    "pooling of a head": (lambda _: ["--pooling", "mean"], r"models: pooling is 'mean', but task is 'MaskedLM'; "),
    "no pooling": (lambda _: ["--task", "Embeddings"], r"layer map: BertModel has no head, but stage 'kl .*method='hi"),
    "embeddings and layers in two bases": (
        lambda _: ["--task", "Embeddings", "--pooling", "cls"],
        r"layer map: standardize_targets is True, but stage .* matches hidden states beside embeddings",
    ),
    "no choices": (lambda _: ["--num_choices", "0"], r"num_choices is 0; it must be at least 1\."),
    "no such task": (gpt, r"models: There is no AutoModelForMaskedLM of type gpt2 .*; set task\."),
    "task": (lambda _: ["--task", "Translation"], r"task is 'Translation'; use one of MaskedLM, CausalLM"),
    "rate": (lambda _: ["--flops_per_second", "0"], r"flops_per_second is 0.0; it must be above 0\."),
    "two rates": (lambda _: ["--flops_per_second", "1", "--measure", "1"], r"Both flops_per_second and measure"),
    "share": (lambda _: ["--mlm_probability", "1.5"], r"mlm_probability is 1.5; it must be above 0 and at most 1\."),
    "processes": (lambda _: ["--num_processes", "0"], r"num_processes is 0; it must be at least 1\."),
    "misspelt, nearly a recipe's": (
        lambda t: written(t, "layr_ordr: last\ndataset: x"),
        r"sets 'layr_ordr', which is no option; did you mean layer_order\?",
    ),
    "transposed": (lambda t: written(t, "metohd: one_shot"), r"sets 'metohd', .* did you mean method\?"),
    "a letter too few": (lambda t: written(t, "temperatur: 2"), r"sets 'temperatur', .* did you mean temperature\?"),
    "nobody's": (lambda t: written(t, "zzzzz: 2"), r"sets 'zzzzz', which is no option; see --help\."),
    "a list": (lambda t: written(t, "deepspeed: Infinity"), r"The options make no configuration \(\w+Error: "),
    "control characters": (
        lambda _: ["--student", "\x1b[2J\n"],
        r"models: '\\x1b\[2J\\n' has no configuration within reach",
    ),
    "a million blocks": (lambda _: ["--student", "bert-1000000-64"], r"1000000 blocks, more than any that is trained"),
    "damaged model": (
        lambda t: _with(t, "student", '{"model_type": "bert", "num_hidden_layers": "2", "architectures": [[]]}'),
        r"models: ",
    ),
    "model of lists": (lambda t: _with(t, "student", '{"model_type": ["bert"]}'), r"models: TypeError: unhashable"),
    "plan through a link": (
        lambda t: [(t / "link").symlink_to(t / "student/config.json"), "--json", str(t / "link")][1:],
        r"link is a symbolic link, and what it leads to is not overwritten",
    ),
    "misspelt": (lambda t: written(t, "max_step: 5"), r"sets 'max_step', which is no option; did you mean max_steps\?"),
    "type": (lambda t: written(t, "max_steps: [5]"), r"sets max_steps to \[5\], but it must be of type int"),
    "option": (lambda _: ["--stepss", "5"], r"sets 'stepss', which is no option"),
    "value": (lambda _: ["--layer_order", "random"], r"layer_order is 'random'; use one of"),
    "no folder": (lambda t: ["--json", str(t / "none/plan.json")], r"No such file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_runs_end_with_status_2_and_say_what_and_where(tmp_path, capsys, name):
    argv, message = WRONG[name]
    models = {
        "--student": folder_of(tmp_path, "student", tiny_bert(2)),
        "--teacher": saved(tmp_path / "teacher", tiny_bert(4)),
    }
    given = ["--max_steps", "8", "--block_size", "12", "--output_dir", str(tmp_path / "out")]
    given += [word for option in models.items() for word in option]
    with pytest.raises(SystemExit) as error:
        main(["plan", *given, *argv(tmp_path)])
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err.splitlines()[-1]), printed.err
    assert "stage  " not in printed.out or name in ("no folder", "plan through a link")
    if re.match(r"[a-z ]+: ", message):
        assert f"error  {message.split(':')[0]}: " in printed.out
