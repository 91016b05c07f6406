"""Quantised teachers: packed weights teach as they are. The cases of torchao and bitsandbytes need these."""

import math
from importlib.util import find_spec

import pytest
import torch
from conftest import assert_same_weights, weights
from test_trainer import step_logs, task_data, train
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from hf_curriculum_distill import CurriculumDistillationTrainer, student_from_teacher
from hf_curriculum_distill.layers.adapted import stored_tensors
from hf_curriculum_distill.layers.weights import weights_fingerprint


def _torchao(name):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quant_type=getattr(quantization, name)())


KINDS = {
    "torchao": {
        "int8": lambda: _torchao("Int8WeightOnlyConfig"),
        "int8 activations": lambda: _torchao("Int8DynamicActivationInt8WeightConfig"),
        "float8": lambda: _torchao("Float8WeightOnlyConfig"),
    },
    "bitsandbytes": {
        "8 bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "4 bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    },
}
PACKED = [(library, kind) for library, kinds in KINDS.items() for kind in kinds]
STAGES = [{"hidden": [[1, 2]], "until": 1}, {"hidden": [[2, 4]], "until": 2}, {"kl_weight": 1.0, "label_weight": 0.5}]


def llama(depth, seed=1):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=depth, initializer_range=0.2, **sizes))


@pytest.fixture(scope="module", params=PACKED, ids=" ".join)
def teachers(request, tmp_path_factory):
    """The same teacher: `whole`, and the folder of what a library made of it."""
    library, kind = request.param
    if not find_spec(library):
        pytest.skip(f"{library} is not installed")
    folder = tmp_path_factory.mktemp("quantised")
    llama(4, 2).save_pretrained(folder / "whole")
    load(folder / "whole", quantization_config=KINDS[library][kind]()).save_pretrained(folder / "quantised")
    return load(folder / "whole"), folder / "quantised"


def load(folder, **kwargs):
    return LlamaForCausalLM.from_pretrained(folder, **kwargs)


def losses(trainer):
    return [log["loss"] for log in step_logs(trainer)]


def test_a_quantised_teacher_teaches_nearly_what_the_whole_one_does_and_the_same_named_or_given(config, teachers):
    whole, folder = teachers
    data, args = task_data("causal-lm", 8), config(stages=STAGES, max_steps=4)
    given = load(folder)
    fingerprint = weights_fingerprint(given)
    trainer = train(llama(2), given, args, data, eval_dataset=data)
    assert trainer.evaluate()["eval_kl"] > 0
    assert weights_fingerprint(given) == fingerprint == trainer.teacher.fingerprint
    named = train(llama(2), folder, args, data)
    assert losses(named) == losses(trainer)
    assert named.teacher.fingerprint == fingerprint
    plain = train(llama(2), whole, args, data)
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.03)
    assert losses(trainer) != losses(plain)
    assert plain.teacher.fingerprint != fingerprint


def test_another_teacher_has_another_fingerprint(teachers):
    other = load(teachers[1])
    before = weights_fingerprint(other)
    attention = other.model.layers[0].self_attn
    attention.q_proj, attention.v_proj = attention.v_proj, attention.q_proj  # of one shape
    assert weights_fingerprint(other) != before


def test_a_resumed_run_is_one_that_was_never_interrupted(config, teachers):
    data, fields = task_data("causal-lm", 8), {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}

    def run(resume_from=None):
        trainer = CurriculumDistillationTrainer(
            llama(2), config(stages=STAGES, **fields), train_dataset=data, teacher_model=teachers[1]
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    expected = run()
    resumed = run(f"{expected.args.output_dir}/checkpoint-1")
    assert_same_weights(weights(resumed.model), weights(expected.model))


# torchao takes no gradient through products of rounded activations
@pytest.mark.parametrize(
    "teachers", [kind for kind in PACKED if "activations" not in kind[1]], indirect=True, ids=" ".join
)
def test_a_quantised_student_learns_through_its_adapters(config, teachers):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    student = peft.get_peft_model(load(teachers[1]), lora)
    base = weights_fingerprint(student, leave_out=[n for n, p in student.named_parameters() if p.requires_grad])
    trainer = train(student, llama(4, 3), config(stages=[{"kl_weight": 1.0}]), task_data("causal-lm", 4))
    assert losses(trainer)[-1] < losses(trainer)[0]
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert trained and weights_fingerprint(student, leave_out=trained) == base


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"teacher_dtype": "bfloat16"}, r"for computation in torch\.float32, but teacher_dtype is 'bfloat16'"),
        ({"method": "online"}, "method='online' changes its weights"),
        ({"method": "progressive"}, "method='progressive' changes its weights"),
    ],
)
def test_what_packed_weights_cannot_do_is_refused(config, teachers, fields, message):
    data = task_data("causal-lm", 4)
    given = {} if fields.get("method") == "progressive" else {"given": load(teachers[1])}
    for teacher in (str(teachers[1]), *given.values()):
        with pytest.raises(ValueError, match=rf"The teacher is quantised \(\w+\).* {message}"):
            train(llama(2), teacher, config(**fields), data)


def test_a_quantised_teacher_may_be_loaded_in_the_dtype_that_it_has(config, teachers):
    train(llama(2), load(teachers[1]), config(teacher_dtype="float32", max_steps=3), task_data("causal-lm", 4))


def test_what_can_be_summed_is_checked_for_values_that_are_not_finite(config, teachers):
    teacher = load(teachers[1])
    norm, query = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"
    named = [(n, t) for n, t in stored_tensors(teacher) if t.is_floating_point() and (n == norm or query in n)]
    assert len(named) >= (2 if hasattr(teacher.get_parameter(query), "__tensor_flatten__") else 1)  # with its scale
    for name, tensor in named:
        kept = tensor.clone()
        tensor.fill_(math.nan)
        with pytest.raises(ValueError, match=rf"{name} of the teacher has values that are nan"):
            train(llama(2), teacher, config(), task_data("causal-lm", 4))
        tensor.copy_(kept)


def test_no_student_is_made_of_packed_weights(teachers):
    whole, folder = teachers
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantised, so that a student could not train copies"):
        student_from_teacher(load(folder), 2)
    assert student_from_teacher(whole, 2).config.num_hidden_layers == 2
