"""A batch's facts are those of the functions that define them, each worked out once."""

from collections import Counter

import pytest
import torch
from architectures import build
from conftest import StrictBert, tiny_bert
from torch.overrides import TorchFunctionMode
from transformers import MixtralConfig, MixtralForCausalLM

from batches.test_positions import text
from hf_curriculum_distill.batches import positions
from hf_curriculum_distill.batches.batch import BatchReader
from hf_curriculum_distill.batches.positions import LABEL_POSITIONS
from hf_curriculum_distill.layers.forward import PartialForward

MODELS = {name: build(name)[0] for name in ("bert", "bert-classifier", "bert-tagger", "gpt2", "t5", "vit", "wav2vec2")}
STATES = {"vit": 5, "wav2vec2": 18}  # hidden states of an example; 6 of a text


def inputs_of(name, labelled=True):
    """A batch of three examples: of text, the second ends in padding, and the numbers of labels are uneven."""
    classes = torch.tensor([1, 0, 1])
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16)} | ({"labels": classes} if labelled else {})
    if name == "wav2vec2":
        mask = (torch.arange(400) < torch.tensor([[400], [300], [200]])).long()
        return {"input_values": torch.randn(3, 400), "attention_mask": mask} | ({"labels": classes} if labelled else {})
    kind = "examples" if name == "bert-classifier" else "tokens"
    return text(labels=kind if labelled else None, classes=2 if name == "bert-tagger" else 99)


def reader(config, name="bert", teacher=None, **arguments):
    model = MODELS[name] if isinstance(name, str) else name
    return BatchReader(PartialForward(model), teacher and PartialForward(teacher), config, **arguments)


class Calls(TorchFunctionMode):
    """Counts the calls of torch's functions by name."""

    def __init__(self):
        super().__init__()
        self.numbers = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.numbers[getattr(function, "__name__", "")] += 1
        return function(*args, **kwargs or {})


def equal(one, other):
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one is None and other is None


CASES = [(name, labelled) for name in MODELS for labelled in (True, False) if labelled or name != "t5"]


@pytest.mark.parametrize("positions_of", ["tokens", "labels"])
@pytest.mark.parametrize("name, labelled", CASES)
def test_every_fact_is_that_of_the_function_that_defines_it(config, name, labelled, positions_of):
    inputs, model, hidden = inputs_of(name, labelled), MODELS[name], torch.zeros(3, STATES.get(name, 6), 8)
    batch = reader(config(hidden_positions=positions_of), name)(inputs)
    rows, labels = positions.counted_rows(model, inputs)
    assert equal(batch.rows, rows) and equal(batch.labels, labels)
    assert batch.num_rows == (0 if rows is None else len(rows))
    assert torch.equal(batch.counts, positions.count(model, inputs))
    assert batch.row_per_token == positions.has_rows_per_token(model, inputs)
    assert batch.rows_per_example == positions.num_rows_per_example(model, inputs)
    assert batch.inputs is inputs and batch.model is model
    assert batch.main_input is inputs[model.main_input_name] and len(batch) == 3
    if positions_of == "tokens":
        assert torch.equal(batch.weights(hidden), positions.position_weights(model, inputs, hidden))
    elif labelled and inputs["labels"].dim() == 2:
        assert torch.equal(batch.weights(hidden), positions.label_weights(model, inputs, hidden))
    else:
        with pytest.raises(ValueError, match="hidden_positions='labels' matches hidden states where a token's label"):
            batch.weights(hidden)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_stack_whose_hidden_states_are_matched_says_which_positions_count(config, stack):
    inputs = text(padded=True) | {"decoder_attention_mask": torch.tensor([[1, 1, 1, 0]] * 3)}
    inputs["labels"] = torch.tensor([[5, 6, 7, -100]] * 3)
    inputs["decoder_input_ids"] = torch.tensor([[0, 5, 6, 7]] * 3)
    batch = reader(config(layer_stack=stack), "t5")(inputs)
    mask = inputs["attention_mask" if stack == "encoder" else "decoder_attention_mask"]
    assert batch.counts.tolist() == [mask.sum(), 9]
    assert torch.equal(batch.weights(torch.zeros(*mask.shape, 8)), mask.bool())


@pytest.mark.parametrize("name, labelled", CASES)
def test_every_fact_is_worked_out_once_and_only_rows_and_labels_wait_for_the_device(config, name, labelled):
    batch = reader(config(), name)(inputs_of(name, labelled))
    hidden = torch.zeros(3, STATES.get(name, 6), 8)
    with Calls() as calls:
        first = batch.counts, batch.row_per_token, batch.rows_per_example, batch.student_inputs, batch.weights(hidden)
        assert calls.numbers["nonzero"] == 0
        first += batch.rows, batch.labels, batch.num_rows, batch.chunk_size
        assert calls.numbers["nonzero"] == (batch.rows is not None)
        other = torch.ones_like(hidden)  # only its shape is read
        again = batch.counts, batch.row_per_token, batch.rows_per_example, batch.student_inputs, batch.weights(other)
        again += batch.rows, batch.labels, batch.num_rows, batch.chunk_size
        assert calls.numbers["nonzero"] == (batch.rows is not None)
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_nothing_waits_for_the_device_where_the_collator_gave_the_places_of_labels(config):
    inputs = text(padded=False)
    inputs["labels"] = torch.where(torch.arange(6) % 3 == 1, inputs["input_ids"], -100)
    expected = reader(config())(inputs)
    batch = reader(config())(inputs | {LABEL_POSITIONS: torch.tensor([[1, 4]] * 3)})
    with Calls() as calls:
        rows, labels = batch.rows, batch.labels
    assert calls.numbers["nonzero"] == 0
    assert torch.equal(rows, expected.rows) and torch.equal(labels, expected.labels)
    assert LABEL_POSITIONS not in batch.model_inputs


# ---- what models get ----


@pytest.mark.parametrize("name, labelled", CASES)
def test_models_get_all_inputs_but_labels_and_a_decoder_its_tokens(config, name, labelled):
    inputs = inputs_of(name, labelled)
    batch = reader(config(), name)(inputs)
    given = dict(batch.model_inputs)
    if name == "t5":
        shifted = given.pop("decoder_input_ids")
        assert torch.equal(shifted, positions.shifted_right(MODELS["t5"], inputs["labels"]))
        assert torch.equal(shifted[:, 1:], inputs["labels"][:, :-1].masked_fill(inputs["labels"][:, :-1] == -100, 0))
    assert given.keys() == inputs.keys() - {"labels"}
    assert all(given[key] is inputs[key] for key in given)
    assert batch.model_inputs is batch.model_inputs


@pytest.mark.parametrize("name", ["decoder_input_ids", "decoder_inputs_embeds"])
def test_a_decoders_tokens_are_made_of_labels_iff_the_batch_has_neither_them_nor_their_embeddings(config, name):
    inputs = text() | {name: torch.ones(3, 6, dtype=torch.long)}
    given = reader(config(), "t5")(inputs).model_inputs
    assert given[name] is inputs[name]
    assert given.keys() == inputs.keys() - {"labels"}


def test_labels_by_another_name_are_labels(config):
    inputs = text() | {"next_sentence_label": torch.zeros(3)}
    plain, named = (reader(config(), label_names=names)(inputs) for names in (["labels"], ["next_sentence_label"]))
    assert plain.model_inputs.keys() == inputs.keys() - {"labels"}
    assert named.model_inputs.keys() == inputs.keys() - {"next_sentence_label"}


@pytest.mark.parametrize("strict_teacher", [True, False])
@pytest.mark.parametrize("strict_student", [True, False])
def test_the_student_lacks_an_input_iff_only_the_teachers_forward_names_it(config, strict_student, strict_teacher):
    student, teacher = (
        tiny_bert(1, model_class=StrictBert) if strict else tiny_bert(1) for strict in (strict_student, strict_teacher)
    )
    inputs = text() | {"token_type_ids": torch.zeros(3, 6, dtype=torch.long), "anyones": torch.zeros(3)}
    batch = reader(config(), student, teacher)(inputs)
    lacks = {"token_type_ids"} if strict_student and not strict_teacher else set()
    assert batch.model_inputs.keys() - batch.student_inputs.keys() == lacks
    assert "anyones" in batch.student_inputs  # passed on, so that the model refuses it
    alone = reader(config(), student)(inputs)
    assert alone.student_inputs == alone.model_inputs


# ---- other rows ----


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_other_rows_change_nothing_but_the_rows(config, name):
    read, inputs, hidden = reader(config(logit_chunk_size=2), name), inputs_of(name), torch.zeros(3, 6, 8)
    batch = read(inputs)
    rows, labels = torch.tensor([3, 1, 8]), torch.tensor([5, 6, 7])
    other = batch.with_rows(rows, labels)
    assert other.rows is rows and other.labels is labels and other.num_rows == 3
    assert other.inputs is inputs and other.model_inputs is batch.model_inputs
    assert other.chunk_size == 2 and batch.with_rows(rows[:1]).chunk_size is None
    assert batch.with_rows(rows).labels is None
    assert torch.equal(other.counts, batch.counts) and torch.equal(other.weights(hidden), batch.weights(hidden))
    assert (other.row_per_token, other.rows_per_example) == (batch.row_per_token, batch.rows_per_example)
    assert torch.equal(batch.rows, positions.counted_rows(batch.model, inputs)[0])
    assert read(inputs, whole_logits=True).with_rows(rows).chunk_size is None


# ---- chunks ----


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, None])
@pytest.mark.parametrize("of_run, of_batch", [(False, False), (True, False), (False, True)])
def test_logits_are_cut_iff_there_are_more_rows_than_a_chunk_has_and_nothing_wants_them_whole(
    config, size, of_run, of_batch
):
    inputs = text(padded=False)
    inputs["labels"] = torch.where(torch.arange(6) % 3 < 1, inputs["input_ids"], -100)[:, :6]
    inputs["labels"][0] = -100
    inputs["labels"][0, 5] = 7
    batch = reader(config(logit_chunk_size=size), whole_logits=of_run)(inputs, whole_logits=of_batch)
    assert batch.num_rows == 5
    cut = size is not None and size < 5 and not of_run and not of_batch
    assert batch.chunk_size == (size if cut else None)


def test_where_all_rows_count_logits_are_whole(config):
    batch = reader(config(logit_chunk_size=1))(text(labels=None, padded=False))
    assert batch.rows is None and batch.chunk_size is None


@pytest.mark.parametrize("routers", [True, False])
def test_logits_of_a_mixture_of_experts_are_whole_iff_its_routers_have_a_loss(config, routers):
    sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, output_router_logits=routers))
    batch = reader(config(logit_chunk_size=1), model)(text(padded=False))
    assert batch.num_rows > 1
    assert (batch.chunk_size is None) == routers


# ---- labels that nothing reads ----


@pytest.mark.parametrize("labels", [[{"boxes": torch.rand(1, 4)}] * 3, torch.rand(3, 2, 2), ["a", "b", "c"]], ids=str)
def test_labels_of_any_kind_are_left_unread_iff_no_loss_reads_them(config, labels):
    inputs = text(labels=None)
    given = inputs | {"labels": labels}
    unread, plain = reader(config(), reads_labels=False)(given), reader(config())(inputs)
    assert torch.equal(unread.counts, plain.counts)
    assert torch.equal(unread.weights(torch.zeros(3, 6, 8)), plain.weights(torch.zeros(3, 6, 8)))
    assert unread.model_inputs.keys() == unread.student_inputs.keys() == inputs.keys()
    with pytest.raises(ValueError, match=r"labels are .*class numbers"):
        _ = reader(config())(given).counts
