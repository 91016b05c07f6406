import pytest
import torch
from conftest import tiny_bert
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_curriculum_distill import CurriculumDistillationTrainer

from .plans import Watch, examples_for, peak_bytes, planned


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
            measured.setdefault(self.state.global_step, []).append((before, peak_bytes(record)))
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
