"""Adapters: PEFT's wrapper changes what is trained and what is saved, nothing else. Needs peft."""

import os

import pytest
import torch
from conftest import assert_same_weights, masked_lm_examples, tiny_bert, weights
from test_trainer import TASKS, step_logs, task_data, train
from transformers import LlamaConfig, LlamaForCausalLM

from hf_curriculum_distill import CurriculumDistillationTrainer

peft = pytest.importorskip("peft", reason="peft is not installed")

# a task of test_trainer, and PEFT's type for it, which chooses the class of the wrapper
ADAPTED = [
    ("masked-lm", None),
    ("causal-lm", "CAUSAL_LM"),
    ("causal-lm", None),
    ("sequence-classification", "SEQ_CLS"),
    ("token-classification", "TOKEN_CLS"),
    ("seq2seq-t5", "SEQ_2_SEQ_LM"),
    ("image-classification", None),
    ("audio-classification", None),
]
STAGES = [{"hidden": [[1, 2]], "until": 1}, {"hidden": [[2, 4]], "kl_weight": 1.0, "label_weight": 0.5}]


def with_lora(model, seed=0, **fields):
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": "all-linear"} | fields))


def llama(depth, seed=1):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=depth, initializer_range=0.2, **sizes))


def adapters(model):
    return {name: tensor for name, tensor in weights(model).items() if "lora_" in name}


TIMES = ("runtime", "per_second", "train_loss")


def numbers(trainer, but=(*TIMES, "grad_norm", "flops", "flos", "stage_name")):
    return [{n: v for n, v in log.items() if not n.endswith(but)} for log in trainer.state.log_history]


@pytest.mark.parametrize("task, task_type", ADAPTED)
def test_adapters_that_add_nothing_yet_change_no_loss_and_no_metric(config, task, task_type):
    build, data = TASKS[task][0], task_data(task, 8)
    args = config(stages=STAGES, learning_rate=0.0, eval_strategy="steps", eval_steps=2, max_steps=2)
    runs = []
    whole = {"exclude_modules": ["classifier"]} if task_type == "TOKEN_CLS" else {}  # PEFT saves it as a whole
    for student in (build(2, 1), with_lora(build(2, 1), task_type=task_type, **whole)):
        runs.append(numbers(train(student, build(4, 2), args, data, eval_dataset=data)))
    assert len(runs[0]) > 3
    for plain, adapted in zip(*runs, strict=True):
        assert adapted == pytest.approx(plain, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("chunk_size", [0, 3])
def test_a_stage_trains_the_adapters_of_its_blocks_and_no_weight_of_the_model(config, chunk_size):
    student, data = with_lora(llama(2), target_modules=["q_proj", "lm_head"]), task_data("causal-lm", 8)
    before, trained = weights(student), []

    def note(trainer):
        now = weights(student)
        trained.append({name for name, tensor in now.items() if not torch.equal(tensor, before[name])})

    args = config(stages=[{"hidden": [[1, 2]], "until": 2}, {"kl_weight": 1.0}], logit_chunk_size=chunk_size)
    for steps in (2, 4):
        note(
            train(
                student, llama(4, 2), args if steps == 4 else config(stages=[{"hidden": [[1, 2]]}], max_steps=2), data
            )
        )
    assert all("lora_" in name for names in trained for name in names)
    assert {name.split(".layers.")[-1][0] for name in trained[0]} == {"0"}
    assert {"lm_head" in name for name in trained[1]} == {True, False}
    assert any(".layers.1." in name for name in trained[1])


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by object"])
def test_a_resumed_run_is_one_that_was_never_interrupted(config, tmp_path, named):
    teacher, data = llama(4, 2), task_data("causal-lm", 16)
    if named:
        teacher.save_pretrained(tmp_path / "teacher")
    fields = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}

    def run(resume_from=None, base=1):
        trainer = CurriculumDistillationTrainer(
            with_lora(llama(2, base), target_modules=["q_proj"], lora_dropout=0.1, modules_to_save=["lm_head"]),
            config(stages=STAGES, **fields),
            train_dataset=data,
            eval_dataset=data[:4],
            teacher_model=tmp_path / "teacher" if named else teacher,
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    expected = run()
    for step in (3, 1):
        checkpoint = os.path.join(expected.args.output_dir, f"checkpoint-{step}")
        resumed = run(checkpoint)
        assert_same_weights(weights(resumed.model), weights(expected.model))
        assert numbers(resumed, TIMES) == numbers(expected, TIMES)
    with pytest.raises(ValueError, match=r"base_model changed from '\w+' to '\w+'"):
        run(checkpoint, base=7)


def test_a_checkpoint_holds_the_adapters_alone_and_loads_into_the_model_that_they_were_trained_with(config):
    data = task_data("causal-lm", 8)
    trainer = train(with_lora(llama(2), target_modules=["q_proj"]), llama(4, 2), config(save_strategy="steps"), data)
    trainer.save_model()
    folder = trainer.args.output_dir
    assert {"adapter_model.safetensors", "adapter_config.json", "projection_bank.safetensors"} <= set(
        os.listdir(folder)
    )
    assert not {"model.safetensors", "pytorch_model.bin"} & set(os.listdir(folder))
    loaded = peft.PeftModel.from_pretrained(llama(2), folder)
    assert any(tensor.abs().max() > 0 for name, tensor in adapters(loaded).items() if "lora_B" in name)
    assert_same_weights(adapters(loaded), adapters(trainer.model))


def test_a_trained_student_is_merged_into_a_plain_model_that_computes_the_same(config, tmp_path):
    data = task_data("causal-lm", 8)
    fields = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    fields |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_kl", "greater_is_better": False}
    student = with_lora(llama(2), target_modules="all-linear")
    trainer = train(student, llama(4, 2), config(stages=STAGES, **fields), data, eval_dataset=data[:4])
    best = peft.PeftModel.from_pretrained(llama(2), trainer.state.best_model_checkpoint)
    assert_same_weights(adapters(best), adapters(trainer.model))
    evaluated = trainer.evaluate()
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, info = LlamaForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    plain = CurriculumDistillationTrainer(
        merged, config("plain"), train_dataset=data, eval_dataset=data[:4], teacher_model=llama(4, 2)
    ).evaluate()
    for name in ("eval_loss", "eval_kl", "eval_accuracy"):
        assert plain[name] == pytest.approx(evaluated[name], rel=1e-5)


def test_a_teacher_teaches_with_its_adapters(config, tmp_path):
    data, fields = task_data("causal-lm", 8), {"stages": STAGES, "learning_rate": 1e-2, "max_steps": 3}
    llama(4, 2).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = with_lora(base, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted.save_pretrained(tmp_path / "adapters")  # which name the model that they belong to
    by_object, by_name = (
        train(llama(2), teacher, config(**fields), data) for teacher in (adapted, str(tmp_path / "adapters"))
    )
    assert numbers(by_object) == numbers(by_name)
    merged = train(llama(2), adapted.merge_and_unload(), config(**fields), data)
    for one, other in zip(numbers(by_object), numbers(merged), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    plain = train(llama(2), llama(4, 2), config(**fields), data)
    assert abs(step_logs(plain)[1]["kl"] - step_logs(merged)[1]["kl"]) > 1e-3


LLAMA = {"task_type": "CAUSAL_LM"}


@pytest.mark.parametrize(
    "adapter, message",
    [
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **LLAMA), "adapter PROMPT_TUNING puts a prompt before"),
        (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **LLAMA), "adapter PREFIX_TUNING puts a prompt before"),
        (
            lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, **LLAMA),
            "ADAPTION_PROMPT calls the model",
        ),
        (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=8, **LLAMA), "ADALORA adds a term to the"),
    ],
    ids=["prompt", "prefix", "adaption prompt", "AdaLoRA"],
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_adapters_that_change_what_hidden_states_or_losses_are_are_refused(config, adapter, message, who):
    models = {"student": llama(2), "teacher": llama(4, 2)}
    models[who] = peft.get_peft_model(models[who], adapter())
    with pytest.raises(ValueError, match=f"{message}.*; use one inside of layers, like LoRA"):
        train(models["student"], models["teacher"], config(), task_data("causal-lm", 4))


def test_what_peft_cannot_save_is_refused(config):
    mixed = peft.get_peft_model(llama(2), peft.LoraConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match="PEFT does not save a PeftMixedModel"):
        train(mixed, llama(4, 2), config(), task_data("causal-lm", 4))
    adapted = with_lora(tiny_bert(4))
    with pytest.raises(ValueError, match=r"an online teacher is saved .* pass its merge_and_unload\(\)"):
        train(tiny_bert(2), adapted, config(method="online"), masked_lm_examples(4))
