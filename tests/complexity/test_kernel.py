"""The tangent kernel against a plain double loop over examples, with whole Jacobians."""

import pytest
import torch
from conftest import masked_lm_examples, tiny_bert
from torch.func import functional_call, jacrev
from transformers import (
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_curriculum_distill import empirical_ntk, sketched_ntk, supervision_complexity
from hf_curriculum_distill.complexity import hidden_states, logit_contrasts
from hf_curriculum_distill.layers import PartialForward

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def image_model(name):
    torch.manual_seed(0)
    if name == "resnet":
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
        model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=3, **sizes))
        model(torch.randn(8, 1, 16, 16))  # in training mode: batch norms have statistics of their own
        return model
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes)
    return ViTForImageClassification(config)


def images(count, size, seed=0):
    return {"pixel_values": torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed)).double()}


def sentences(count):
    examples = masked_lm_examples(count)
    return {name: torch.stack([one[name] for one in examples]) for name in ("input_ids", "attention_mask")}


def reference(model, outputs_of, examples):
    """`[n, d, n, d]`: for each pair of examples, the product of two Jacobians, parameter by parameter."""
    model.eval()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    jacobians = [
        jacrev(lambda own, example=example: outputs_of(functional_call(model, own, (), example)))(parameters)
        for example in examples
    ]
    return torch.stack(
        [
            torch.stack([sum(a[name].flatten(1) @ b[name].flatten(1).T for name in a) for b in jacobians], dim=1)
            for a in jacobians
        ]
    )


def each(inputs):
    return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(len(next(iter(inputs.values()))))]


def classifier():
    return tiny_bert(1, width=8, dropout=0.1, model_class=BertForSequenceClassification, num_labels=3).double()


@pytest.fixture(scope="module", params=["bert", "resnet", "vit"])
def measured(request):
    """A model in training mode, inputs, and the reference of their kernel."""
    if request.param == "bert":
        model, inputs = classifier(), sentences(4)
    else:
        model = image_model(request.param).double()
        inputs = images(4, 16 if request.param == "resnet" else 8)
    return model, inputs, reference(model, lambda outputs: outputs.logits[0], each(inputs))


def test_every_kind_is_that_part_of_the_double_loop(measured):
    model, inputs, expected = measured
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    n, d = expected.shape[:2]
    kernels = {kind: empirical_ntk(model, inputs, kind) for kind in ("block", "per_class", "trace", "pseudo")}
    torch.testing.assert_close(kernels["block"], expected.reshape(n * d, n * d), **EXACT)
    torch.testing.assert_close(kernels["per_class"], torch.stack([expected[:, a, :, a] for a in range(d)]), **EXACT)
    torch.testing.assert_close(kernels["trace"], kernels["per_class"].mean(0), **EXACT)
    torch.testing.assert_close(kernels["pseudo"], expected.sum((1, 3)) / d, **EXACT)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("chunk_size", [301, 10**6])
def test_the_size_of_a_chunk_does_not_matter(chunk_size):
    model, inputs = classifier(), sentences(3)
    kernel = empirical_ntk(model, inputs)
    torch.testing.assert_close(empirical_ntk(model, inputs, chunk_size=chunk_size), kernel, **EXACT)


def test_a_kernel_is_symmetric_to_the_bit_and_positive_definite_even_of_a_float32_model():
    kernel = empirical_ntk(classifier().float(), sentences(6))
    assert kernel.dtype == torch.float64 and torch.equal(kernel, kernel.T)
    eigenvalues = torch.linalg.eigvalsh(kernel)
    assert eigenvalues[0] > -1e-12 * eigenvalues[-1]
    torch.testing.assert_close(kernel, empirical_ntk(classifier(), sentences(6)), rtol=1e-4, atol=1e-4)


def test_frozen_parameters_are_no_part_of_the_kernel():
    model, inputs = classifier(), sentences(3)
    whole = empirical_ntk(model, inputs)
    model.classifier.requires_grad_(False)
    body = empirical_ntk(model, inputs)
    model.requires_grad_(False).classifier.requires_grad_(True)
    torch.testing.assert_close(body + empirical_ntk(model, inputs), whole, **EXACT)
    with pytest.raises(ValueError, match="No parameter of BertForSequenceClassification requires gradients"):
        empirical_ntk(model.requires_grad_(False), inputs)


def test_of_a_masked_language_model_chosen_rows_and_contrasts_of_logits_are_measured():
    """Two rows of one sentence, one of the next; classes 7 and 9, and the difference of 3 and 4."""
    model, inputs, length = tiny_bert(1, width=8).double(), sentences(3), 12
    rows, contrasts = torch.tensor([3, 5, length + 2]), torch.zeros(50, 2)
    contrasts[3, 0], contrasts[4, 0], contrasts[9, 1] = 1, -1, 1
    chosen = [(each(inputs)[row // length], row % length) for row in rows.tolist()]

    def kernel(outputs_of):
        return torch.stack(
            [
                torch.stack([pair(outputs_of, *a, *b) for b in chosen], dim=1)  # [d, n, d] of each row
                for a in chosen
            ]
        ).reshape(6, 6)

    def pair(outputs_of, first, one, second, other):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        a, b = (
            jacrev(lambda own: outputs_of(functional_call(model, own, (), example).logits[0, position]))(parameters)  # noqa: B023
            for example, position in ((first, one), (second, other))
        )
        return sum(a[name].flatten(1) @ b[name].flatten(1).T for name in a)

    outputs = logit_contrasts(contrasts)
    expected = kernel(lambda logits: torch.stack([logits[3] - logits[4], logits[9]]))
    torch.testing.assert_close(empirical_ntk(model, inputs, outputs=outputs, rows=rows), expected, **EXACT)
    outputs = logit_contrasts(torch.tensor([7, 9]))
    actual = empirical_ntk(model, inputs, outputs=outputs, rows=rows, chunk_size=400)
    torch.testing.assert_close(actual, kernel(lambda logits: logits[[7, 9]]), **EXACT)


def test_without_rows_every_position_is_measured():
    model, inputs = tiny_bert(1, width=8), sentences(2)
    outputs = logit_contrasts(torch.tensor([7]))
    kernel = empirical_ntk(model, inputs, outputs=outputs)
    assert kernel.shape == (24, 24)
    rows = torch.tensor([1, 20])
    torch.testing.assert_close(empirical_ntk(model, inputs, outputs=outputs, rows=rows), kernel[rows][:, rows])


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hidden_states_after_a_block_are_measured(layer):
    """Their kernel is that of the parameters up to the block; the model keeps no hook."""
    model, inputs, rows = tiny_bert(2, width=8).double(), sentences(2), torch.tensor([1, 14])
    directions = torch.randn(8, 3)
    outputs = hidden_states(layer, directions)
    kernel = empirical_ntk(model, inputs, outputs=outputs, rows=rows)
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())

    def by_name(model, inputs):
        return model(**inputs, output_hidden_states=True).hidden_states[layer] @ directions.double()

    torch.testing.assert_close(empirical_ntk(model, inputs, outputs=by_name, rows=rows), kernel, **EXACT)
    for parameter, of_layer in PartialForward(model).layer_of_parameters().items():
        parameter.requires_grad_(of_layer <= layer)
    torch.testing.assert_close(empirical_ntk(model, inputs, outputs=outputs, rows=rows), kernel, **EXACT)


def test_the_error_of_a_sketch_falls_with_the_root_of_its_size():
    """Over seeds the mean is exact, and the mean square of an entry's error at most `2 / size |g_i|^2 |g_j|^2`."""
    model, inputs = torch.nn.Linear(400, 2, bias=False).double(), {"x": torch.randn(4, 400).double()}
    of = {"model": model, "inputs": inputs, "kind": "trace", "outputs": lambda model, inputs: model(inputs["x"])}
    kernel = empirical_ntk(**of)
    torch.testing.assert_close(kernel, inputs["x"] @ inputs["x"].T, **EXACT)
    norms = kernel.diagonal().sqrt()
    errors = {}
    for size in (16, 256):
        sketches = torch.stack([sketched_ntk(**of, size=size, seed=seed) for seed in range(100)])
        relative = (sketches - kernel) / (norms * norms[:, None])
        bound = (2 / size) ** 0.5
        errors[size] = float(relative.square().mean().sqrt())
        assert 0.4 * bound <= errors[size] <= bound
        assert float(relative.mean(0).abs().max()) <= 4 * bound / 100**0.5
    assert errors[16] == pytest.approx(4 * errors[256], rel=0.2)


def test_a_sketch_much_larger_than_the_kernel_gives_its_complexity():
    model, inputs, targets = classifier(), sentences(6), torch.tensor([1.0, -1.0] * 3)
    exact = supervision_complexity(empirical_ntk(model, inputs, "pseudo"), targets, ridge=1e-2).value
    sketched = supervision_complexity(sketched_ntk(model, inputs, 4096, "pseudo"), targets, ridge=1e-2).value
    assert sketched == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("kind", ["block", "per_class", "pseudo"])
def test_a_sketch_has_the_shape_of_the_kernel_and_depends_on_its_seed_alone(kind):
    model, inputs = classifier(), sentences(2)
    sketch = sketched_ntk(model, inputs, 32, kind, seed=3)
    assert sketch.shape == empirical_ntk(model, inputs, kind).shape and torch.equal(sketch, sketch.mT)
    assert torch.equal(sketch, sketched_ntk(model, inputs, 32, kind, seed=3))
    assert not torch.equal(sketch, sketched_ntk(model, inputs, 32, kind, seed=4))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"kind": "full"}, "kind is 'full'; use one of block, per_class, trace, pseudo"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"rows": torch.tensor([2])}, r"rows must be increasing whole numbers \[n\] from 0 to 1"),
        ({"rows": torch.tensor([-1])}, "rows must be increasing whole numbers"),
        ({"rows": torch.tensor([1, 0])}, "rows must be increasing whole numbers"),
        ({"rows": torch.tensor([False, True])}, "rows must be increasing whole numbers"),
        ({"rows": torch.tensor([0.0])}, "rows must be increasing whole numbers"),
        ({"rows": torch.tensor([], dtype=torch.long)}, "rows must be increasing whole numbers"),
        ({"inputs": {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(3, 3)}}, "one number of examples"),
        ({"inputs": {}}, "one number of examples"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        empirical_ntk(**{"model": classifier(), "inputs": sentences(2)} | changes)


def test_a_sketch_of_no_sums_is_refused():
    with pytest.raises(ValueError, match="A sketch's size is 0"):
        sketched_ntk(classifier(), sentences(2), 0)


def test_a_model_that_has_diverged_has_no_kernel_and_is_as_before():
    model = classifier().train()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="The gradients of the model's outputs are not finite"):
        empirical_ntk(model, sentences(2))
    assert all(module.training for module in model.modules())
