"""A stage's loss against a computation by hand in float64, from the whole outputs of the plain model."""

import itertools
import math

import pytest
import torch
from conftest import tiny_bert
from planning.plans import examples_for, planned
from torch.utils.data import default_collate
from transformers import BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from hf_curriculum_distill import CurriculumDistillationTrainer, Stage
from hf_curriculum_distill.batches.batch import BatchReader
from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.objective import Objective
from hf_curriculum_distill.teachers.teacher import Targets

VOCABULARY, WIDTH, DEPTH = 50, 16, 3


def standardised(state):
    return (state - state.mean()) / state.std(correction=0)


def gpt2():
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": DEPTH, "n_head": 2, "n_positions": 32}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, initializer_range=0.3))


MODELS = {"bert": lambda: tiny_bert(DEPTH, width=WIDTH, initializer_range=0.3), "gpt2": gpt2}
STAGES = {
    "hidden": Stage(hidden=[[0, 1], [2, 4]]),
    "one layer": Stage(hidden=[[1, 2]], hidden_weight=3.0),
    "kl": Stage(kl_weight=1.0),
    "labels": Stage(label_weight=1.0),
    "both": Stage(kl_weight=0.5, label_weight=2.0),
    "all": Stage(hidden=[[1, 2], [2, 4]], hidden_weight=0.25, kl_weight=2.0, label_weight=0.5),
}
DISTANCES = {
    "mse": lambda state, target: (state - target).square().mean(),
    "cosine": lambda state, target: 1 - (state @ target) / (state.norm() * target.norm()),
    "layer_norm_mse": lambda state, target: (standardised(state) - standardised(target)).square().mean(),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


def examples():
    """Three texts of 9, 5 and 7 tokens, of which 4, 1 and 3 have a label."""
    made = []
    for length, labelled in ((9, (1, 2, 5, 8)), (5, (4,)), (7, (1, 3, 6))):
        input_ids = torch.randint(5, VOCABULARY, (9,))
        labels = torch.full((9,), -100)
        labels[list(labelled)] = input_ids[list(labelled)]
        made.append({"input_ids": input_ids, "attention_mask": (torch.arange(9) < length).long(), "labels": labels})
    return made


class Case:
    """A student in float64, a batch, and random targets for every stage."""

    def __init__(self, name, args):
        self.model = MODELS[name]().double()
        self.args, self.inputs, self.shift = args, default_collate(examples()), int(name == "gpt2")
        partial = PartialForward(self.model)
        self.batch = BatchReader(partial, None, args)(self.inputs)
        self.objective = Objective(partial, args)
        self.counts = self.batch.counts + torch.tensor([7, 5])  # of a larger accumulated batch
        self.hidden = {layer: torch.randn(3, 9, WIDTH) for layer in range(DEPTH)}
        self.logits = torch.randn(8, VOCABULARY)

    def loss(self, stage, **arguments):
        hidden = {layer: self.hidden[layer] for layer in stage.student_layers}
        targets = Targets(hidden, self.logits if stage.kl_weight else None)
        return self.objective(self.model, self.batch, stage, targets, self.counts, **arguments)

    def by_hand(self, stage):
        """The total and the terms, in loops over examples and tokens."""
        names = ("input_ids", "attention_mask")
        outputs = self.model(**{name: self.inputs[name] for name in names}, output_hidden_states=True)
        labelled = [
            (b, i, self.inputs["labels"][b, i + self.shift].item())
            for b in range(3)
            for i in range(9 - self.shift)
            if self.inputs["labels"][b, i + self.shift] != -100
        ]
        num_positions, num_rows = self.counts.tolist()
        terms = {}
        if stage.hidden:
            matched, number = [(b, i) for b, i, _ in labelled], num_rows
            if self.args.hidden_positions == "tokens":
                matched = [(b, i) for b in range(3) for i in range(9) if self.inputs["attention_mask"][b, i]]
                number = num_positions
            terms[f"hidden_{self.args.hidden_loss}"] = sum(
                DISTANCES[self.args.hidden_loss](outputs.hidden_states[layer][b, i], self.hidden[layer][b, i].double())
                for layer in stage.student_layers
                for b, i in matched
            ) / (number * len(stage.hidden))
        temperature, smoothing = self.args.temperature, self.args.label_smoothing_factor
        class_weights = self.args.class_weights or [1.0] * VOCABULARY
        threshold, taught = self.args.teacher_entropy_threshold, list(zip(labelled, self.logits.double(), strict=True))
        if threshold is not None and stage.kl_weight and stage.label_weight:
            certain = []
            for _, target in taught:
                likely = (target / temperature).softmax(-1)
                certain.append(-(likely * likely.log()).sum() <= threshold * math.log(VOCABULARY))
            assert any(certain) and not all(certain)
            terms["certain"] = sum(certain) / num_rows
            labelled = [row for row, sure in zip(labelled, certain, strict=True) if not sure]
            taught = [row for row, sure in zip(taught, certain, strict=True) if sure]
        if stage.kl_weight and self.args.divergence == "hard":
            chosen = [(b, i, target.argmax()) for (b, i, _), target in taught]
            terms["hard_label_loss"] = -sum(outputs.logits[b, i].log_softmax(-1)[c] for b, i, c in chosen) / num_rows
        elif stage.kl_weight:
            terms["kl"] = 0.0
            for (b, i, _), target in taught:
                student = (outputs.logits[b, i] / temperature).log_softmax(-1)
                teacher = (target / temperature).log_softmax(-1)
                terms["kl"] += temperature**2 * (teacher.exp() * (teacher - student)).sum() / num_rows
        if stage.label_weight:
            terms["label_loss"] = 0.0
            for b, i, label in labelled:
                weighted = outputs.logits[b, i].log_softmax(-1) * torch.tensor(class_weights)
                own = (1 - smoothing) * weighted[label] + smoothing * weighted.mean()
                terms["label_loss"] -= own / num_rows
        weights = dict.fromkeys(("kl", "hard_label_loss"), stage.kl_weight) | {"label_loss": stage.label_weight}
        weights["certain"] = 0.0
        return sum(weights.get(term, stage.hidden_weight) * value for term, value in terms.items()), terms


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        largest = max(1e-3, value.abs().max().item())
        torch.testing.assert_close(actual[name].double(), value.double(), rtol=1e-5, atol=1e-5 * largest, msg=name)


SETTINGS = {
    "plain": {},
    "other settings": {"temperature": 2.0, "label_smoothing_factor": 0.1, "hidden_positions": "labels"},
    "cosines and hard labels": {"hidden_loss": "cosine", "divergence": "hard"},
    "weighted labels": {"class_weights": [0.0, 0.5, *[2.0] * (VOCABULARY - 2)], "label_smoothing_factor": 0.1},
    "certain teacher": {"teacher_entropy_threshold": 0.945, "temperature": 1.5, "class_weights": [0.5] * VOCABULARY},
    "certain first choice": {"teacher_entropy_threshold": 0.88, "divergence": "hard"},
    "layer norms": {"hidden_loss": "layer_norm_mse", "hidden_positions": "labels"},
}


@every_model
@every_stage
@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_the_loss_its_terms_and_its_gradients_are_those_by_hand(config, name, stage, fields, chunk_size):
    case = Case(name, config(logit_chunk_size=chunk_size, **fields))
    made, (total, terms) = case.loss(stage), case.by_hand(stage)
    assert_close(made.terms | {"total": made.total}, terms | {"total": total})
    actual, expected = gradients(case.model, made.total), gradients(case.model, total)
    # the plain model runs to its end: what comes after the layers of a stage has no part in its loss
    unused = expected.keys() - actual.keys()
    assert all(not expected[parameter].any() for parameter in unused)
    assert_close(actual, {parameter: value for parameter, value in expected.items() if parameter not in unused})


@every_model
@pytest.mark.parametrize("truncate", [True, False])
def test_independent_segments_are_blocks_called_one_at_a_time_on_the_targets_below(config, name, truncate):
    args = config(train_prefix="independent", layer_order="together", truncate=truncate)
    case, stage = Case(name, args), Stage(hidden=[[1, 2], [2, 4], [3, 6]], hidden_weight=0.5)
    case.hidden[3] = torch.randn(3, 9, WIDTH)
    body = case.model.base_model
    blocks = body.encoder.layer if name == "bert" else body.h
    calls = []
    handles = [b.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True) for b in blocks]
    case.model(**{key: case.inputs[key] for key in ("input_ids", "attention_mask")}, use_cache=False)
    for handle in handles:
        handle.remove()
    own = calls[0][0][0]  # the student's embeddings, and then the targets
    inputs = [own, case.hidden[1].double(), case.hidden[2].double()]
    mask = case.inputs["attention_mask"].bool()
    segments = []
    for number, (block, states, ((_, *more), kwargs)) in enumerate(zip(blocks, inputs, calls, strict=True), start=1):
        output = block(states, *more, **kwargs)
        error = ((output if torch.is_tensor(output) else output[0]) - case.hidden[number].double()).square().mean(-1)
        segments.append(0.5 * error[mask].sum() / (case.counts[0] * 3))
    made = case.loss(stage)
    assert_close({"total": made.total}, {"total": sum(segments)})
    actual = gradients(case.model, made.total)
    of_segments = [gradients(case.model, segment) for segment in segments]
    for one, other in itertools.combinations(of_segments, 2):
        assert one and other and not one.keys() & other.keys()  # no segment's loss reaches another's parameters
    assert_close(actual, {name: gradient for segment in of_segments for name, gradient in segment.items()})


def test_the_logit_stage_runs_the_students_own_states(config):
    independent = Case("bert", config(train_prefix="independent", layer_order="together"))
    joint, stage = Case("bert", config()), STAGES["all"]
    joint.hidden, joint.logits, joint.counts = independent.hidden, independent.logits, independent.counts
    assert torch.equal(independent.loss(stage).total, joint.loss(stage).total)


@every_model
@every_stage
def test_logits_of_the_rows_that_count_are_returned_iff_they_were_computed_at_once(config, name, stage):
    whole, cut = (Case(name, config(logit_chunk_size=size)) for size in (0, 3))
    for case in (whole, cut):
        assert case.batch.num_rows == 8
        returned = case.loss(stage).logits
        assert (returned is not None) == (stage.needs_logits and case is whole)
        if returned is not None:
            _, logits = case.objective.forward(case.model, case.batch, stage)
            assert torch.equal(returned, logits)
            assert logits.shape == (8, VOCABULARY)


@every_model
@every_stage
def test_the_losses_of_the_examples_add_up_to_that_of_the_batch(config, name, stage):
    case = Case(name, config())
    expected, actual = case.loss(stage), 0.0
    whole, logits = case.batch, case.logits
    kept = {layer: case.hidden[layer] for layer in case.hidden}
    for index, rows in enumerate((slice(0, 4), slice(4, 5), slice(5, 8))):
        case.batch = BatchReader(case.objective.student, None, case.args)(
            {key: tensor[index : index + 1] for key, tensor in whole.inputs.items()}
        )
        case.logits = logits[rows]
        case.hidden = {layer: states[index : index + 1] for layer, states in kept.items()}
        actual += case.loss(stage).total
    torch.testing.assert_close(actual, expected.total, rtol=1e-5, atol=1e-6)


@every_model
@pytest.mark.parametrize("hidden_loss", DISTANCES)
def test_padding_and_what_a_teacher_says_of_it_change_nothing(config, name, hidden_loss):
    case = Case(name, config(hidden_loss=hidden_loss))
    expected = case.loss(STAGES["all"]).total
    padding = case.inputs["attention_mask"] == 0
    for states in case.hidden.values():
        states[padding] = math.nan
    torch.testing.assert_close(case.loss(STAGES["all"]).total, expected, rtol=0, atol=0)


@every_model
@pytest.mark.parametrize("frozen", [1, 2])
def test_frozen_blocks_get_no_gradient_and_change_no_loss(config, name, frozen):
    case, stage = Case(name, config()), Stage(hidden=[[2, 4]], kl_weight=1.0)
    made = case.loss(stage, frozen=frozen)
    assert torch.equal(made.total, case.loss(stage).total)
    gradients(case.model, made.total)
    trained = [any(p.grad is not None for p in block.parameters()) for block in case.objective.student.blocks]
    assert trained == [number > frozen for number in range(1, DEPTH + 1)]


def test_without_any_label_that_counts_the_loss_is_zero_and_finite(config):
    case = Case("bert", config())
    case.batch, case.logits = case.batch.with_rows(*torch.zeros(2, 0, dtype=torch.long)), torch.zeros(0, VOCABULARY)
    case.counts = torch.tensor([21, 0])
    made = case.loss(STAGES["both"])
    assert made.total == 0
    assert all(not gradient.any() for gradient in gradients(case.model, made.total).values())


@pytest.mark.parametrize("stage", [STAGES["labels"], STAGES["both"], STAGES["kl"]], ids=["labels", "both", "kl"])
def test_labels_are_missed_iff_the_stage_learns_from_them(config, stage):
    case = Case("bert", config())
    case.batch = BatchReader(case.objective.student, None, case.args)(
        {name: tensor for name, tensor in case.inputs.items() if name != "labels"}
    )
    case.logits = torch.randn(21, VOCABULARY)
    if stage.label_weight:
        with pytest.raises(ValueError, match=f"Stage '{stage.name.replace('+', '.')}' learns from labels, but the"):
            case.loss(stage)
    else:
        assert case.loss(stage).terms.keys() == {"kl"}


def test_a_classifier_learns_from_one_row_an_example(config):
    model = tiny_bert(2, model_class=BertForSequenceClassification, num_labels=3).double()
    inputs = default_collate(examples()) | {"labels": torch.tensor([2, -100, 0])}
    partial, args = PartialForward(model), config()
    batch, logits = BatchReader(partial, None, args)(inputs), torch.randn(2, 3)
    stage = Stage(kl_weight=1.0, label_weight=0.5)
    made = Objective(partial, args)(model, batch, stage, Targets({}, logits), batch.counts)
    own = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits[[0, 2]]
    student, teacher = own.log_softmax(-1), logits.double().log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum() / 2
    label_loss = -(student[0, 2] + student[1, 0]) / 2
    expected = {"kl": kl, "label_loss": label_loss, "total": kl + 0.5 * label_loss}
    assert_close(made.terms | {"total": made.total}, expected)


@pytest.mark.parametrize("routers", [True, False])
def test_the_label_term_of_a_mixture_of_experts_is_its_own_loss(config, routers):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "router_aux_loss_coef": 0.5}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, output_router_logits=routers))
    partial, args, inputs = PartialForward(model), config(), default_collate(examples())
    batch = BatchReader(partial, None, args)(inputs)
    made = Objective(partial, args)(model, batch, Stage(label_weight=1.0), Targets(), 2 * batch.counts)
    own = model(**inputs).loss / 2  # one of two batches of equally many rows
    torch.testing.assert_close(made.total, own)
    assert ("aux_loss" in made.terms) == routers
    assert_close(gradients(model, made.total), gradients(model, own))


def test_the_loss_that_a_plan_counts_is_the_loss_that_a_training_takes(config, tmp_path, monkeypatch, student, teacher):
    called, own = [], Objective.__call__

    def recorded(self, model, batch, stage, targets, counts, frozen=0):
        called.append((stage.name, batch.num_rows))
        return own(self, model, batch, stage, targets, counts, frozen)

    monkeypatch.setattr(Objective, "__call__", recorded)
    planned(tmp_path, student, teacher)
    of_plan, called = set(called), []
    CurriculumDistillationTrainer(student, config(), train_dataset=examples_for(student), teacher_model=teacher).train()
    assert of_plan == set(called) != set()
