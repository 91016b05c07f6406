"""What is wrong is said before it costs anything: no crash without a reason, no result from damaged input.

Every refused start happens in the folder of a finished student, which must not change by a byte.
"""

import ast
import importlib
import json
import math
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import STUDENT_DEPTH, TEACHER_DEPTH, VOCAB_SIZE, StrictBert, masked_lm_examples, tiny_bert
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_curriculum_distill import (
    CURRICULUM_EXTRACTION,
    CurriculumDistillationConfig,
    CurriculumDistillationTrainer,
    ProjectionBank,
)
from hf_curriculum_distill.batches.checks import check_batch
from hf_curriculum_distill.cli import main
from hf_curriculum_distill.parsing import parse_arguments
from hf_curriculum_distill.projections import FILE_NAME
from hf_curriculum_distill.projections.bank import _Projection

ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"


def contents(folder):
    """Every file with its bytes and the time it was written."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a finished run, checkpoints included."""
    folder = tmp_path_factory.mktemp("finished")
    silence = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = CurriculumDistillationConfig(
        str(folder),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_steps=4,
        **silence | CURRICULUM_EXTRACTION,
    )
    trainer = CurriculumDistillationTrainer(
        tiny_bert(STUDENT_DEPTH, seed=1), args, train_dataset=masked_lm_examples(64), teacher_model=make_teacher()
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    return str(folder)


def make_teacher(**changes):
    return tiny_bert(TEACHER_DEPTH, **{"width": 24, "seed": 2, "initializer_range": 0.3} | changes)


@pytest.fixture
def build(config, finished, student, examples):
    """A trainer in the finished student's folder, with something changed."""

    def build(**changes):
        names = ("model", "train_dataset", "teacher_model", "projection_bank", "data_collator", "eval_dataset")
        given = {name: changes.pop(name) for name in names if name in changes}
        arguments = {"model": student, "train_dataset": examples, "teacher_model": make_teacher()} | given
        return CurriculumDistillationTrainer(args=config(finished, **changes), **arguments)

    return build


@pytest.fixture
def refused(build, finished):
    """Building the trainer raises, and leaves the folder as it is."""

    def refused(message, error=ValueError, **changes):
        before = contents(finished)
        with pytest.raises(error, match=message) as caught:
            build(**changes)
        assert contents(finished) == before
        return str(caught.value)

    return refused


# ---- the teacher's files ----


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(name):
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


def become_a_folder(name):
    def edit(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return edit


def set_config(**values):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def set_tensors(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def lose_a_shard(folder):
    (folder / WEIGHTS).unlink()
    make_teacher().save_pretrained(folder, max_shard_size="20KB")
    min(folder.glob("model-0*.safetensors")).unlink()


BIAS = "bert.encoder.layer.1.output.dense.bias"
DAMAGED_TEACHERS = {
    "weights cut": (cut(WEIGHTS), OSError, "cannot be loaded: .*incomplete metadata"),
    "weights empty": (write(WEIGHTS, b""), OSError, "cannot be loaded: .*header too small"),
    "weights garbage": (write(WEIGHTS, b"garbage" * 99), OSError, "cannot be loaded: .*header"),
    "weights a folder": (become_a_folder(WEIGHTS), OSError, "cannot be loaded: .*no file named model.safetensors"),
    "weights missing": (remove(WEIGHTS), OSError, "cannot be loaded: .*no file named model.safetensors"),
    "a shard missing": (lose_a_shard, OSError, "cannot be loaded: .*model-00001-of"),
    "no config": (remove("config.json"), ValueError, "Unrecognized model"),
    "config cut": (cut("config.json"), OSError, "not a valid JSON file"),
    "config empty": (write("config.json", b""), OSError, "not a valid JSON file"),
    "config a list": (write("config.json", b"[]"), ValueError, "Unrecognized model"),
    "config of no known type": (set_config(model_type="nope"), ValueError, "model type `nope`"),
    "config of another task": (set_config(model_type="gpt2"), ValueError, "for this kind of AutoModel"),
    "config with a word for a number": (set_config(num_hidden_layers="four"), ValueError, "num_hidden_layers"),
    "config with heads that do not divide": (set_config(num_attention_heads=5), ValueError, "not a multiple"),
    "config deeper than the weights": (set_config(num_hidden_layers=6), ValueError, r"no weights for .*layer\.4\."),
    "config shallower than the weights": (
        set_config(num_hidden_layers=2),
        ValueError,
        r"has weights for bert\.encoder\.layer\.2\..*, a block that its config\.json leaves out",
    ),
    "config wider than the weights": (set_config(hidden_size=32), ValueError, "has no weights for .*would be random"),
    "a tensor missing": (set_tensors(lambda t: t.pop(BIAS)), ValueError, rf"has no weights for {BIAS}"),
    "a tensor of another shape": (
        set_tensors(lambda t: t.update({BIAS: torch.zeros(7)})),
        ValueError,
        rf"has no weights for .*{BIAS}",
    ),
    "a nan": (set_tensors(lambda t: t[BIAS][3:4].fill_(math.nan)), ValueError, rf"{BIAS} of the teacher '.*are nan or"),
    "an inf": (set_tensors(lambda t: t[BIAS][3:4].fill_(-math.inf)), ValueError, rf"{BIAS} of the teacher"),
}


@pytest.mark.parametrize("name", DAMAGED_TEACHERS)
def test_a_damaged_teacher_is_refused_by_its_name(refused, tmp_path, name):
    edit, error, message = DAMAGED_TEACHERS[name]
    folder = tmp_path / "checkpoint-5"
    make_teacher().save_pretrained(folder)
    edit(folder)
    assert str(folder) in refused(message, error, teacher_model=folder, method="one_shot")
    assert str(folder) in refused(message, error, teacher_model=[folder], method="progressive")


# ---- code inside a teacher ----


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_are_read_as_tensors_only_and_what_else_they_hold_is_not_run(refused, build, tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / WEIGHTS)
    (tmp_path / "teacher" / WEIGHTS).unlink()
    torch.save(weights, tmp_path / "teacher/pytorch_model.bin")
    assert torch.equal(build(teacher_model=tmp_path / "teacher").teacher.model.state_dict()[BIAS], weights[BIAS])
    torch.save(weights | {"more": Canary(tmp_path / "canary")}, tmp_path / "teacher/pytorch_model.bin")
    refused(
        "pickled weights that hold more than tensors; they are not loaded", OSError, teacher_model=tmp_path / "teacher"
    )
    assert not (tmp_path / "canary").exists()
    torch.load(tmp_path / "teacher/pytorch_model.bin", weights_only=False)  # the trap works
    assert (tmp_path / "canary").exists()


def bring_code(folder, canary, **config):
    (folder / "code.py").write_text(f"import os; os.mkdir({str(canary)!r})\nclass Theirs: pass\n")
    set_config(auto_map={"AutoConfig": "code.Theirs", "AutoModelForMaskedLM": "code.Theirs"}, **config)(folder)


def test_code_that_a_teacher_brings_is_not_run(refused, build, tmp_path):
    make_teacher().save_pretrained(tmp_path / "teacher")
    bring_code(tmp_path / "teacher", tmp_path / "canary", model_type="theirs")
    refused("(?s)contains custom code .*loaded by you and passed as teacher_model", teacher_model=tmp_path / "teacher")
    bring_code(tmp_path / "teacher", tmp_path / "canary", model_type="bert")  # transformers has its own code for it
    build(teacher_model=tmp_path / "teacher")
    assert not (tmp_path / "canary").exists()


# ---- what is no teacher for this student ----


def spoilt(model, value=math.nan):
    with torch.no_grad():
        model.get_parameter("bert.embeddings.position_embeddings.weight")[-1, -1] = value  # read by no example
    return model


GPT2 = {"vocab_size": VOCAB_SIZE, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}
T5 = {"vocab_size": VOCAB_SIZE, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 2}
BART = {"vocab_size": VOCAB_SIZE, "d_model": 16, "encoder_layers": 4, "decoder_layers": 2, "encoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
WRONG_TEACHERS = {
    "causal": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "BertForMaskedLM .* teacher a GPT2LMHeadModel"),
    "causal, of the student's family": (
        lambda: BertLMHeadModel(BertConfig(**make_teacher().config.to_diff_dict() | {"is_decoder": True})),
        "BertForMaskedLM .* teacher a BertLMHeadModel",
    ),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
        "BertForMaskedLM .* teacher a T5ForConditionalGeneration",
    ),
    "encoder-decoder that also fills masks": (
        lambda: BartForConditionalGeneration(BartConfig(**BART)),
        "BertForMaskedLM .* teacher a BartForConditionalGeneration",
    ),
    "classifier": (lambda: make_teacher(model_class=BertForSequenceClassification), "mean different things"),
    "tagger with as many tags as words": (
        lambda: make_teacher(model_class=BertForTokenClassification, num_labels=VOCAB_SIZE),
        "mean different things",
    ),
    "headless": (
        lambda: make_teacher(model_class=BertModel),
        "The teacher is a BertModel, which has no head, but stage",
    ),
    "inf": (lambda: spoilt(make_teacher(), math.inf), r"position_embeddings\.weight of the teacher"),
    "nan where no example reads": (lambda: spoilt(make_teacher()), r"position_embeddings\.weight of the teacher"),
    "without values": (lambda: make_teacher().to("meta"), "has no values yet .device 'meta'.; load its weights"),
    "a class": (lambda: type(make_teacher()), "teacher_model is a type; pass a PreTrainedModel, its name or folder"),
    "bytes": (lambda: b"teacher", "teacher_model is a bytes"),
    "a set of folders": (lambda: {"a", "b"}, "teacher_model is a set"),
    "a number": (lambda: 5, "teacher_model is a int"),
    "a state dict": (lambda: make_teacher().state_dict(), "teacher_model is a OrderedDict"),
}


@pytest.mark.parametrize("method", ["curriculum", "online"])
@pytest.mark.parametrize("name", WRONG_TEACHERS)
def test_a_teacher_of_another_kind_is_refused_whoever_teaches(refused, name, method):
    teacher, message = WRONG_TEACHERS[name]
    refused(message, teacher_model=teacher(), method=method)


@pytest.mark.parametrize(
    "student, message",
    [
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "GPT2LMHeadModel .* teacher a BertForMaskedLM"),
        (lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)), "teacher a BertForMaskedLM"),
        (lambda: tiny_bert(2, model_class=BertModel), r"student is a BertModel \(AutoModel\)"),
        (
            lambda: tiny_bert(2, model_class=BertForQuestionAnswering),
            "BertForQuestionAnswering .* their logits mean different things",
        ),
        (
            lambda: tiny_bert(2, model_class=BertForMultipleChoice),
            "BertForMultipleChoice .* their logits mean different things",
        ),
        (lambda: tiny_bert(2, model_class=BertForPreTraining), "BertForPreTraining .* not one row of class logits"),
        (lambda: spoilt(tiny_bert(2)), r"position_embeddings\.weight of the student has values that are nan or inf"),
    ],
    ids=["causal", "encoder-decoder", "headless", "extracts", "chooses", "two heads", "nan"],
)
def test_a_student_of_another_kind_is_refused(refused, student, message):
    refused(message, model=student())


def test_a_class_of_ones_own_has_the_task_it_is_derived_from(refused, build):
    build(model=tiny_bert(2, model_class=StrictBert))
    refused(
        "StrictBert .AutoModelForMaskedLM.",
        model=tiny_bert(2, model_class=StrictBert),
        teacher_model=GPT2LMHeadModel(GPT2Config(**GPT2)),
    )


def test_weights_that_overflow_in_the_teachers_dtype_are_refused(refused, build):
    teacher = make_teacher()
    teacher.get_parameter(BIAS).data[0] = 1e5
    build(teacher_model=teacher)
    refused(
        f"{BIAS} of the teacher .* where a cast to float16 overflowed", teacher_model=teacher, teacher_dtype="float16"
    )


@pytest.mark.parametrize(
    "name, message",
    [
        ("google-bert/bert-large-uncased", "'google-bert/bert-large-uncased' cannot be loaded: We couldn't connect"),
        ("no such/name", "'no such/name' cannot be loaded: Repo id must"),
        ("", "The teacher '' cannot be loaded"),
    ],
)
def test_a_name_that_nothing_is_found_for_is_an_oserror(refused, name, message):
    refused(message, OSError, teacher_model=name)


def test_what_is_no_models_folder_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("text")
    refused("file' cannot be loaded: it is a file; name the folder", OSError, teacher_model=tmp_path / "file")
    refused("has no checkpoint-STEP folders", ValueError, teacher_model=tmp_path, method="progressive")
    (tmp_path / "empty").mkdir()
    refused("empty' cannot be loaded as the student's AutoModelForMaskedLM", teacher_model=tmp_path / "empty")


# ---- banks ----

PAIRS = [(1, 2), (2, 4)]


def make_bank(identity=None):
    generator = torch.Generator().manual_seed(0)
    states = {layer: torch.randn(2, 5, 24, generator=generator) for layer in (2, 4)}
    bank = ProjectionBank.create(PAIRS, [16, 16], [24, 24])
    return bank.fit(lambda batch, layers: (states, torch.ones(2, 5)), [0], identity)


def rewrite(folder, change):
    """Change tensors and metadata, and sign the result as [`ProjectionBank`] would."""
    with safe_open(folder / FILE_NAME, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    parts = {p: [tensors.get(f"layer_{p[0]}_{p[1]}.{name}") for name in ("weight", "mean", "std")] for p in PAIRS}
    if all(tensor is not None for part in parts.values() for tensor in part):
        noted = {name: metadata[name] for name in ("kind", "seed", "shared", "teacher", "frozen") if name in metadata}
        with suppress(json.JSONDecodeError):
            noted = {name: json.loads(value) for name, value in noted.items()}
        frozen = noted.pop("frozen")
        signed = ProjectionBank({pair: _Projection(*part) for pair, part in parts.items()}, noted, frozen)
        metadata["fingerprint"] = signed.fingerprint
    save_file(tensors, folder / FILE_NAME, metadata=metadata)


def fill(name, value):
    return lambda tensors, metadata: tensors[name].view(-1)[:1].fill_(value)


def put(name, tensor):
    return lambda tensors, metadata: tensors.update({name: tensor})


def note(**values):
    return lambda tensors, metadata: metadata.update(values)


WRONG_BANKS = {
    **{
        f"{value} in a {part}": (fill(f"layer_1_2.{part}", value), rf"layer_1_2\.{part} has values that are not finite")
        for part in ("weight", "mean", "std")
        for value in (math.nan, math.inf)
    },
    "deviation 0": (fill("layer_2_4.std", 0.0), r"layer_2_4\.std has values .* deviations that are not positive"),
    "deviation below 0": (
        fill("layer_2_4.std", -1.0),
        r"layer_2_4\.std has values .* deviations that are not positive",
    ),
    "a mean of another length": (
        put("layer_1_2.mean", torch.zeros(3)),
        r"layer_1_2\.mean is torch.float32 of shape \(3,\)",
    ),
    "a matrix with one dimension": (
        put("layer_1_2.weight", torch.ones(16)),
        r"layer_1_2\.weight is .* of shape \(16,\)",
    ),
    "half a matrix's precision": (
        put("layer_1_2.weight", torch.ones(16, 24).half()),
        r"layer_1_2\.weight is torch.float16",
    ),
    "a matrix of integers": (put("layer_1_2.weight", torch.ones(16, 24).long()), r"layer_1_2\.weight is torch.int64"),
    "a tensor more": (put("layer_3_6.std", torch.ones(16)), r"tensors \['layer_3_6.std'\] belong to none of its layer"),
    "a tensor less": (lambda tensors, metadata: tensors.pop("layer_1_2.std"), r"layer_1_2\.std"),
    "a pair less": (note(layer_pairs="[[1, 2]]"), r"belong to none of its layer pairs \[\(1, 2\)\]"),
    "pairs that are a number": (note(layer_pairs="3"), "3 is no list of layer pairs"),
    "pairs that are letters": (note(layer_pairs='"ab"'), "is not a layer pair"),
    "another kind": (note(kind='"learned"'), "its kind is 'learned'"),
    "no kind": (lambda tensors, metadata: metadata.pop("kind"), "'kind'"),
    "no teacher": (lambda tensors, metadata: metadata.pop("teacher"), "'teacher'"),
    "a teacher that is a word": (note(teacher='"bert"'), "its teacher is 'bert'"),
    "frozen is a word": (note(frozen='"no"'), "frozen is 'no'"),
    "metadata that is no JSON": (note(seed="zero"), "Expecting value"),
    "no fingerprint": (lambda t, m: (t.pop("layer_1_2.std"), m.pop("fingerprint")), "'fingerprint'"),
}


@pytest.mark.parametrize("name", WRONG_BANKS)
def test_a_bank_that_was_tampered_with_is_refused_though_its_fingerprint_is_right(tmp_path, name):
    change, message = WRONG_BANKS[name]
    make_bank().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors, metadata: None)
    assert ProjectionBank.from_pretrained(tmp_path).fingerprint == make_bank().fingerprint
    rewrite(tmp_path, change)
    with pytest.raises(
        ValueError, match=f"{FILE_NAME} is not a readable projection bank .*{message}.*restore the file"
    ):
        ProjectionBank.from_pretrained(tmp_path)


def test_what_is_no_banks_folder_is_an_oserror(tmp_path):
    make_bank().save_pretrained(tmp_path)
    for wrong in (tmp_path / FILE_NAME, tmp_path / "none", "no/such-repository"):
        with pytest.raises(
            OSError, match=f"is no folder, and there is no such Hub repository .* that holds {FILE_NAME}"
        ):
            ProjectionBank.from_pretrained(wrong)
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(OSError, match=f"There is no {FILE_NAME} in"):
        ProjectionBank.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([(1, 2)], [0], [6]), "A projection's dimension is 0; hidden states have at least 1"),
        (([(1, 2)], [4], [-6]), "A projection's dimension is -6"),
        (([(1, 2)], [4.0], [6]), "must be whole numbers, but one is 4.0"),
        (([(1, 2)], ["4"], [6]), "must be whole numbers, but one is '4'"),
        (([(1, 2)], [True], [6]), "must be whole numbers, but one is True"),
        (([(1, 2)], [4], [6], "gaussian", 1.5), "must be whole numbers, but one is 1.5"),
        (([(1, 2)], [4], [6], "gaussian", None), "must be whole numbers, but one is None"),
        (([(1, 2)], [4], [6], "gaussian", "0"), "must be whole numbers, but one is '0'"),
        ((5, [4], [6]), "5 is no list of layer pairs"),
    ],
)
def test_a_bank_that_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProjectionBank.create(*arguments)


def test_a_bank_of_another_teacher_is_refused_and_one_for_other_blocks_too(refused, finished):
    fitted = ProjectionBank.from_pretrained(finished)
    measured = r"measured on a teacher with weights \w{12}, but the teacher "
    refused(measured + r"has \w{12}", projection_bank=fitted, teacher_model=make_teacher(seed=3))
    refused(measured + r"has \w{12}", projection_bank=fitted, teacher_dtype="bfloat16")
    online = {"method": "online", "stages": [{"hidden": PAIRS}], "standardize_targets": False}
    refused(measured + "changes while it teaches", projection_bank=fitted, **online)
    other = ProjectionBank.create([(1, 1), (2, 3)], [16, 16], [24, 24])
    refused(r"layer pairs \[\(1, 2\), \(2, 4\)\] need \[16, 24\]", projection_bank=other)
    refused(
        r"need \[16, 24\] .* but it has .*\(16, 32\)", projection_bank=ProjectionBank.create(PAIRS, [16, 16], [32, 32])
    )
    refused("projection='identity' copies teacher units, but the student has 16 and the teacher 8",
            teacher_model=make_teacher(width=8), projection="identity")  # fmt: skip


# ---- configuration ----

WRONG_VALUES = {
    **{name: ["yes", "false", 1, 0, None, math.nan, []]
       for name in ("shared_projection", "standardize_targets", "freeze_matched_layers", "truncate",
                    "restart_schedule_per_stage", "freeze_embeddings_in_layer_stages", "carry_optimizer")},
    "projection_seed": [-1, 2**64, 1.5, "0", None, True, math.nan, [1]],
    "max_steps": ["8", 8.0, None, True, math.nan],
    "num_train_epochs": [-1, math.nan, math.inf, "3", None],
    "per_device_train_batch_size": [0, -4, 2.0, "4", None, True],
    "gradient_accumulation_steps": [0, -1, 1.5, "2", True],
    "learning_rate": [-1e-3, math.nan, math.inf, "fast", True],
    "label_smoothing_factor": [-0.1, 1.1, math.nan, "0"],
    "calibration_samples": [None, True, [256]],
    "num_layer_stages": [math.nan, 0.5, [1]],
    "temperature": [[1.0]],
    "label_loss_weight": [True, None],
    "layer_map": [{}, {"1": 2}, [["1", 2]], [[1, 2], None], [[1, math.nan]], "uniformly"],
    "method": [3, ["curriculum"], {"curriculum"}],
    "teacher_dtype": [torch.float16, 16],
    "teacher_schedule": [{}, [math.nan], [-1], [None], [[1]]],
}  # fmt: skip


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in WRONG_VALUES.items() for value in values], ids=str
)
def test_values_of_other_types_are_refused_by_name(config, finished, name, value):
    before = contents(finished)
    fields = {"max_steps": -1} if name == "num_train_epochs" else {}
    with pytest.raises((ValueError, TypeError), match=f"{name} is|not a layer pair|teacher_schedule has") as caught:
        config(finished, **fields | {name: value})
    assert caught.type is ValueError and contents(finished) == before


WRONG_STAGES = [
    ([{"kl_weight": True}], r"stages\[0\]: Stage.kl_weight is True"),
    ([{"kl_weight": None}], r"stages\[0\]: Stage.kl_weight is None"),
    ([{"kl_weight": 1.0}, {"hidden": None}], r"stages\[1\]: None is no list of layer pairs"),
    ([{"hidden": 5}], r"stages\[0\]: 5 is no list of layer pairs"),
    ([{"hidden": "12"}], r"stages\[0\]: \['1'\] is not a layer pair"),
    ([{"hidden": {"1": 2}}], r"stages\[0\]: \['1'\] is not a layer pair"),
    ([{"kl_weight": 1.0, "until": math.nan}, {"kl_weight": 1.0}], r"stages\[0\]: Stage.until is nan"),
    ([{"kl_weight": 1.0, "until": [3]}, {"kl_weight": 1.0}], r"stages\[0\]: Stage.until is \[3\]"),
    ([{1: 2, "weight": 3}], r"stages\[0\] has unknown fields \[1, 'weight'\]; a stage has hidden"),
    ([None], r"stages\[0\] is None; write each stage as a dict"),
    ([[]], r"stages\[0\] is \[\]; write each stage as a dict"),
    ({"kl_weight": 1.0}, r"stages is \{'kl_weight': 1.0\}; write a list"),
    ('{"kl_weight": 1.0}', "stages is .*; write a list with a dict"),
    ("[{kl_weight: 1.0}]", "stages is .*, which is no valid JSON list"),
    ('[{"kl_weight": NaN}]', r"stages\[0\]: Stage.kl_weight is nan"),
    ("[1", "stages is '\\[1', which is no valid JSON list"),
    ("kl", "stages is 'kl'; write a list"),
]


@pytest.mark.parametrize("stages, message", WRONG_STAGES, ids=str)
def test_stages_of_other_types_are_refused_by_their_number(refused, stages, message):
    refused(message, stages=stages)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"max_steps": 0}, "max_steps is 0; the stages are fractions of it"),
        ({"max_steps": 1}, r"2 layer stages in 50 % of 1 steps.* need max_steps >= 4; raise it"),
        ({"max_steps": -1, "num_train_epochs": 0}, "max_steps is 0; the stages are fractions of it"),
        (
            {"layer_map": "last", "num_layer_stages": 2, "teacher_model": tiny_bert(1)},
            "between 1 and 1 layers to match",
        ),
        ({"lr_scheduler_type": "rising"}, "rising is not a valid SchedulerType"),
        ({"eval_strategy": "steps"}, "didn't pass an `eval_dataset`"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(refused, fields, message):
    refused(message, **fields)


def test_plain_arguments_are_checked_as_ours_are(finished, student, examples):
    args = TrainingArguments(finished, max_steps=8, gradient_accumulation_steps=0, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 0; it must be a number between 1"):
        CurriculumDistillationTrainer(student, args, train_dataset=examples, teacher_model=make_teacher())


# ---- data ----


def edited(key, change, where=lambda index: True):
    def edit(examples):
        return [e | {key: change(e)} if where(index) else e for index, e in enumerate(examples)]

    return edit


def without(*keys):
    return lambda examples: [{name: value for name, value in e.items() if name not in keys} for e in examples]


def labels_become(value):
    return edited("labels", lambda e: torch.full_like(e["labels"], value))


WRONG_DATA = {
    "a label beyond the vocabulary": (labels_become(VOCAB_SIZE), rf"labels hold {VOCAB_SIZE}, .* knows 0 to 49 "),
    "a label of -1": (labels_become(-1), "labels hold -1, but the model knows 0 to 49"),
    "a label of -101": (labels_become(-101), "labels hold -101"),
    "one wrong label of many": (
        edited("labels", lambda e: torch.cat([e["labels"][1:], torch.tensor([999])]), lambda index: index == 3),
        "labels hold 999",
    ),
    "labels that are fractions": (edited("labels", lambda e: e["labels"].float()), "labels are torch.float32 of shape"),
    "one label for a whole text": (
        edited("labels", lambda e: torch.tensor(1)),
        r"labels have shape \(4,\) .*one label a token",
    ),
    "fewer labels than tokens": (
        edited("labels", lambda e: e["labels"][:-2]),
        r"labels have shape \(4, 10\) but input_ids",
    ),
    "labels as probabilities": (
        edited("labels", lambda e: torch.zeros(12, VOCAB_SIZE, dtype=torch.long)),
        r"labels are torch.int64 of shape \(4, 12, 50\)",
    ),
    "a token beyond the vocabulary": (
        edited("input_ids", lambda e: e["input_ids"] + VOCAB_SIZE),
        "input_ids hold .* 0 to 49",
    ),
    "a token below 0": (edited("input_ids", lambda e: e["input_ids"] - VOCAB_SIZE), "input_ids hold -"),
    "tokens that are fractions": (edited("input_ids", lambda e: e["input_ids"].float()), "input_ids are torch.float32"),
    "texts of lists of tokens": (edited("input_ids", lambda e: e["input_ids"][None]), r"input_ids are .* \(4, 1, 12\)"),
    "a mask shorter than the text": (
        edited("attention_mask", lambda e: e["attention_mask"][:-1]),
        r"mask has shape \(4, 11\)",
    ),
    "one mask value for a text": (
        edited("attention_mask", lambda e: torch.tensor(1)),
        r"mask has shape \(4,\) but input_ids",
    ),
    "no tokens": (without("input_ids"), "The batch has no input_ids, .* it holds attention_mask, labels"),
    "embeddings in place of tokens": (
        lambda examples: without("input_ids")(edited("inputs_embeds", lambda e: torch.zeros(12, 16))(examples)),
        "The batch has no input_ids, .* it holds .*inputs_embeds",
    ),
    "text in place of tokens": (
        lambda examples: [{"text": "a"}] * 8,
        "The batch has no input_ids, .* it holds nothing",
    ),
    "texts without tokens": (
        lambda examples: [{name: value[:0] for name, value in e.items()} for e in examples],
        "The batch has no input_ids, or none but empty ones",
    ),
}


@pytest.mark.parametrize("method", ["one_shot", "labels"])
@pytest.mark.parametrize("name", WRONG_DATA)
def test_a_batch_that_would_be_misread_stops_the_run_before_its_first_step(build, finished, examples, name, method):
    edit, message = WRONG_DATA[name]
    trainer, before = build(train_dataset=edit(examples[:16]), method=method), contents(finished)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert contents(finished) == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_finite_are_refused(build, value):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    models = [
        ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)) for _ in range(2)
    ]
    data = [{"pixel_values": torch.zeros(3, 16, 16), "labels": torch.tensor(index % 3)} for index in range(8)]
    build(model=models[0], teacher_model=models[1], train_dataset=data, method="one_shot", max_steps=2).train()
    data[5]["pixel_values"][1, 2, 3] = value
    trainer = build(model=models[0], teacher_model=models[1], train_dataset=data, method="one_shot", max_steps=2)
    with pytest.raises(ValueError, match="pixel_values have values that are nan or inf; check the data"):
        trainer.train()


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, 1, 2, 3]), "labels hold 3, but the model knows 0 to 2"),
        (torch.tensor([0, -2, 2, 1]), "labels hold -2, but the model knows 0 to 2"),
        (torch.tensor([[0], [1], [2], [0]]), r"labels have shape \(4, 1\) .*needs one label an example"),
        (torch.tensor([0, 1]), r"labels have shape \(2,\) .*needs one label an example"),
        (torch.tensor(1), "labels are torch.int64 of shape"),
        (torch.tensor([0.0, 1.0, 0.0, 1.0]), "labels are torch.float32"),
    ],
    ids=["too high", "too low", "in columns", "too few", "a number", "fractions"],
)
def test_a_classifiers_labels_are_its_classes(labels, message):
    model = tiny_bert(1, model_class=BertForSequenceClassification, num_labels=3)
    inputs = {"input_ids": torch.ones(4, 6, dtype=torch.long)}
    check_batch(model, inputs | {"labels": torch.tensor([0, 1, 2, -100])})
    with pytest.raises(ValueError, match=message):
        check_batch(model, inputs | {"labels": labels})


@pytest.mark.parametrize(
    "batch", [None, [], (torch.ones(2, 3),), torch.ones(2, 3), {}, {"input_ids": [[1, 2]]}], ids=str
)
def test_what_is_no_batch_is_refused_with_what_it_is(batch):
    with pytest.raises(ValueError, match=r"The batch has no input_ids, .*; it holds \w+"):
        check_batch(tiny_bert(1), batch)


class Stream(torch.utils.data.IterableDataset):
    """The examples in their order, again and again."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


@pytest.mark.parametrize("method", ["one_shot", "labels", "online"])
def test_a_batch_in_which_no_label_counts_adds_nothing_and_stops_nothing(build, examples, student, method):
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    data = labels_become(-100)(examples[:4]) + examples[4:8]
    build(train_dataset=Stream(data), method=method, max_steps=1).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    trainer = build(train_dataset=Stream(data), method=method, max_steps=4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss == 0 for loss in losses] == [True, False, True, False] and all(map(math.isfinite, losses))


def test_little_data_is_enough(build, examples):
    """More calibration samples than examples, fewer examples than a batch, one example, a step for each stage."""
    for size, fields in ((6, {"calibration_samples": 10**6}), (2, {}), (1, {}), (64, {"max_steps": 3})):
        trainer = build(train_dataset=examples[:size], **fields)
        trainer.train()
        assert trainer.state.global_step == trainer.args.max_steps
        assert all(math.isfinite(entry.get("loss", 0.0)) for entry in trainer.state.log_history)


# ---- what to resume from ----


def other_bytes(name):
    """As long as it was: a check of sizes sees nothing."""
    return lambda folder: (folder / name).write_bytes(b"garbage" + (folder / name).read_bytes()[7:])


def flip_the_last_bit(name):
    def edit(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return edit


DAMAGED_CHECKPOINTS = {
    "a record of garbage": (other_bytes("curriculum.json"), ValueError, "curriculum.json is not a readable run record"),
    "no record": (
        remove("curriculum.json"),
        OSError,
        "has no curriculum.json, so it is no checkpoint of a distillation",
    ),
    "a record that is a folder": (become_a_folder("curriculum.json"), OSError, "has no curriculum.json"),
    "a bank of garbage": (other_bytes(FILE_NAME), ValueError, f"{FILE_NAME} is not a readable projection bank"),
    "one bit of a bank": (flip_the_last_bit(FILE_NAME), ValueError, f"{FILE_NAME} does not match the fingerprint"),
    "the bank of another teacher": (
        lambda folder: make_bank({"fingerprint": "a" * 64}).save_pretrained(folder),
        ValueError,
        r"checkpoint-4 has projection bank \w{12}, but was written with \w{12}; restore the file",
    ),
    "no bank": (remove(FILE_NAME), (OSError, ValueError), FILE_NAME),
    "a bank cut short": (cut(FILE_NAME), ValueError, FILE_NAME),
}


@pytest.mark.parametrize("name", DAMAGED_CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused_by_its_file(build, finished, tmp_path, name):
    edit, error, message = DAMAGED_CHECKPOINTS[name]
    checkpoint = shutil.copytree(os.path.join(finished, "checkpoint-4"), tmp_path / "checkpoint-4")
    edit(checkpoint)
    trainer, before, damaged = build(), contents(finished), contents(checkpoint)
    with pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0
    assert contents(finished) == before and contents(checkpoint) == damaged


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": lambda: tiny_bert(STUDENT_DEPTH, width=8)}, "projection_matrices changed from"),
        ({"model": lambda: tiny_bert(STUDENT_DEPTH + 1)}, "stages changed from"),
        ({"teacher_model": lambda: make_teacher(seed=3)}, r"teacher\.fingerprint changed from"),
        ({"projection": lambda: "rademacher"}, "projection_matrices changed from"),
        ({"divergence": lambda: "reverse_kl"}, "divergence changed from 'forward_kl' to 'reverse_kl'"),
        ({"layer_order": lambda: "together"}, "stages changed from"),
    ],
    ids=["narrower", "deeper", "teacher", "projection", "divergence", "order"],
)
def test_a_checkpoint_of_another_run_is_refused_with_what_changed(build, finished, changes, message):
    trainer = build(**{name: make() for name, make in changes.items()})
    before = contents(finished)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=os.path.join(finished, "checkpoint-4"))
    assert trainer.state.global_step == 0 and contents(finished) == before


def test_there_is_nothing_to_resume_from_where_no_checkpoint_is(build, finished, tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    before = contents(finished)
    for wrong in (tmp_path / "none", tmp_path / "file", tmp_path / "folder", "yes"):
        with pytest.raises(OSError, match=r"has no curriculum\.json, so it is no checkpoint of a distillation run"):
            build().train(resume_from_checkpoint=wrong)
    assert contents(finished) == before


# ---- options of the recipes ----


@pytest.fixture(scope="module")
def recipes():
    """The dataclasses of each recipe's options."""
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        modules = {
            name: importlib.import_module(name)
            for name in ("bert_large", "image_classification", "pcfg", "sparse_parity")
        }
    finally:
        sys.path.remove(str(ROOT / "recipes"))
    return {name: [module.RecipeArguments, module.TrainingConfig] for name, module in modules.items()}


WRONG_YAML = {
    "an int that is a fraction": ("bert_large", "max_steps: 1.5", "sets max_steps to 1.5, but it must be of type int"),
    "an int that is a truth": ("bert_large", "max_steps: yes", "sets max_steps to True, but it must be of type int"),
    "an int that is a word": (
        "bert_large",
        "max_steps: ten",
        "argument --max_steps/--max-steps: invalid int value: 'ten'",
    ),
    "an int that is a list": ("pcfg", "num_layers: [4]", "sets num_layers to [4], but it must be of type int"),
    "an int that is nothing": ("pcfg", "num_layers:", "sets num_layers to None, but it must be of type int"),
    "a float that is a list": ("bert_large", "dropout: [0.1]", "sets dropout to [0.1], but it must be of type float"),
    "a float that is a word": ("bert_large", "dropout: little", "argument --dropout: invalid float value: 'little'"),
    "a text that is a number": ("bert_large", "teacher: 5", "sets teacher to 5, but it must be of type str"),
    "a text that is a mapping": ("pcfg", "teacher: {a: 1}", "sets teacher to {'a': 1}, but it must be of type str"),
    "a truth that is a number": ("bert_large", "streaming: 2", "sets streaming to 2, but it must be of type bool"),
    "a truth that is a word": ("bert_large", "streaming: perhaps", "Truthy value expected: got perhaps"),
    "a list that is a word": ("pcfg", "methods: one_shot", "sets methods to 'one_shot', but it must be of type list[s"),
    "a list that is a number": ("pcfg", "seeds: 3", "sets seeds to 3, but it must be of type list[int]"),
    "a list of words for numbers": ("pcfg", "seeds: [a]", "sets seeds to ['a'], but it must be of type list[int]"),
    "a list of truths for numbers": ("sparse_parity", "support: [true, 2]", "sets support to [True, 2], but it must"),
    "a list in a list": ("sparse_parity", "seeds: [[0]]", "sets seeds to [[0]], but it must be of type list[int]"),
    "stages of a wrong kind": ("pcfg", "stages: [{kl_weigth: 1.0}]", "stages[0] has unknown fields ['kl_weigth']"),
    "a value out of range": ("pcfg", "temperature: -1", "temperature is -1; it must be a number between 0"),
    "a misspelt method": ("pcfg", "method: curiculum", "method is 'curiculum'; use one of 'curriculum'"),
    "a misspelt key of the recipe": ("bert_large", "techer: a", "'techer', which is no option; did you mean teacher?"),
    "a misspelt key of the library": (
        "sparse_parity",
        "temprature: 2.0",
        "sets 'temprature', which is no option; did you mean temperature?",
    ),
    "a misspelt key of Trainer": (
        "pcfg",
        "learningrate: 1.0",
        "sets 'learningrate', which is no option; did you mean learning_rate?",
    ),
    "a key that is a number": ("pcfg", "5: 1", "sets '5', which is no option; see --help"),
    "a list": ("pcfg", "- method: online", "holds a list; write `option: value` lines"),
    "a word": ("pcfg", "online", "holds a str; write `option: value` lines"),
    "nothing": ("pcfg", "", "holds a NoneType; write `option: value` lines"),
    "comments only": ("pcfg", "# nothing", "holds a NoneType; write `option: value` lines"),
    "two documents": ("pcfg", "seeds: [1]\n---\nseeds: [2]", "is not valid YAML"),
    "an object of Python": ("pcfg", "seeds: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    "a tab": ("pcfg", "seeds:\n\t- 1", "is not valid YAML"),
    "bytes": ("pcfg", b"\xff\xfe\x00", "is not valid YAML"),
}


@pytest.mark.parametrize("name", WRONG_YAML)
def test_wrong_yaml_ends_a_recipe_with_status_2_and_a_line_that_says_why(recipes, tmp_path, capsys, name):
    recipe, text, message = WRONG_YAML[name]
    file = tmp_path / "options.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as ended:
        parse_arguments(recipes[recipe], ["--config", str(file), "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_yaml_files_of_the_recipes_are_right(recipes, tmp_path):
    for name, options in recipes.items():
        files = sorted((ROOT / "recipes/configs" / name).glob("*.yaml"))
        assert files
        for file in files:
            parse_arguments(options, ["--config", str(file), "--output_dir", str(tmp_path), "--use_cpu"])


@pytest.mark.parametrize("file", ["none.yaml", "."])
def test_a_config_that_is_no_file_ends_a_recipe(recipes, tmp_path, capsys, file):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(recipes["pcfg"], ["--config", str(tmp_path / file)])
    assert ended.value.code == 2 and re.search("No such file|Is a directory", capsys.readouterr().err)


# ---- hf-curriculum-distill compare ----

WRONG_RESULTS = {
    "a folder": (become_a_folder("results.json"), "has neither results.json"),
    "bytes": (write("results.json", b"\xff\xfe"), "results.json is damaged: .*utf-"),
    "empty": (write("results.json", b""), "results.json is damaged: Expecting value"),
    "null": (write("results.json", b"null"), "results.json is damaged: it holds a NoneType, not a list"),
    "a list of lists": (write("results.json", b"[[]]"), "results.json is damaged: no method, path, finite in"),
}


@pytest.mark.parametrize("name", WRONG_RESULTS)
def test_compare_says_which_file_is_damaged(tmp_path, capsys, name):
    edit, message = WRONG_RESULTS[name]
    (tmp_path / "results.json").write_text("[]")
    edit(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(tmp_path)])
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert contents(tmp_path) == before


# ---- the source ----

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.save", "eval", "exec", "yaml.load", "yaml.unsafe_load", "np.load", "numpy.load"}


def unsafe_lines(source):
    """The lines that could run what a file brings."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            # the exception alone, to catch it
            unsafe = node.module in UNSAFE_MODULES and [alias.name for alias in node.names] != ["UnpicklingError"]
        elif isinstance(node, ast.Import):
            unsafe = any(alias.name in UNSAFE_MODULES for alias in node.names)
        elif isinstance(node, ast.Call):
            unsafe = ast.unparse(node.func) in UNSAFE_CALLS or any(
                keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
                for keyword in node.keywords
            )
        elif isinstance(node, ast.Dict):
            unsafe = any(
                key is not None and ast.unparse(key) == "'trust_remote_code'" and ast.unparse(value) != "False"
                for key, value in zip(node.keys, node.values, strict=True)
            )
        else:
            continue
        if unsafe:
            yield node.lineno


def test_nothing_of_ours_unpickles_or_trusts_remote_code():
    files = [*(ROOT / "hf_curriculum_distill").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert len(files) > 20
    assert {file.name: lines for file in files if (lines := list(unsafe_lines(file.read_text(encoding="utf-8"))))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads, UnpicklingError",
        "torch.load(path)",
        "yaml.load(file)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=args.trust)",
        "kwargs = {'trust_remote_code': True}",
    ],
)
def test_the_scan_sees_what_it_looks_for(source):
    assert list(unsafe_lines(f"def load(path):\n    {source}\n")) == [2]


# ---- batches, by the step they were for ----


@pytest.mark.parametrize("name", WRONG_DATA)
def test_calibration_refuses_what_training_would(build, finished, examples, name):
    edit, message = WRONG_DATA[name]
    trainer, before = build(train_dataset=edit(examples[:16])), contents(finished)
    with pytest.raises(
        ValueError, match=f"The batch of the calibration sample cannot be used: .*{message}|keys expected"
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.projection_bank.frozen
    assert contents(finished) == before


BROKEN_DATA = {
    "texts of different lengths": (
        lambda: [e for n in (12, 10, 8) for e in masked_lm_examples(8, length=n)],
        "equal size",
    ),
    "nothing": (lambda: [None] * 24, "__dict__"),
    "numbers": (lambda: list(range(24)), "__dict__"),
}


@pytest.mark.parametrize(
    "method, where", [("curriculum", "the calibration sample"), ("one_shot", r"step 1 \(stage 1 of 1, kl\)")]
)
@pytest.mark.parametrize("name", BROKEN_DATA)
def test_what_cannot_be_collated_is_said_with_where_it_was(build, name, method, where):
    make, message = BROKEN_DATA[name]
    trainer = build(train_dataset=make(), method=method, per_device_train_batch_size=24)
    with pytest.raises(ValueError, match=f"The batch of {where} cannot be used: .*{message}"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "step, stage", [(2, "stage 1 of 3, layer 1"), (4, "stage 2 of 3, layer 2"), (7, "stage 3 of 3, kl")]
)
def test_a_wrong_batch_in_the_middle_is_named_by_its_stage_and_step(build, examples, step, stage):
    wrong = WRONG_DATA["fewer labels than tokens"][0](examples[:4])
    data = Stream(examples[: 4 * (step - 1)] + wrong + examples[:40])
    trainer = build(train_dataset=data, calibration_samples=4)
    with pytest.raises(
        ValueError, match=re.escape(f"The batch of step {step} ({stage}) cannot be used: labels have shape")
    ):
        trainer.train()
    assert trainer.state.global_step == step - 1


def test_a_dataset_without_any_label_that_counts_is_refused_where_labels_say_what_is_learnt(build, examples):
    data = labels_become(-100)(examples)
    trainer = build(train_dataset=data)
    for _ in range(2):  # the second attempt is refused as the first
        with pytest.raises(ValueError, match="In the whole calibration sample no label counts"):
            trainer.train()
    build(train_dataset=data, stages=[{"hidden": [[1, 2]]}]).train()
    build(train_dataset=data[:3] + examples[:1]).train()


@pytest.mark.parametrize("name", ["a label of -1", "a token below 0", "no tokens"])
def test_an_evaluation_set_is_checked_as_training_data_is(build, examples, name):
    edit, message = WRONG_DATA[name]
    trainer = build(eval_dataset=edit(examples[:8]))
    with pytest.raises(ValueError, match=f"The batch of the evaluation cannot be used: {message}"):
        trainer.evaluate()


# ---- the rest ----


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train_dataset": masked_lm_examples(3), "dataloader_drop_last": True},
            "3 examples, fewer than a batch of all pro",
        ),
        ({"projection_bank": "folder"}, "projection_bank is a str; pass a ProjectionBank"),
        ({"projection_bank": {}}, "projection_bank is a dict; pass a ProjectionBank"),
        ({"label_names": ["tags"]}, r"label_names is \['tags'\], but losses are computed from 'labels'"),
        ({"model": "bert-base-uncased"}, "model is a str; pass the student as a PreTrainedModel"),
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear; pass the student as a PreTrainedModel"),
        ({"teacher_model": tiny_bert(0), "method": "one_shot"}, "num_hidden_layers=0 blocks"),
        ({"model": tiny_bert(0), "method": "one_shot"}, "num_hidden_layers=0 blocks"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_at_construction(refused, changes, message):
    refused(message, **changes)


DAMAGED_STATES = {
    "weights of garbage": (other_bytes(WEIGHTS), OSError, r"checkpoint-4 cannot be resumed from: SafetensorError"),
    "an optimizer of garbage": (other_bytes("optimizer.pt"), OSError, r"checkpoint-4 cannot be resumed from: "),
    "no weights": (remove(WEIGHTS), OSError, f"checkpoint-4 is not whole: {WEIGHTS} is missing"),
    "weights cut": (cut(WEIGHTS), ValueError, f"checkpoint-4 is not whole: {WEIGHTS} has "),
    "an optimizer cut": (cut("optimizer.pt"), ValueError, "checkpoint-4 is not whole: optimizer.pt has "),
    "no optimizer": (remove("optimizer.pt"), OSError, "checkpoint-4 is not whole: optimizer.pt is missing"),
    "no schedule": (remove("scheduler.pt"), OSError, "checkpoint-4 is not whole: scheduler.pt is missing"),
    "a state of garbage": (write("trainer_state.json", b"{"), ValueError, "trainer_state.json is not readable"),
    "no state": (remove("trainer_state.json"), ValueError, "trainer_state.json is not readable"),
    "another model's weights": (
        lambda folder: (folder / WEIGHTS).write_bytes(as_long_as(folder / WEIGHTS)),
        OSError,
        "checkpoint-4 cannot be resumed from: .*size mismatch",
    ),
}


def as_long_as(path):
    """The same tensors but one, whose shape is another: a file of the same size."""
    tensors = load_file(path)
    tensors[BIAS] = tensors[BIAS][None]
    save_file(tensors, path.with_name("other"), metadata={"format": "pt"})
    size, other = path.stat().st_size, path.with_name("other").read_bytes()
    path.with_name("other").unlink()
    header = int.from_bytes(other[:8], "little")
    spaces = size - len(other)  # safetensors allows them after the header
    return (header + spaces).to_bytes(8, "little") + other[8 : 8 + header] + b" " * spaces + other[8 + header :]


@pytest.mark.parametrize("name", DAMAGED_STATES)
def test_a_checkpoint_whose_state_is_damaged_is_refused_by_its_name(build, finished, tmp_path, name):
    edit, error, message = DAMAGED_STATES[name]
    checkpoint = shutil.copytree(os.path.join(finished, "checkpoint-4"), tmp_path / "checkpoint-4")
    edit(checkpoint)
    trainer, before = build(), contents(finished)
    with pytest.raises(error, match=f"(?s){message}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step in (0, 4) and contents(finished) == before


@pytest.mark.parametrize("key", ["step", "stages", "settings"])
def test_a_record_that_lacks_something_is_refused(build, finished, tmp_path, key):
    checkpoint = shutil.copytree(os.path.join(finished, "checkpoint-4"), tmp_path / "checkpoint-4")
    record = json.loads((checkpoint / "curriculum.json").read_text())
    (checkpoint / "curriculum.json").write_text(json.dumps({name: v for name, v in record.items() if name != key}))
    with pytest.raises(ValueError, match=rf"curriculum\.json is not a readable run record: '{key}' is missing"):
        build().train(resume_from_checkpoint=str(checkpoint))
