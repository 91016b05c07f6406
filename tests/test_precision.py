"""Number formats, loss scaling, compilation, recomputation, launchers: none changes what is learnt."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from conftest import assert_same_weights, tiny_bert, weights
from safetensors.torch import load_file
from test_families import examples as random_examples
from test_families import labelled
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from hf_curriculum_distill import CurriculumDistillationTrainer

STAGES = [
    {"hidden": [[1, 2]], "until": 4},
    {"hidden": [[2, 4]], "until": 8},
    {"kl_weight": 1.0, "label_weight": 0.5, "hidden": [[2, 4]], "hidden_weight": 0.25},
]


class Float16Trainer(CurriculumDistillationTrainer):
    """With `fp16=True`: float16 autocast and loss scaling, which accelerate leaves out on CPU."""

    scaling: ClassVar = {"init_scale": 2.0**10}

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", **self.scaling)


class Overflowing(Float16Trainer):
    """Every third step overflows: after two good ones the scale jumps beyond float16, and back."""

    scaling: ClassVar = {
        "init_scale": 2.0**8,
        "growth_factor": 2.0**32,
        "backoff_factor": 2.0**-32,
        "growth_interval": 2,
    }


class Watch(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights, self.graphs = [weights(model)], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(weights(model))
        self.graphs.append(counters["stats"]["unique_graphs"])


def train(student, teacher, args, data, trainer_class=CurriculumDistillationTrainer, checkpoint=None):
    watch = Watch()
    trainer = trainer_class(student, args, train_dataset=data, teacher_model=teacher, callbacks=[watch])
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, watch


def step_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


# ---- losses in float32 ----


def standardised(states, bank):
    tensors = {name: tensor.double() for name, tensor in bank.tensors().items()}
    target = states["teacher hidden"] @ tensors["layer_1_2.weight"].T
    return (target - tensors["layer_1_2.mean"]) / tensors["layer_1_2.std"]


def hidden_error(states, bank):
    return (states["student hidden"] - standardised(states, bank)).square().mean(-1)[states["mask"]].mean()


def cosine_distance(states, bank):
    student, target = states["student hidden"], standardised(states, bank)
    return (1 - (student * target).sum(-1) / (student.norm(dim=-1) * target.norm(dim=-1)))[states["mask"]].mean()


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def log_probabilities(states):
    return [(states[f"{who} logits"] / 2.0).log_softmax(-1) for who in ("teacher", "student")]


def jensen_shannon(states):
    teacher, student = log_probabilities(states)
    mixture = ((teacher.exp() + student.exp()) / 2).log()
    return 4.0 * (kl(teacher, mixture) + kl(student, mixture)) / 2


# name -> (stage, other settings, reference in float64 from what came out of the models)
TERMS = {
    "hidden_mse": ({"hidden": [[1, 2]]}, {}, hidden_error),
    "forward_kl": ({"kl_weight": 1.0}, {}, lambda states, _: 4.0 * kl(*log_probabilities(states))),
    "reverse_kl": ({"kl_weight": 1.0}, {}, lambda states, _: 4.0 * kl(*reversed(log_probabilities(states)))),
    "jensen_shannon": ({"kl_weight": 1.0}, {}, lambda states, _: jensen_shannon(states)),
    "hidden_cosine": ({"hidden": [[1, 2]]}, {"hidden_loss": "cosine"}, cosine_distance),
    "hard": (
        {"kl_weight": 1.0},
        {"temperature": 1.0},
        lambda states, _: F.cross_entropy(states["student logits"], states["teacher logits"].argmax(-1)),
    ),
    "labels": (
        {"label_weight": 1.0},
        {"label_smoothing_factor": 0.1},
        lambda states, _: F.cross_entropy(states["student logits"], states["labels"], label_smoothing=0.1),
    ),
}
# name -> (trainer, settings, whether the student's weights are bfloat16)
FORMATS = {
    "float32": (CurriculumDistillationTrainer, {}, False),
    "bfloat16 autocast": (CurriculumDistillationTrainer, {"bf16": True}, False),
    "float16 autocast": (Float16Trainer, {"fp16": True}, False),
    "bfloat16 teacher": (CurriculumDistillationTrainer, {"teacher_dtype": "bfloat16"}, False),
    "float16 teacher": (CurriculumDistillationTrainer, {"teacher_dtype": "float16"}, False),
    "bfloat16 weights": (CurriculumDistillationTrainer, {}, True),
    "bfloat16 weights and teacher": (CurriculumDistillationTrainer, {"teacher_dtype": "bfloat16"}, True),
}


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_loss_is_float32_arithmetic_on_the_models_outputs(config, student, teacher, examples, name, term):
    trainer_class, fields, half_student = FORMATS[name]
    stage, options, reference = TERMS[term]
    if half_student:
        student = student.bfloat16()
    states = {}

    def keep(name):
        return lambda module, args, output: states.__setitem__(name, output.detach())

    student.bert.encoder.layer[0].register_forward_hook(keep("student hidden"))
    teacher.bert.encoder.layer[1].register_forward_hook(keep("teacher hidden"))
    student.cls.predictions.decoder.register_forward_hook(keep("student logits"))
    teacher.cls.predictions.decoder.register_forward_hook(keep("teacher logits"))

    class Keeping(trainer_class):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            labels = inputs["labels"]
            states.update(loss=loss.detach(), mask=inputs["attention_mask"].bool(), labels=labels[labels != -100])
            return loss

    divergence = {"divergence": term} if stage.get("kl_weight") else {}
    args = config(stages=[stage], max_steps=1, **{"temperature": 2.0} | divergence | options | fields)
    trainer, _ = train(student, teacher, args, examples, Keeping)
    dtypes = {key: value.dtype for key, value in states.items()}
    if "autocast" in name and not term.startswith(
        "hidden"
    ):  # blocks end in a layer norm, which autocast runs in float32
        assert dtypes["student logits"] == getattr(torch, name.split()[0])
    if half_student:
        assert torch.bfloat16 in (dtypes.get("student hidden"), dtypes.get("student logits"))
    if "teacher" in name and "teacher hidden" in states:
        assert dtypes["teacher hidden"] in (torch.bfloat16, torch.float16)
    assert dtypes["loss"] == torch.float32
    exact = {key: value.double() if value.is_floating_point() else value for key, value in states.items()}
    exact = {key: value[0] if key.endswith("logits") else value for key, value in exact.items()}  # [1, rows, classes]
    expected = reference(exact, trainer.projection_bank).item()
    assert expected > 1e-3
    assert states["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert step_logs(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float32"])
def test_the_curriculum_is_the_same_in_every_number_format(config, student, teacher, examples, name):
    trainer_class, fields, half_student = FORMATS[name]
    exact, _ = train(copy.deepcopy(student), teacher, config("exact", stages=STAGES, max_steps=12), examples)
    student = student.bfloat16() if half_student else student
    rounded, watch = train(
        student, teacher, config("rounded", stages=STAGES, max_steps=12, **fields), examples, trainer_class
    )
    assert {tensor.dtype for tensor in watch.weights[-1].values() if tensor.is_floating_point()} == {
        torch.bfloat16 if half_student else torch.float32
    }
    for actual, expected in zip(step_logs(rounded), step_logs(exact), strict=True):
        assert actual["stage"] == expected["stage"]
        for term in ("loss", "hidden_mse", "kl", "label_loss"):
            assert (term in actual) == (term in expected)
            if term in expected:
                assert actual[term] == pytest.approx(expected[term], rel=0.03, abs=0.003)


# ---- loss scaling ----


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_step_that_overflows_changes_nothing_and_the_stages_go_on(config, student, teacher, examples, optim):
    args = config(stages=STAGES, max_steps=12, fp16=True, optim=optim, lr_scheduler_type="constant", weight_decay=0.1)
    trainer, watch = train(student, teacher, args, examples, Overflowing)
    moved = [
        any(not torch.equal(after[name], before[name]) for name in before)
        for before, after in zip(watch.weights, watch.weights[1:], strict=False)
    ]
    assert moved == [True, True, False] * 4  # so that stages end at a skipped step, after one and before one
    logs = step_logs(trainer)
    assert [log["stage"] for log in logs] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(torch.isfinite(torch.tensor(log["loss"])) for log in logs)  # the gradient overflows, not the loss
    assert [bool(torch.isfinite(torch.tensor(log["grad_norm"]))) for log in logs] == moved


@pytest.mark.parametrize("number", [64, 12])  # with 12 examples, an epoch's last step is a skipped one
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_each_stages_schedule_starts_with_it_however_many_steps_were_skipped(
    config, student, teacher, examples, optim, number
):
    fields = {"max_steps": 12, "restart_schedule_per_stage": True, "stage_warmup_ratio": 0.25, "optim": optim}
    rates = []
    for trainer_class, more in ((CurriculumDistillationTrainer, {}), (Overflowing, {"fp16": True})):
        args = config(trainer_class.__name__, stages=STAGES, **fields, **more)
        trainer, _ = train(copy.deepcopy(student), teacher, args, examples[:number], trainer_class)
        rates.append([log["learning_rate"] for log in step_logs(trainer)])
    assert rates[1] == pytest.approx(rates[0])
    assert rates[0][0] == rates[0][4] == rates[0][8] == 0.0


@pytest.mark.parametrize("step, restart", [(3, True), (5, False)])  # after a skipped step; with a scale about to grow
def test_a_resumed_run_has_the_loss_scale_it_was_interrupted_with(config, student, teacher, examples, step, restart):
    fields = {"stages": STAGES, "max_steps": 12, "fp16": True, "optim": "adamw_torch", "save_strategy": "steps"}
    fields |= {"restart_schedule_per_stage": restart, "save_steps": step}
    whole, watch = train(copy.deepcopy(student), teacher, config(**fields), examples, Overflowing)
    checkpoint = os.path.join(whole.args.output_dir, f"checkpoint-{step}")
    resumed, _ = train(student, teacher, config("resumed", **fields), examples, Overflowing, checkpoint)
    assert_same_weights(weights(resumed.model), watch.weights[-1])
    assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    names = ("loss", "learning_rate", "stage")
    actual, expected = ([[log[name] for name in names] for log in step_logs(t)] for t in (resumed, whole))
    assert actual == expected


def test_a_loss_that_overflows_is_a_broken_run_with_loss_scaling_too(config, student, teacher, examples):
    with torch.no_grad():
        student.cls.predictions.decoder.weight.mul_(1e6)
    args = config(stages=[{"hidden": [[1, 2]], "until": 2}, {"kl_weight": 1.0}], fp16=True)
    with pytest.raises(FloatingPointError, match=r"kl is (nan|inf) in stage 2 of 2 \(kl\) at step 3"):
        train(student, teacher, args, examples, Float16Trainer)


# ---- compilation ----


def compiled_runs(config, name, backend):
    stages = [{"hidden": [[1, 1]], "until": 3}, {"hidden": [[2, 3]], "until": 6}, {"kl_weight": 1.0}]
    runs = []
    for fields in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        student, _, batch = build(name, seed=1)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # a compiled dropout draws other numbers
        data = labelled(student, random_examples(batch, 24))
        args = config(f"{backend}{len(fields)}", stages=stages, max_steps=10, per_device_train_batch_size=2, **fields)
        counters.clear()
        runs.append(train(student, build(name, seed=2)[0], args, data))
    return runs


@pytest.mark.parametrize("name, backend", [("gpt2", "eager"), ("vit", "eager"), ("bert", "aot_eager")])
def test_each_stage_is_one_graph_and_learns_what_it_learns_uncompiled(config, name, backend):
    (plain, _), (compiled, watch) = compiled_runs(config, name, backend)
    # rows that count differ in number from batch to batch, and still share a graph
    assert watch.graphs == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert not counters["graph_break"]
    for actual, expected in zip(step_logs(compiled), step_logs(plain), strict=True):
        assert actual["stage"] == expected["stage"]
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert_same_weights(weights(compiled.model), weights(plain.model), rtol=1e-4, atol=1e-5)


# ---- recomputation ----


@pytest.mark.parametrize("fields", [{}, {"train_prefix": "block"}, {"freeze_matched_layers": True}], ids=str)
def test_recomputed_activations_train_the_same_student(config, teacher, examples, fields):
    runs = []
    for recompute in (False, True):
        student = tiny_bert(2, dropout=0.1, seed=1)  # recomputation draws the same numbers again
        args = config(f"{recompute}", stages=STAGES, max_steps=12, gradient_checkpointing=recompute, **fields)
        runs.append(train(student, teacher, args, examples))
    (plain, plain_steps), (recomputed, steps) = runs
    names = ("loss", "grad_norm", "stage")
    expected, actual = ([[log[name] for name in names] for log in step_logs(t)] for t in (plain, recomputed))
    assert actual == expected
    assert_same_weights(steps.weights[-1], plain_steps.weights[-1])


def test_reentrant_recomputation_is_refused(config, student, teacher, examples):
    args = config(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=teacher)


# ---- launchers ----

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from conftest import masked_lm_examples, tiny_bert
from hf_curriculum_distill import CurriculumDistillationConfig, CurriculumDistillationTrainer
args = CurriculumDistillationConfig(
    sys.argv[1], stages={stages}, max_steps=12, per_device_train_batch_size=4, learning_rate=1e-3,
    save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
)
trainer = CurriculumDistillationTrainer(
    tiny_bert(2, seed=1), args, train_dataset=masked_lm_examples(64), teacher_model=tiny_bert(4, width=24, seed=2)
)
trainer.train()
trainer.save_model()
"""


def test_accelerate_and_python_train_the_same_student(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), stages=STAGES))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launchers = {"python": [sys.executable], "accelerate": accelerate}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = {
        name: subprocess.Popen([*launcher, script, tmp_path / name], env=environment, stderr=subprocess.PIPE, text=True)
        for name, launcher in launchers.items()
    }
    for run in runs.values():
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    python, accelerated = (load_file(tmp_path / name / "model.safetensors") for name in launchers)
    assert_same_weights(accelerated, python)
    assert not torch.equal(
        python["bert.encoder.layer.0.output.dense.weight"],
        tiny_bert(2, seed=1).bert.encoder.layer[0].output.dense.weight,
    )
