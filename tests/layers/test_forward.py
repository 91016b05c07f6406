"""Prefix execution against the plainest reference: the whole model, watched by one hook a block."""

import copy
import functools
import inspect

import numpy as np
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from architectures import ARCHITECTURES, DEPTH, build
from torch import nn
from transformers import BertConfig, BertForPreTraining
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_curriculum_distill.layers.blocks import find_block_stack
from hf_curriculum_distill.layers.forward import PartialForward

LAYERS = range(DEPTH + 1)
TOKEN_LOGITS = [name for name, entry in ARCHITECTURES.items() if "Classification" not in entry[0].__name__]
TOKEN_LOGITS.append("bert-tagger")
CHECKPOINTED = [name for name, entry in ARCHITECTURES.items() if entry[0].supports_gradient_checkpointing]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
every_token_head = pytest.mark.parametrize("name", TOKEN_LOGITS)


def blocks_of(model, block):
    """The blocks by the name of their class, found without the library."""
    root = model.get_encoder() if model.config.is_encoder_decoder else model
    return [module for module in root.modules() if type(module).__name__ == block]


def same_randomness():
    torch.manual_seed(1)
    np.random.seed(1)


def full_forward(model, blocks, batch):
    """Every block's output (0: the first block's input) and the logits, from one forward pass of the whole model."""
    hidden = {}

    def embeddings(module, args, kwargs):
        hidden[0] = args[0] if args else kwargs["hidden_states"]

    def output(number):
        return lambda module, args, out: hidden.__setitem__(number, out if isinstance(out, torch.Tensor) else out[0])

    handles = [blocks[0].register_forward_pre_hook(embeddings, with_kwargs=True)]
    handles += [block.register_forward_hook(output(number)) for number, block in enumerate(blocks, start=1)]
    same_randomness()
    logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    return hidden, logits


def gradients(model, tensor):
    """Gradients of a fixed weighting of `tensor`; clears them afterwards."""
    weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
    (tensor.float() * weights).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


def assert_equal_gradients(actual, expected, **tolerance):
    assert {name for name, grad in actual.items() if grad is None} == {n for n, g in expected.items() if g is None}
    for name, grad in expected.items():
        if grad is not None and tolerance:
            torch.testing.assert_close(actual[name], grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        elif grad is not None:
            assert torch.equal(actual[name], grad), name


def called_blocks(blocks, run):
    """Numbers of the blocks whose `forward` ran, in order, and what `run` returned."""
    called = []

    def counting(number, forward):
        @functools.wraps(forward)
        def counted(*args, **kwargs):
            called.append(number)
            return forward(*args, **kwargs)

        return counted

    for number, block in enumerate(blocks, start=1):
        block.forward = counting(number, block.forward)
    result = run()
    for block in blocks:
        del block.forward
    return called, result


def albert(groups):
    """ALBERT of 5 layers in `groups` groups, a batch, and the list that its blocks' input and outputs go to."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 5}
    config = hf.AlbertConfig(vocab_size=50, num_hidden_groups=groups, inner_group_num=2, **sizes)
    model, ran = hf.AlbertForMaskedLM(config), []
    blocks = model.albert.encoder.albert_layer_groups
    blocks[0].register_forward_pre_hook(lambda _, args: None if ran else ran.append(args[0]))
    for block in blocks:
        block.register_forward_hook(lambda _, args, output: ran.append(output))
    return model, {"input_ids": torch.randint(0, 50, (2, 8))}, ran


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("layer", range(6))
def test_a_block_that_runs_for_many_layers_is_all_of_them(groups, layer):
    model, batch, ran = albert(groups)
    _, expected_logits = full = PartialForward(model)(model, batch, range(6), logits=True)
    assert len(ran) == 6
    assert all(torch.equal(full[0][number], output) for number, output in enumerate(ran))
    assert torch.equal(model(**batch).logits.flatten(0, -2), expected_logits)
    expected = gradients(model, full[0][layer])

    ran.clear()
    hidden, _ = PartialForward(model)(model, batch, [layer])
    assert len(ran) == 1 + layer  # the embeddings, then one call a layer
    assert torch.equal(hidden[layer], full[0][layer])
    assert_equal_gradients(gradients(model, hidden[layer]), expected)


def test_layers_of_one_block_are_not_frozen_apart():
    model, _, _ = albert(groups=2)
    PartialForward(model).check_training(freezes=False)
    with pytest.raises(ValueError, match=r"AlbertForMaskedLM runs one block for many layers.*leave out freeze_matched"):
        PartialForward(model).check_training(freezes=True)
    PartialForward(build("bert")[0]).check_training(freezes=True)


@pytest.mark.parametrize("name, knob", [("wav2vec2", "layerdrop"), ("opt", "layerdrop"), ("bart", "encoder_layerdrop")])
def test_blocks_that_training_leaves_out_are_refused(name, knob):
    model, _, _ = build(name)
    PartialForward(model).check_training(freezes=False)
    setattr(model.config, knob, 0.1)
    with pytest.raises(ValueError, match=f"The student's {knob} is 0.1.*load it with {knob}=0.0"):
        PartialForward(model).check_training(freezes=False)


@pytest.mark.parametrize("layers", [[1], [1, 3], [2]])
def test_a_block_that_did_not_run_is_an_error_not_another_layers_states(layers):
    model, _, batch = build("wav2vec2")
    partial, stack = PartialForward(model), model.wav2vec2.encoder.layers
    model.wav2vec2.encoder.layers = nn.ModuleList([b for i, b in enumerate(stack, start=1) if i != layers[0]])
    with pytest.raises(ValueError, match=rf"did not call blocks \[{layers[0]}\]"):
        partial(model, batch, layers)


def test_a_model_that_calls_its_blocks_past_every_hook_is_refused():
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 1)
    model = hf.SqueezeBertForMaskedLM(hf.SqueezeBertConfig(vocab_size=50, intermediate_size=16, **sizes, **groups))
    with pytest.raises(ValueError, match=r"SqueezeBertForMaskedLM did not call blocks \[1, 2\].* as a module"):
        PartialForward(model)(model, {"input_ids": torch.randint(0, 50, (2, 8))}, [1, 2])


@every_architecture
@pytest.mark.parametrize("layer", LAYERS)
def test_truncated_forward_is_the_full_forward(name, layer):
    model, block, batch = build(name)
    blocks = blocks_of(model, block)
    hidden, _ = full_forward(model, blocks, batch)
    full_gradients = gradients(model, hidden[layer])
    partial = PartialForward(model)

    same_randomness()
    called, (truncated, logits) = called_blocks(blocks, lambda: partial(model, batch, [layer]))

    assert called == list(range(1, layer + 1))
    assert logits is None
    assert torch.equal(truncated[layer], hidden[layer])
    truncated_gradients = gradients(model, truncated[layer])
    assert_equal_gradients(truncated_gradients, full_gradients)
    for number, trained in enumerate(blocks, start=1):
        ids = {id(parameter) for parameter in trained.parameters()}
        grads = [truncated_gradients[n] for n, parameter in model.named_parameters() if id(parameter) in ids]
        assert any(grad is not None for grad in grads) == (number <= layer)


@every_architecture
def test_hidden_states_and_logits_of_one_pass_are_those_of_the_model(name):
    model, block, batch = build(name)
    expected_hidden, expected_logits = full_forward(model, blocks_of(model, block), batch)
    same_randomness()
    hidden, logits = PartialForward(model)(model, batch, LAYERS, logits=True)
    assert hidden.keys() == set(LAYERS)
    assert all(torch.equal(hidden[layer], expected_hidden[layer]) for layer in LAYERS)
    assert torch.equal(logits, expected_logits.flatten(0, -2))


@every_architecture
def test_without_truncation_every_block_runs_and_nothing_else_changes(name):
    model, block, batch = build(name)
    blocks, partial = blocks_of(model, block), PartialForward(model)
    same_randomness()
    truncated, _ = partial(model, batch, [1])
    same_randomness()
    called, (whole, logits) = called_blocks(blocks, lambda: partial(model, batch, [1], truncate=False))
    assert called == list(range(1, DEPTH + 1))
    assert logits is None
    assert torch.equal(whole[1], truncated[1])
    assert_equal_gradients(gradients(model, whole[1]), gradients(model, truncated[1]))


@every_token_head
@pytest.mark.parametrize("rows", [[1, 3, 4, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [9], []], ids=len)
def test_rows_first_is_rows_last(name, rows):
    model, block, batch = build(name)
    rows = torch.tensor(rows, dtype=torch.long)
    _, logits = full_forward(model, blocks_of(model, block), batch)
    last = logits.flatten(0, 1)[rows]
    last_gradients = gradients(model, last)

    same_randomness()
    _, first = PartialForward(model)(model, batch, logits=True, rows=rows, gather=True)

    assert first.shape == last.shape
    torch.testing.assert_close(first, last, rtol=1e-4, atol=1e-6)
    assert_equal_gradients(gradients(model, first), last_gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["bert-classifier", "bert-tagger", "llama-classifier", "vit", "wav2vec2"])
def test_rows_picked_behind_the_head_are_the_full_logits_rows(name):
    model, block, batch = build(name)
    _, logits = full_forward(model, blocks_of(model, block), batch)
    same_randomness()
    _, rows = PartialForward(model)(model, batch, logits=True, rows=torch.tensor([1]), gather=False)
    assert torch.equal(rows, logits.flatten(0, -2)[[1]])


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "gpt2", "opt", "llama", "t5", "bart"])
def test_the_head_runs_on_the_chosen_rows_only(name):
    model, _, batch = build(name)
    shapes = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    PartialForward(model)(model, batch, logits=True, rows=torch.tensor([2, 5, 6]), gather=True)
    assert shapes == [(1, 3, 32)]


@every_architecture
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_blocks_change_no_value_and_get_no_gradient(name, frozen):
    model, block, batch = build(name)
    blocks, partial = blocks_of(model, block), PartialForward(model)
    same_randomness()
    free, _ = partial(model, batch, [DEPTH])
    free_gradients = gradients(model, free[DEPTH])
    same_randomness()
    hidden, _ = partial(model, batch, [DEPTH], frozen=frozen)
    assert torch.is_grad_enabled()
    assert torch.equal(hidden[DEPTH], free[DEPTH])

    frozen_gradients = gradients(model, hidden[DEPTH])
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    number_of = {id(p): number for number, b in enumerate(blocks, start=1) for p in b.parameters()}
    for parameter_name, parameter in model.named_parameters():
        number = number_of.get(id(parameter))
        if number is not None and number > frozen and free_gradients[parameter_name] is not None:
            assert torch.equal(frozen_gradients[parameter_name], free_gradients[parameter_name]), parameter_name
        elif number is not None:
            assert frozen_gradients[parameter_name] is None, parameter_name
    if "input_ids" in batch:
        assert frozen_gradients[names[id(model.get_input_embeddings().weight)]] is None


def blocks_one_at_a_time(model, blocks, batch, substitutes):
    """Outputs of blocks that read the substitutes, where there are some: each block is called by itself."""
    calls = []

    def record(_, args, kwargs):
        detached = [v.detach() if isinstance(v, torch.Tensor) else v for v in (*args, *kwargs.values())]
        calls.append((detached[: len(args)], dict(zip(kwargs, detached[len(args) :], strict=True))))

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    hidden, _ = full_forward(model, blocks, batch)
    for handle in handles:
        handle.remove()
    first = min(substitutes)
    outputs = {number: hidden[number] for number in range(first + 1)}
    for number in range(first + 1, DEPTH + 1):
        args, kwargs = calls[number - 1]
        states = substitutes.get(number - 1, outputs[number - 1])
        call = ([states, *args[1:]], kwargs) if args else ([], kwargs | {"hidden_states": states})
        output = blocks[number - 1](*call[0], **call[1])
        outputs[number] = output if isinstance(output, torch.Tensor) else output[0]
    return outputs


@pytest.mark.parametrize(
    "name, matched",
    [(name, (1, 3)) for name in ARCHITECTURES]
    + [(name, (0, 2, 3)) for name in ARCHITECTURES if name != "deberta-v2"],  # which convolves between blocks 1 and 2
)
def test_segments_that_read_substitutes_are_blocks_called_one_at_a_time_on_them(name, matched):
    model, block, batch = build(name)
    model.eval()  # blocks that run apart draw other dropouts
    model.config.get_text_config().use_cache = False
    blocks, partial = blocks_of(model, block), PartialForward(model)
    number_of, shape = partial.layer_of_parameters(), full_forward(model, blocks, batch)[0][1].shape
    substitutes = {layer: torch.randn(shape, generator=torch.Generator().manual_seed(layer)) for layer in matched}
    for below, layer in zip((None, *matched), matched, strict=False):
        expected = blocks_one_at_a_time(model, blocks, batch, substitutes)[layer]
        same_randomness()
        actual = partial(model, batch, matched, substitutes=substitutes)[0][layer]
        assert torch.equal(actual, expected)
        if not expected.requires_grad:  # embeddings without parameters
            continue
        trained = gradients(model, actual)
        assert_equal_gradients(trained, gradients(model, expected))
        segment = range(0 if below is None else below + 1, layer + 1)
        assert {number_of[p] for n, p in model.named_parameters() if trained[n] is not None} <= set(segment)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointed_segments_have_the_same_gradients(name):
    model, _, batch = build(name)
    partial = PartialForward(model)
    same_randomness()
    shape = partial(model, batch, [1])[0][1].shape
    substitutes, grads = {1: torch.randn(shape)}, []
    before_5_23 = "__call__" in vars(GradientCheckpointingLayer)
    assert partial.hooks_blocks_in_recomputation == before_5_23, "train_prefix='independent' would be refused, or not"
    if before_5_23:  # which recompute without the hooks, so that the combination is refused for every family
        return
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        same_randomness()
        hidden, _ = partial(model, batch, [1, 3], substitutes=substitutes)
        grads.append(gradients(model, hidden[1] + hidden[3]))
    assert_equal_gradients(*reversed(grads))


def test_parameters_belong_to_their_block_and_all_others_to_none():
    model, _, _ = build("bert")
    layers = PartialForward(model).layer_of_parameters()
    assert {name: layers[parameter] for name, parameter in model.named_parameters()} == {
        name: int(name.split("layer.")[1].split(".")[0]) + 1 if "encoder.layer." in name else 0
        for name, _ in model.named_parameters()
    }


@every_architecture
def test_a_removed_prefix_leaves_no_trace(name):
    model, block, batch = build(name)
    _, expected = full_forward(model, blocks_of(model, block), batch)
    signature, names = inspect.signature(model.forward), set(model.__dict__)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    partial = PartialForward(model)
    partial.install()
    assert inspect.signature(model.forward) == signature
    same_randomness()
    assert torch.equal(model(**batch).logits, expected)  # installed, but not in use
    same_randomness()
    partial(model, batch, [1])
    partial.remove()
    partial.remove()
    assert "forward" not in model.__dict__
    assert set(model.__dict__) == names
    assert model.forward.__func__ is type(model).forward
    assert inspect.signature(model.forward) == signature
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    same_randomness()
    assert torch.equal(model(**batch).logits, expected)


def test_a_failed_call_leaves_the_model_usable():
    model, block, batch = build("bert")
    hidden, logits = full_forward(model, blocks_of(model, block), batch)
    partial = PartialForward(model)
    with pytest.raises(ValueError):
        partial(model, {}, [1], frozen=1)
    assert torch.is_grad_enabled()
    same_randomness()
    assert torch.equal(model(**batch).logits, logits)
    same_randomness()
    assert torch.equal(partial(model, batch, [2])[0][2], hidden[2])


def test_a_copy_of_an_installed_model_runs_its_own_weights():
    model, _, batch = build("bert")
    model.eval()
    partial = PartialForward(model)
    original_logits = model(**batch).logits
    partial(model, batch, [1])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    twin_hidden, _ = PartialForward(twin)(twin, batch, [1])
    assert torch.equal(model(**batch).logits, original_logits)
    partial.remove()
    rebuilt, _, _ = build("bert")
    rebuilt.load_state_dict(twin.state_dict())
    rebuilt.eval()
    assert torch.equal(twin(**batch).logits, rebuilt(**batch).logits)
    assert torch.equal(twin_hidden[1], PartialForward(rebuilt)(rebuilt, batch, [1])[0][1])


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_checkpointed_activations_give_the_same_gradients(name, frozen):
    model, _, batch = build(name)
    partial = PartialForward(model)
    same_randomness()
    plain, _ = partial(model, batch, [2], frozen=frozen)
    plain_gradients = gradients(model, plain[2])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same_randomness()
    checkpointed, _ = partial(model, batch, [2], frozen=frozen)
    assert torch.equal(checkpointed[2], plain[2])
    assert_equal_gradients(gradients(model, checkpointed[2]), plain_gradients)


@every_architecture
def test_autocast_reaches_the_blocks_through_the_wrapper(name):
    model, block, batch = build(name)
    AcceleratorState._reset_state(True)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    AcceleratorState._reset_state(True)
    autocast_forward = prepared.forward
    captured, _ = full_forward(prepared, blocks_of(model, block), batch)
    expected_gradients = gradients(model, captured[2])
    same_randomness()
    partial = PartialForward(model)
    hidden, _ = partial(prepared, batch, [2])
    assert torch.equal(hidden[2], captured[2])
    assert_equal_gradients(gradients(model, hidden[2]), expected_gradients)
    partial.remove()
    assert prepared.forward == autocast_forward


def test_the_wrapper_is_what_runs():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module, self.calls = model, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    model, _, batch = build("gpt2")
    wrapper = Wrapper(model)
    PartialForward(model)(wrapper, batch, [1])
    assert wrapper.calls == 1


def test_a_model_without_one_head_says_which_outputs_it_has():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForPreTraining(BertConfig(vocab_size=20, **sizes))
    inputs = {"input_ids": torch.randint(0, 20, (2, 8))}
    with pytest.raises(ValueError, match="BertForPreTraining returns no logits, only prediction_logits"):
        PartialForward(model)(model, inputs, logits=True)
    hidden, _ = PartialForward(model)(model, inputs, layers=(1,))  # layer stages need no head
    assert hidden[1].shape == (2, 8, 16)


# ---- the decoder's stack ----


DECODER_BLOCKS = {"t5": "T5Block", "bart": "BartDecoderLayer", "whisper": "WhisperDecoderLayer"}


@pytest.mark.parametrize("name, block", [*DECODER_BLOCKS.items(), ("bert-to-bert", "BertLayer")])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_decoders_blocks_are_run_after_the_whole_encoder_and_give_the_models_own_states(name, block, layer):
    model, _, batch = build(name)
    blocks = [module for module in model.get_decoder().modules() if type(module).__name__ == block]
    assert find_block_stack(model, "decoder") == blocks
    hidden, logits = full_forward(model, blocks, batch)
    expected = gradients(model, hidden[layer])
    partial = PartialForward(model, "decoder")
    assert (partial.depth, partial.hidden_size) == (2, 32)
    same_randomness()
    called, (truncated, _) = called_blocks(blocks, lambda: partial(model, batch, [layer]))
    assert called == list(range(1, layer + 1))
    assert torch.equal(truncated[layer], hidden[layer])
    assert_equal_gradients(gradients(model, truncated[layer]), expected)
    same_randomness()
    every, own_logits = partial(model, batch, [layer], logits=True)
    assert torch.equal(every[layer], hidden[layer])
    assert torch.equal(own_logits, logits.flatten(0, -2))


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_frozen_blocks_of_a_decoder_freeze_the_encoder_before_them(name):
    model, _, batch = build(name)
    partial = PartialForward(model, "decoder")
    hidden, _ = partial(model, batch, [2], frozen=1)
    parameters = dict(model.named_parameters())
    trained = {id(parameters[n]) for n, gradient in gradients(model, hidden[2]).items() if gradient is not None}
    assert trained == {id(p) for p in partial.blocks[1].parameters()}
    assert trained <= {id(p) for p in partial.parameters_before(2, frozen=1)}


@every_architecture
def test_the_parameters_before_a_layer_are_those_that_get_a_gradient_from_it(name):
    model, _, batch = build(name)
    partial = PartialForward(model)
    before = {id(parameter) for parameter in partial.parameters_before(1)}
    hidden, _ = partial(model, batch, [1])
    parameters = dict(model.named_parameters())
    reached = {id(parameters[n]) for n, gradient in gradients(model, hidden[1]).items() if gradient is not None}
    # a few families register what comes before their blocks, or belongs to all of them, after them
    shared = ("rel_embeddings", "relative_attention_bias", "encoder.LayerNorm", "layernorm_embedding")
    assert reached <= before | {id(p) for n, p in parameters.items() if any(name in n for name in shared)}
