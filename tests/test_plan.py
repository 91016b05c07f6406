import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import STUDENT_DEPTH, VOCAB_SIZE, tiny_bert
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    TrainerCallback,
)

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.cli import main, parse_arguments
from hf_curriculum_distill.plan import (
    RECIPE_OPTIONS,
    SIZES,
    PlanArguments,
    PlannedConfig,
    find_config,
    format_plan,
    make_plan,
)
from hf_curriculum_distill.planning.memory import PeakMemory

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes/configs/bert_large/quickstart.yaml"
TOKENIZER = ROOT / "recipes/data/bert_uncased"
LENGTH, LABELS = 12, 3
SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 32}


def tiny_gpt(depth):
    torch.manual_seed(depth)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=depth, n_head=2, n_positions=32))


def examples_for(model):
    """As many labels in each example, so that one batch costs what any other does."""
    torch.manual_seed(0)
    examples = []
    for _ in range(16):
        ids = torch.randint(5, model.config.vocab_size, (LENGTH,))
        if isinstance(model, BertForSequenceClassification):
            labels = ids[0] % 2
        elif isinstance(model, (GPT2LMHeadModel, LlamaForCausalLM)):
            labels = ids
        else:
            labels = torch.where(torch.randperm(LENGTH) < LABELS, ids, -100)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def saved(folder, model):
    model.config.save_pretrained(folder)
    return str(folder / "config.json")


def planned(tmp_path, student, teacher, options=None, **fields):
    tasks = {"BertForMaskedLM": "MaskedLM", "GPT2LMHeadModel": "CausalLM", "LlamaForCausalLM": "CausalLM"}
    task = tasks.get(type(student).__name__, "SequenceClassification")
    share = {"mlm_probability": LABELS / LENGTH} if task == "MaskedLM" else {}
    models = {"student": saved(tmp_path / "student", student), "teacher": saved(tmp_path / "teacher", teacher)}
    shape = {"task": task, "block_size": LENGTH} | share
    defaults = {"max_steps": 8, "per_device_train_batch_size": 4, "use_cpu": True}
    return make_plan(
        PlanArguments(**models | shape | (options or {})), PlannedConfig(str(tmp_path / "out"), **defaults | fields)
    )


class Watch(TrainerCallback):
    """What a real run's last step of each stage had: parameters with gradients, bytes of optimizer states."""

    def __init__(self):
        self.trained, self.states = {}, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.trained[self.trainer.stage.name] = sum(p.numel() for p in model.parameters() if p.grad is not None)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        states = (v for values in optimizer.state.values() for v in values.values() if torch.is_tensor(v) and v.dim())
        self.states[self.trainer.stage.name] = sum(v.numel() * v.element_size() for v in states)


BLOCKWISE = {"train_prefix": "block", "freeze_matched_layers": True}
RUNS = {
    "curriculum": {},
    "blocks": BLOCKWISE,
    "cumulative": {"layer_order": "cumulative", "hidden_weight_in_logit_stage": 0.5, "label_loss_weight": 1.0},
    "whole models": {"truncate": False},
    "accumulated": {"gradient_accumulation_steps": 2},
    "embeddings": {"stages": [{"hidden": [[0, 0]], "until": 2}, {"hidden": [[2, 1]], "until": 5}, {"kl_weight": 1.0}]},
    "one_shot": {"method": "one_shot"},
    "online": {"method": "online"},
    "labels": {"method": "labels"},
}


@pytest.mark.parametrize(
    ("run", "make"),
    [(run, tiny_bert) for run in RUNS]
    + [("curriculum", tiny_gpt), ("curriculum", lambda d: tiny_bert(d, model_class=BertForSequenceClassification))],
)
def test_a_plan_says_what_the_run_then_books_and_trains(tmp_path, config, run, make):
    student, teacher = make(STUDENT_DEPTH), make(4)
    plan = planned(tmp_path, student, teacher, **RUNS[run])
    watch = Watch()
    trainer = CurriculumDistillationTrainer(
        model=student,
        args=config(**RUNS[run]),
        train_dataset=examples_for(student),
        teacher_model=teacher,
        callbacks=[watch],
    )
    watch.trainer = trainer
    trainer.train()
    assert not plan.errors and [row["name"] for row in plan.stages] == [stage.name for stage in trainer.stages]
    spent = {log["step"]: log for log in trainer.state.log_history if "student_flops" in log}
    for name in ("student_flops", "teacher_flops"):
        sums = list(accumulate(row[name] for row in plan.stages))
        assert [round(spent[row["last_step"]][name]) for row in plan.stages] == sums
        assert plan.total[name] == sums[-1]
    assert [row["trained_parameters"] for row in plan.stages] == list(watch.trained.values())
    assert [row["memory"]["gradients"] for row in plan.stages] == [4 * n for n in watch.trained.values()]
    assert [row["memory"]["optimizer"] for row in plan.stages] == list(watch.states.values())


def bert(depth):
    return tiny_bert(depth, width=64, dropout=0.1, vocab_size=997)


def gpt2(depth):
    torch.manual_seed(depth)
    return GPT2LMHeadModel(GPT2Config(vocab_size=997, n_embd=64, n_layer=depth, n_head=2, n_positions=32))


def llama(depth):
    torch.manual_seed(depth)
    sizes = {"vocab_size": 997, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": depth}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0))


MEASURED = {
    "bert": (bert, {}),
    "bert, bf16": (bert, {"bf16": True}),
    "bert, accumulated": (bert, {"gradient_accumulation_steps": 2}),
    "bert, bf16, accumulated": (bert, {"gradient_accumulation_steps": 2, "bf16": True}),
    "bert, bf16, frozen": (bert, {"bf16": True, "freeze_matched_layers": True}),
    "bert, small batch": (bert, {"per_device_train_batch_size": 2}),
    "bert, online": (bert, {"method": "online"}),
    "bert, sgd": (bert, {"optim": "sgd"}),
    "bert, adafactor": (bert, {"optim": "adafactor"}),
    "gpt2": (gpt2, {}),
    "gpt2, accumulated": (gpt2, {"gradient_accumulation_steps": 2}),
    "gpt2, checkpointing": (gpt2, {"gradient_checkpointing": True}),
    "llama": (llama, {}),
    "llama, accumulated": (llama, {"gradient_accumulation_steps": 2}),
    "llama, bf16, frozen": (llama, {"bf16": True, "freeze_matched_layers": True}),
}


@pytest.mark.parametrize("case", MEASURED)
def test_planned_memory_is_what_torch_holds_at_the_worst_moment_of_a_real_step(tmp_path, config, monkeypatch, case):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    make, changes = MEASURED[case]
    student, teacher = make(4), make(4)
    two_stages = {"stages": [{"hidden": [[3, 3]], "until": 1}, {"kl_weight": 1.0}]}
    fields = {"per_device_train_batch_size": 16, "max_steps": 2} | ({} if "method" in changes else two_stages) | changes
    plan = planned(tmp_path, student, teacher, **fields)
    measured, watch = {}, Watch()

    def num_bytes(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    class Profiled(CurriculumDistillationTrainer):
        def training_step(self, *args):
            tensors = [t for m in (student, teacher) for t in (*m.parameters(), *m.buffers())]
            tensors += [parameter.grad for parameter in tensors if parameter.grad is not None]
            bank = self.projection_bank
            before = num_bytes([*tensors, *(bank.tensors().values() if bank else ())])
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
                loss = super().training_step(*args)
            events = record.profiler.kineto_results.events()
            peak = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
            measured.setdefault(self.state.global_step, []).append((before, peak))
            return loss

    watch.trainer = Profiled(
        model=student,
        args=config(standardize_targets=False, **fields),
        train_dataset=examples_for(student) * 2,
        teacher_model=teacher,
        callbacks=[watch],
    )
    watch.trainer.train()
    for row in plan.stages:
        steps, memory = measured[row["last_step"] - 1], row["memory"]
        held = memory["activations"] + memory["logits"]
        teacher_states = 8 * teacher.num_parameters() if case == "bert, online" else 0
        at_once = memory["total"] - memory["optimizer"] - teacher_states
        assert at_once == pytest.approx(max(map(sum, steps)), rel=0.005)  # kernels hold a little for themselves
        if len(steps) > 1:  # gradients were there before
            assert held == pytest.approx(steps[-1][1], rel=0.002)
        if case != "bert, small batch":  # whose worst moment is elsewhere
            assert (memory["logits"] > 0) == (row["name"] == "kl")
    assert [row["memory"]["optimizer"] for row in plan.stages] == list(watch.states.values())


def test_an_optimizer_that_cannot_be_tried_counts_as_adam_and_that_is_said(tmp_path):
    student, teacher = tiny_bert(2), tiny_bert(4)
    unknown, adam = (planned(tmp_path, student, teacher, optim=name) for name in ("adamw_anyprecision", "adamw_torch"))
    assert unknown.stages[0]["memory"]["optimizer"] == adam.stages[0]["memory"]["optimizer"]
    message = (
        "optimizer: adamw_anyprecision is counted as Adam, for it cannot be tried here: ValueError: Please install"
    )
    assert unknown.assumptions[-1].startswith(message) and unknown.assumptions[:-1] == adam.assumptions


class ProfiledStep(TrainerCallback):
    """The most that an optimizer's last step held."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.record.__enter__()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.record.__exit__(None, None, None)
        events = self.record.profiler.kineto_results.events()
        self.peak = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def test_an_optimizers_own_step_counts_where_it_needs_more_than_the_passes(tmp_path, config, monkeypatch):
    """Few tokens' activations are nothing beside Adafactor's squares and updates, each as large as the embeddings."""
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    student, teacher = (tiny_bert(1, vocab_size=5000, tie_word_embeddings=False) for _ in range(2))
    fields = {"optim": "adafactor", "per_device_train_batch_size": 1, "method": "one_shot", "max_steps": 2}
    memory = planned(tmp_path, student, teacher, **fields).total["memory"]
    step, data = ProfiledStep(), examples_for(student)
    CurriculumDistillationTrainer(
        student, config(**fields), train_dataset=data, teacher_model=teacher, callbacks=[step]
    ).train()
    held = sum(memory[name] for name in ("teacher", "student", "gradients", "optimizer"))
    assert memory["total"] - held == pytest.approx(step.peak, rel=0.05) and step.peak > 2 * 4 * 5000 * 16


def test_gradients_leave_the_account_when_they_are_whole():
    layers = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(8)))
    peaks = []
    for parameters in ((), layers.parameters()):
        layers.zero_grad()
        with PeakMemory(parameters) as memory:
            layers(torch.ones(1, 100)).sum().backward()
        peaks.append(memory.peak)
        assert memory.peak_with_gradients == peaks[0]
    assert peaks[0] > 8 * 4 * 100**2 > 3 * peaks[1]


def test_weights_states_and_projections_are_counted_to_the_byte(tmp_path):
    student, teacher = tiny_bert(2), tiny_bert(4, width=24)
    numbers = [sum(tensor.numel() for tensor in model.parameters()) for model in (student, teacher)]
    positions = 2 * 32 * 8  # buffers: positions and token types
    projections = 2 * (16 * 24 + 2 * 16) * 4
    row = planned(tmp_path, student, teacher, gradient_accumulation_steps=2).total["memory"]
    assert row["teacher"] == 4 * numbers[1] + positions + projections
    assert row["student"] == 4 * numbers[0] + positions
    assert row["optimizer"] == 2 * row["gradients"] == 8 * numbers[0]
    assert row["total"] == sum(size for name, size in row.items() if name != "total")
    alone = planned(tmp_path, student, teacher).total["memory"]  # whose gradients come as activations go
    assert alone | {"total": row["total"]} == row and alone["total"] < row["total"]
    half = planned(tmp_path, student, teacher, teacher_dtype="bfloat16", optim="sgd").total["memory"]
    assert half["teacher"] == 2 * numbers[1] + positions + projections and half["optimizer"] == 0
    online = planned(tmp_path, student, teacher, method="online").total["memory"]
    assert online["teacher"] == 16 * numbers[1] + positions  # with gradients and two states each
    assert online["activations"] > planned(tmp_path, student, teacher, method="one_shot").total["memory"]["activations"]


def test_accelerators_keep_no_attention_probabilities_and_checkpointing_keeps_little(tmp_path):
    def activations(length, **fields):
        student = tiny_bert(2, dropout=0.1)
        student.config.max_position_embeddings = 512
        fields = {"method": "labels", **fields}
        plan = planned(tmp_path, student, student, {"block_size": length, "mlm_probability": 0.05}, **fields)
        return plan.total["memory"]["activations"]

    long, short = activations(512, use_cpu=False), activations(256, use_cpu=False)
    assert long == pytest.approx(2 * short, rel=0.05)  # linear in the length
    assert activations(512) > 4 * long
    assert activations(512, use_cpu=False, gradient_checkpointing=True) < 0.9 * long


def test_models_larger_than_any_machine_are_planned():
    options = PlanArguments(student="bert-2-131072", teacher="bert-2-131072")
    plan = make_plan(options, PlannedConfig("none", max_steps=1, per_device_train_batch_size=1, method="one_shot"))
    assert plan.total["memory"]["student"] > 2**40 and not Path("none").exists()


def test_time_follows_from_rate_processes_and_utilisation(tmp_path):
    student, teacher = tiny_bert(1), tiny_bert(1)
    one = planned(tmp_path, student, teacher, {"flops_per_second": 1e6})
    assert one.total["seconds"] == pytest.approx(one.total["flops"] / 1e6)
    two = planned(tmp_path, student, teacher, {"flops_per_second": 1e6, "num_processes": 2})
    assert two.total["flops"] == 2 * one.total["flops"] and two.total["seconds"] == one.total["seconds"]
    assert two.total["memory"] == one.total["memory"]
    assert planned(tmp_path, student, teacher).total["seconds"] is None
    measured = planned(tmp_path, student, teacher, {"measure": 0.01, "utilisation": 0.25})
    ceiling = float(re.search(r"0.25 .* of (\S+) FLOP/s", measured.assumptions[0])[1])
    assert 1e8 < ceiling < 1e14
    assert measured.total["seconds"] == pytest.approx(measured.total["flops"] / (0.25 * ceiling), rel=0.01)


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


def test_sizes_are_the_models_that_the_recipe_makes():
    recipe, tokenizer = runpy.run_path(str(ROOT / "recipes/bert_large.py")), AutoTokenizer.from_pretrained(TOKENIZER)
    for name in [*SIZES, "bert-6-768", "bert-2-64", "bert-1-32"]:
        with torch.device("meta"):
            made = recipe["make_model"](name, 0.0, tokenizer).config.to_diff_dict()
        found = find_config(name, dropout=0.0, vocab_size=len(tokenizer)).to_diff_dict()
        assert found == {key: value for key, value in made.items() if key not in ("architectures", "dtype")}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/configs").glob("*/*.yaml")), ids=lambda path: path.stem)
def test_options_of_the_recipes_are_no_errors(path):
    unread = []
    argv = ["--config", str(path), "--student", "bert-2-64", "--output_dir", "out"]
    parse_arguments([PlanArguments, PlannedConfig], argv, unread=unread)
    assert not {"max_steps", "learning_rate", "method", "teacher", "per_device_train_batch_size"} & set(unread)


def test_what_is_not_read_is_an_option_of_a_recipe():
    scripts = [runpy.run_path(str(path)) for path in (ROOT / "recipes").glob("*.py")]
    kinds = [script["RecipeArguments"] for script in scripts if "RecipeArguments" in script]
    of_recipes = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert len(kinds) > 2 and of_recipes - {f.name for f in dataclasses.fields(PlanArguments)} == {*RECIPE_OPTIONS} - {
        f.name for f in dataclasses.fields(PlannedConfig)
    }


# ---- the teacher's weights ----


def renamed(tmp_path):
    """Weights under the names of ten years ago, which loading maps to those of today."""
    folder = Path(tmp_path, "teacher")
    tiny_bert(4).save_pretrained(folder)
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def deeper(folder):
    tiny_bert(5).save_pretrained(folder)
    tiny_bert(4).config.save_pretrained(folder)


def cut(folder):
    tiny_bert(4).save_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def pickled(folder):
    tiny_bert(4).save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


WEIGHTS = {
    "whole": (lambda folder: tiny_bert(4).save_pretrained(folder), "ok", r"all that a BertForMaskedLM needs"),
    "in shards": (lambda folder: tiny_bert(4).save_pretrained(folder, max_shard_size="10KB"), "ok", r"all that"),
    "of old names": (lambda folder: renamed(folder.parent), "ok", r"all that"),
    "with another head, too": (
        lambda folder: BertForPreTraining(tiny_bert(4).config).save_pretrained(folder),
        "ok",
        r"all that",
    ),
    "without a head": (
        lambda folder: BertModel(tiny_bert(4).config).save_pretrained(folder),
        "error",
        r"has no weights for cls\.predictions\.bias, .* as a BertForMaskedLM these would be random",
    ),
    "with another head": (
        lambda folder: BertForSequenceClassification(tiny_bert(4).config).save_pretrained(folder),
        "error",
        r"has no weights for cls\.predictions\.bias",
    ),
    "of another size": (
        lambda folder: (tiny_bert(4).save_pretrained(folder), tiny_bert(4, width=32).config.save_pretrained(folder)),
        "error",
        r"has no weights for",
    ),
    "with more blocks": (deeper, "error", r"encoder\.layer\.4\..*, a block that its config.json leaves out"),
    "cut": (cut, "error", r"cannot be loaded"),
    "missing": (
        lambda folder: tiny_bert(4).config.save_pretrained(folder),
        "error",
        r"has a config.json, but no weights",
    ),
    "pickled": (pickled, "skip", r"no safetensors file .* not known; its configuration names BertForMaskedLM"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_teacher_that_the_run_cannot_load_is_refused_without_reading_its_weights(tmp_path, student, config, name):
    make, outcome, message = WEIGHTS[name]
    folder, student_folder = tmp_path / "teacher", tmp_path / "student"
    make(folder)
    student.config.save_pretrained(student_folder)
    options = PlanArguments(student=str(student_folder), teacher=str(folder), block_size=LENGTH)
    plan = make_plan(options, PlannedConfig(str(tmp_path / "out"), max_steps=8))
    (check,) = [check for check in plan.checks if check[1] == "teacher's weights"]
    assert check[0] == outcome and re.search(message, check[2]), check
    try:  # the run agrees
        CurriculumDistillationTrainer(student, config(), train_dataset=examples_for(student), teacher_model=str(folder))
    except (ValueError, OSError) as error:
        assert outcome == "error" and (name == "missing" or " ".join(str(error).split()) == check[2])
    else:
        assert outcome != "error"


def test_a_config_json_that_names_a_model_without_a_head_is_refused(tmp_path):
    for number, (architecture, outcome) in enumerate((("BertModel", "error"), ("BertForMaskedLM", "skip"))):
        config = tiny_bert(4).config
        config.architectures = [architecture]
        config.save_pretrained(tmp_path / f"{number}")
        path = str(tmp_path / f"{number}/config.json")
        plan = make_plan(PlanArguments(student=path, teacher=path, block_size=8), PlannedConfig("out", max_steps=8))
        (check,) = [check for check in plan.checks if check[1] == "teacher's weights"]
        assert check[0] == outcome and (outcome == "skip" or "BertModel, which has no head" in check[2])


# ---- what the run refuses, too ----

TWICE = [{"hidden": [[1, 1]], "until": 2}, {"hidden": [[1, 2]], "until": 4}, {"kl_weight": 1.0}]
REFUSED = {
    "a layer twice": ({"stages": TWICE}, r"name a student layer twice"),
    "a cache for nobody": ({"stages": [{"label_weight": 1.0}], "teacher_cache": "cache"}, "no stage needs the teacher"),
    "a cache that keeps too little": (
        {"divergence": "reverse_kl", "teacher_cache": "cache", "teacher_cache_logits": 8},
        r"only 'forward_kl' can be computed from",
    ),
    "too few ends": (
        {"method": "progressive", "teacher_schedule": [0.5]}, r"teacher_schedule has 1 ends for 3 checkpoints"
    ),
    "ends beyond the steps": (
        {"method": "progressive", "teacher_schedule": [4, 9]}, r"each checkpoint must stop teaching after the one"
    ),
    "layerdrop": ({"layerdrop": 0.1}, r"The student's layerdrop is 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_plan_and_run_refuse_the_same(tmp_path, config, name):
    fields, message = REFUSED[name]
    model = {key: value for key, value in fields.items() if key == "layerdrop"}
    fields = {key: value for key, value in fields.items() if key not in model}
    if "teacher_cache" in fields:
        fields["teacher_cache"] = str(tmp_path / "cache")
    student = tiny_bert(2, **model)
    for step in (2, 4, 6):
        tiny_bert(4, seed=step).save_pretrained(tmp_path / f"teacher/checkpoint-{step}")
    teacher = str(tmp_path / "teacher") if fields.get("method") == "progressive" else f"{tmp_path}/teacher/checkpoint-6"
    options = PlanArguments(student=saved(tmp_path / "student", student), teacher=teacher, block_size=LENGTH)
    plan = make_plan(options, PlannedConfig(str(tmp_path / "out"), max_steps=8, **fields))
    assert re.search(message, "; ".join(plan.errors)) and not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match=message):
        CurriculumDistillationTrainer(
            student, config(**fields), train_dataset=examples_for(student), teacher_model=teacher
        )


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


@pytest.mark.parametrize(
    ("model", "longest"),
    [
        (BertForMaskedLM(BertConfig(**SMALL)), 32),
        (RobertaForMaskedLM(RobertaConfig(**SMALL, pad_token_id=1)), 30),
        (OPTForCausalLM(OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=32)), 32),
        (LlamaForCausalLM(LlamaConfig(**SMALL)), None),
    ],
    ids=["BERT", "RoBERTa", "OPT", "Llama"],
)
def test_a_block_has_as_many_tokens_as_the_model_has_positions(tmp_path, model, longest):
    length = longest or 64
    model.eval()(input_ids=torch.full((1, length), 5))
    path = saved(tmp_path / "model", model)
    task = "MaskedLM" if "MaskedLM" in type(model).__name__ else "CausalLM"
    fields = {"max_steps": 8, "per_device_train_batch_size": 2}
    fits, not_ = (
        make_plan(PlanArguments(path, path, task=task, block_size=size), PlannedConfig("out", **fields))
        for size in (length, length + 1)
    )
    assert not fits.errors
    assert bool(not_.errors) == (longest is not None)
    if longest:
        assert not_.errors == [f"batch: block_size is {longest + 1}, but the student reads at most {longest} tokens."]
        with pytest.raises((RuntimeError, IndexError)):
            model(input_ids=torch.full((1, length + 1), 5))


# ---- the command ----


def test_the_command_prints_the_quick_starts_plan(tmp_path):
    path, teacher = tmp_path / "plan.json", tmp_path / "teacher"
    argv = ["plan", "--config", QUICKSTART, "--teacher", teacher, "--flops_per_second", "1e10", "--json", path]
    command = [sys.executable, "-m", "hf_curriculum_distill.cli", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plan, lines = json.loads(path.read_text()), done.stdout.splitlines()
    assert {outcome for outcome, _, _ in plan["checks"]} == {"ok"}
    assert lines[:7] == [f"{outcome:5}  {name}: {detail}" for outcome, name, detail in plan["checks"]]
    assert "student layer 2 <- teacher layer 2" in lines
    cells = {line.split()[0]: line.split()[1:] for line in lines if re.search(r"\d-\d", line)}
    total = plan["total"]
    assert cells["total"] == ["1-600", "2,121,210", "0.9337", "0.83465", "1.7683", "2.9", "min"]
    # what `make distill` wrote into results.json: its collator, too, labels equally many tokens of each block
    assert (total["student_flops"], total["teacher_flops"]) == (933_698_764_800, 834_645_196_800)
    assert total["seconds"] == pytest.approx(total["flops"] / 1e10)
    assert lines[-1] == "not read, for these are options of a recipe: dataset, eval_blocks, teacher_steps, compare_with"
    assert not teacher.exists()


def folder_of(tmp_path, name, model):
    return saved(tmp_path / name, model).removesuffix("/config.json")


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
    "few steps": (lambda _: ["--max_steps", "2"], r"steps: 2 layer stages in 50 % of 2 steps.* need max_steps >= 4"),
    "length": (lambda _: ["--block_size", "33"], r"batch: block_size is 33, but the student reads at most 32 tokens\."),
    "no labels": (lambda _: ["--mlm_probability", "0.001"], r"batch: mlm_probability is 0.001, with which no label"),
    "encoder-decoder": (t5, r"models: A t5 is no single stack of blocks"),
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


def test_no_student_and_options_that_compare_lacks_are_errors(capsys):
    for argv, message in ((["plan"], "No student is given"), (["compare", "a", "--student", "b"], "unrecognized")):
        with pytest.raises(SystemExit) as error:
            main(argv)
        assert error.value.code == 2 and message in capsys.readouterr().err
