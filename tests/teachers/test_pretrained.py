"""Teachers are loaded with the arguments that the config has for it, from whole models, adapters and GGUF files."""

import os
import shutil

import pytest
import torch
from conftest import assert_same_weights, masked_lm_examples, tiny_bert, weights
from safetensors.torch import load_file, save_file
from test_peft import llama, numbers, with_lora
from test_trainer import TASKS, task_data, train
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from hf_curriculum_distill import CurriculumDistillationTrainer
from hf_curriculum_distill.teachers.loading import load_teacher
from hf_curriculum_distill.teachers.teacher import has_head

HIDDEN_ONLY = [{"hidden": [[1, 2]], "until": 2}, {"hidden": [[2, 4]]}]


@pytest.fixture
def folder(tmp_path, teacher):
    teacher.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def make(student, teacher, args, data, **kwargs):
    return CurriculumDistillationTrainer(student, args, train_dataset=data, teacher_model=teacher, **kwargs)


# ---- arguments of from_pretrained ----


def test_the_teacher_alone_is_loaded_with_them(config, student, folder, examples):
    given = {"dtype": "bfloat16", "attn_implementation": "eager", "device_map": "cpu"}
    trainer = train(student, folder, config(teacher_model_init_kwargs=given, max_steps=4), examples)
    teacher = trainer.teacher.model
    assert (teacher.dtype, teacher.config._attn_implementation) == (torch.bfloat16, "eager")
    assert (student.dtype, student.config._attn_implementation) == (torch.float32, "sdpa")
    trainer.args.teacher_model_init_kwargs = None
    with pytest.raises(ValueError, match=r"another teacher\. Make a new trainer"):
        trainer.train()


def test_a_revision_is_the_one_that_is_loaded(config, student, folder, tmp_path):
    repository = tmp_path / "hub/models--org--teacher"
    for number, name in enumerate(["main", "v1"]):
        commit = str(number) * 40
        tiny_bert(4, width=24, seed=number).save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    fields = {"teacher_model_init_kwargs": {"revision": "v1", "cache_dir": str(tmp_path / "hub")}}
    trainer = make(student, "org/teacher", config(**fields), masked_lm_examples(8))
    assert trainer.teacher.revision == "1" * 40
    assert_same_weights(weights(trainer.teacher.model), weights(tiny_bert(4, width=24, seed=1)))


REFUSED = {
    "an argument that nothing takes": ({"bogus": 1}, "cannot be loaded as the student's AutoModelForMaskedLM: .*bogus"),
    "an attention that is not there": ({"attn_implementation": "none_such"}, "none_such"),
    "several devices": (
        {"device_map": {"bert.embeddings": "cpu", "bert.encoder": "disk", "cls": "cpu"}},
        "device_map spreads it over cpu, disk, but each process runs its teacher as a whole, on cpu; load it onto one",
    ),
    "a disk": ({"device_map": {"": "disk"}}, "The teacher's device_map spreads it over disk, but each process"),
}


@pytest.mark.parametrize("given, message", REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_had_is_refused_by_name(config, student, folder, examples, tmp_path, given, message):
    given = given | ({"offload_folder": str(tmp_path / "offload")} if "device_map" in given else {})
    with pytest.raises(ValueError, match=message):
        make(student, folder, config(teacher_model_init_kwargs=given), examples)


def test_a_model_that_is_loaded_already_takes_none(config, student, teacher, examples):
    with pytest.raises(ValueError, match=r"teacher_model is a BertForMaskedLM that is loaded already; pass its name"):
        make(student, teacher, config(teacher_model_init_kwargs={"dtype": "bfloat16"}), examples)


def test_a_teacher_is_read_from_a_gguf_file(config, tmp_path):
    gguf = pytest.importorskip("gguf")
    from test_causal_lm_recipe import byte_tokenizer, write_gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(eos_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    kind = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    saved, student = LlamaForCausalLM(kind), LlamaForCausalLM(kind)
    write_gguf(gguf, tmp_path / "teacher.gguf", saved, tokenizer)
    data = task_data("causal-lm", 4)
    args = config(teacher_model_init_kwargs={"gguf_file": "teacher.gguf"}, max_steps=4)
    read = train(student, tmp_path, args, data).teacher.model
    assert_same_weights(weights(read), weights(saved), rtol=0, atol=1e-6)


def test_there_is_one_sentence_where_there_is_no_teacher(config, student, examples, tmp_path):
    with pytest.raises(OSError, match=r"^The teacher '\S+/none' cannot be loaded: ") as error:
        make(student, tmp_path / "none", config(), examples)
    assert len(str(error.value).splitlines()) == 1


# ---- adapters ----


@pytest.fixture
def adapted(tmp_path):
    """A classifier's adapters, on a base that has no head."""
    pytest.importorskip("peft")
    tiny_bert(4, seed=2, model_class=BertModel, initializer_range=0.3).save_pretrained(tmp_path / "base")
    whole = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    made = with_lora(whole, task_type="SEQ_CLS", target_modules=["query", "value"], init_lora_weights=False)
    made.save_pretrained(tmp_path / "adapters")
    return made, str(tmp_path / "adapters")


def test_adapters_are_a_teacher_by_name_with_the_head_that_was_trained_with_them(config, adapted):
    build, data = TASKS["sequence-classification"][0], task_data("sequence-classification", 8)
    runs = [numbers(train(build(2, 1), teacher, config(max_steps=4), data)) for teacher in adapted]
    assert len(runs[0]) > 3 and runs[0] == runs[1]


def test_a_head_that_neither_base_nor_adapters_have_is_refused(adapted, tmp_path):
    folder = adapted[1]
    with pytest.raises(ValueError, match=r"has no weights for cls\.\S+,.*would be random"):
        load_teacher(folder, tiny_bert(1))
    file = os.path.join(folder, "adapter_model.safetensors")
    saved = load_file(file)
    student = tiny_bert(1, model_class=BertForSequenceClassification, num_labels=3)
    for lost in ("classifier.weight", "lora_B.weight"):
        save_file({name: tensor for name, tensor in saved.items() if not name.endswith(lost)}, file)
        with pytest.raises(ValueError, match=rf"ha\w+ no weights for \S*{lost}"):
            load_teacher(folder, student)
    save_file(saved, file)
    student = tiny_bert(1, model_class=BertForSequenceClassification, num_labels=5)
    with pytest.raises(ValueError, match=r"size mismatch for \S*classifier.* torch.Size\(\[3"):
        load_teacher(folder, student)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(OSError, match=r"The teacher '\S+/adapters' cannot be loaded: .*base"):
        load_teacher(folder, student)


# ---- teachers without a head ----


def test_hidden_states_need_no_head(config, student, examples, tmp_path):
    body = tiny_bert(4, width=24, seed=2, model_class=BertModel, initializer_range=0.3)
    body.save_pretrained(tmp_path / "body")
    runs = []
    for teacher in (body, tmp_path / "body"):
        args = config(stages=HIDDEN_ONLY, max_steps=4, eval_strategy="steps", eval_steps=2)
        trainer = train(tiny_bert(2, seed=1), teacher, args, examples, eval_dataset=examples[:4])
        runs.append(numbers(trainer))
    assert runs[0] == runs[1]
    evaluated = {name for log in runs[0] for name in log if name.startswith("eval")}
    assert {"eval_loss", "eval_accuracy"} <= evaluated and not {"eval_kl", "eval_agreement"} & evaluated
    trainer.args.stages = [*HIDDEN_ONLY, {"kl_weight": 1.0}]
    trainer.args.stages[1] = trainer.args.stages[1] | {"until": 3}
    with pytest.raises(ValueError, match="BertModel, which has no head, but stage 'kl' needs its logits"):
        trainer.train()
    for fields in ({}, {"stages": [{"kl_weight": 1.0}]}, {"method": "online", "stages": HIDDEN_ONLY}):
        with pytest.raises(ValueError, match=r"has no weights for cls\.|standardize_targets"):
            make(tiny_bert(2, seed=1), tmp_path / "body", config(**fields), examples)


def test_what_runs_after_the_blocks_may_be_missing_and_is_always_the_same(folder):
    student = tiny_bert(2, model_class=BertForSequenceClassification)
    first, second = (load_teacher(folder, student, needs_head=False) for _ in range(2))
    assert not has_head(first) and not first.pooler.dense.weight.any()
    assert_same_weights(weights(first), weights(second))
    assert torch.equal(
        first.embeddings.word_embeddings.weight,
        load_file(f"{folder}/model.safetensors")["bert.embeddings.word_embeddings.weight"],
    )


def test_a_block_may_not_be_missing(folder):
    file = os.path.join(folder, "model.safetensors")
    lost = "bert.encoder.layer.1.output.dense.weight"
    save_file({n: t for n, t in load_file(file).items() if n != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no weights for encoder\.layer\.1\.output\.dense\.weight"):
        load_teacher(folder, tiny_bert(2), needs_head=False)
    assert isinstance(load_teacher(tiny_saved(folder), tiny_bert(2), needs_head=False), BertForMaskedLM)


def tiny_saved(folder):
    tiny_bert(2).save_pretrained(folder)
    return folder


def test_llama_adapters_name_their_base(config, tmp_path):
    pytest.importorskip("peft")
    llama(4, 2).save_pretrained(tmp_path / "base")
    base = type(llama(1)).from_pretrained(tmp_path / "base")
    with_lora(base, target_modules=["q_proj"], init_lora_weights=False).save_pretrained(tmp_path / "adapters")
    args = config(teacher_model_init_kwargs={"dtype": "bfloat16"}, max_steps=4)
    trainer = train(llama(2), tmp_path / "adapters", args, task_data("causal-lm", 8))
    assert trainer.teacher.model.lm_head.weight.dtype == torch.bfloat16
    assert any("lora" in name for name, _ in trainer.teacher.model.named_parameters())
