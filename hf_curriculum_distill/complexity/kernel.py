"""The empirical neural tangent kernel of a model: its Jacobian's Gram matrix, exact or from a random sketch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_curriculum_distill.layers.forward import PartialForward
from hf_curriculum_distill.layers.heads import head_of

KINDS = ("block", "per_class", "trace", "pseudo")
Outputs = Callable[[nn.Module, Mapping[str, Any]], Tensor]
_DEFAULT_NUMBERS = 2**30  # of a chunk of the Jacobian: 4 GiB in float32
_PRODUCT_NUMBERS = 2**24  # of what is converted to float64 at a time: 128 MiB
_PRODUCT_ROWS = 512


def logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The model's logits, `[..., classes]`: the outputs whose kernel is measured unless others are given."""
    return head_of(model).logits(model(**inputs))


def logit_contrasts(contrasts: Tensor) -> Outputs:
    """Outputs that are some of a large vocabulary's logits, or differences of them.

    Args:
        contrasts: class numbers, `[k]`, whole; or a matrix `[classes, k]` that the logits are multiplied with.

    Returns:
        a function for `outputs` of [`empirical_ntk`], with k outputs in each row.
    """

    def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        of_model = logits(model, inputs)
        chosen = contrasts.to(of_model.device)
        return of_model[..., chosen] if chosen.dim() == 1 else of_model @ chosen.to(of_model.dtype)

    return outputs


def hidden_states(layer: int, directions: Tensor | None = None, stack: str = "encoder") -> Outputs:
    """Outputs that are the hidden states after a block, for the kernel of what a layer stage trains.

    Args:
        layer: the block's number, from 1; 0 is the input of block 1.
        directions: `[hidden size, k]`, that the states are multiplied with; None for all coordinates.
        stack: the stack of an encoder-decoder whose blocks are counted.

    Returns:
        a function for `outputs` of [`empirical_ntk`], whose rows are tokens, with one output for each coordinate.
    """

    def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        forward = PartialForward(model, stack)
        try:
            states = forward(model, inputs, (layer,))[0][layer]
        finally:
            forward.remove()
        return states if directions is None else states @ directions.to(states)

    return outputs


def empirical_ntk(
    model: nn.Module,
    inputs: Mapping[str, Any],
    kind: str = "block",
    outputs: Outputs = logits,
    rows: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""The empirical neural tangent kernel: products of gradients of outputs with respect to the model's parameters.

    `K[ia, jb] = sum_p df_a(x_i)/dp df_b(x_j)/dp` over the parameters that require gradients, of the model in eval mode.
    Gradients are exact and in the model's dtype; their products are computed and summed in float64, so that the kernel
    of a float32 model is positive semi-definite to float64 rounding.

    Each example runs on its own, so that memory does not grow with the batch, and once for each chunk of parameters:
    memory is `rows * outputs * chunk_size` numbers in the model's dtype, and the kernel. A smaller chunk takes more
    passes.

    Args:
        model: any model; for the default outputs one with logits.
        inputs: of the model, as tensors `[examples, ...]`; what is no tensor is passed as it is.
        kind: what is returned of the kernel of n rows with d outputs. "block" is all of it; "per_class" each output's
            own kernel; "trace" their mean, `1/d sum_a K[ia, ja]`; "pseudo" the kernel of the sum of outputs over
            `sqrt(d)`, which costs one gradient a row (Mohamadi et al., ICML 2023, arXiv 2206.12543).
        outputs: a function that is called as `outputs(model, inputs)` with the inputs of one example, `[1, ...]`, and
            returns `[..., d]`; see [`logit_contrasts`] and [`hidden_states`].
        rows: increasing numbers of the rows that are measured, among those of the flattened outputs of all examples,
            `[n]`: such as the masked positions of `[examples, length]`. None for all: of a classifier, each example is
            a row.
        chunk_size: the number of parameters at a time; by default as many as take 4 GiB in float32.

    Returns:
        in float64, `[n * d, n * d]` for "block", where output a of row i is `i * d + a`; `[d, n, n]` for "per_class";
        `[n, n]` for the others.

    Raises:
        ValueError: the kind is unknown, the inputs differ in their number of examples, rows are not among the outputs,
            or no parameter requires gradients.
        FloatingPointError: a gradient is not finite.

    ```python
    >>> class Line(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(x, self.weight)
    >>> outputs = lambda model, inputs: model(inputs["x"])
    >>> empirical_ntk(Line(2, 1), {"x": torch.tensor([[1.0, 2.0], [3.0, 0.0]])}, outputs=outputs)  # x x^T
    tensor([[5., 3.],
            [3., 9.]], dtype=torch.float64)

    ```
    """
    _check_kind(kind)
    gram = None
    with _measuring(model):
        for _, jacobian in _jacobian_chunks(model, inputs, kind, outputs, rows, chunk_size):
            gram = _add_products(gram, _arrange(jacobian, kind))
    return _finished(gram, kind, jacobian.shape[1])


def sketched_ntk(
    model: nn.Module,
    inputs: Mapping[str, Any],
    size: int,
    kind: str = "block",
    outputs: Outputs = logits,
    rows: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """An unbiased random estimate of [`empirical_ntk`], which saves the products of long gradients.

    Each parameter's derivative is added with a random sign to one of `size` numbers (the count sketch of Charikar et
    al., 2002), whose products are taken instead: `n d p + (n d)^2 size` operations in place of `(n d)^2 p` for p
    parameters. An entry has the standard deviation of at most `sqrt(2 / size) |g_i| |g_j|` for gradients `g`.

    The estimate has at most the rank `size` (of "trace", d times that). Before [`supervision_complexity`], make it
    several times the number of rows of a kernel: an estimate without an inverse leaves the ridge alone to be measured.

    Args:
        size: the number of sums.
        seed: of the sums and signs.
        model, inputs, kind, outputs, rows: see [`empirical_ntk`].

    Returns:
        see [`empirical_ntk`].

    Raises:
        ValueError: the size is less than 1; see also [`empirical_ntk`].
        FloatingPointError: a gradient is not finite.
    """
    _check_kind(kind)
    if size < 1:
        raise ValueError(f"A sketch's size is {size}; it is a number of sums, at least 1.")
    draws = torch.Generator().manual_seed(seed)
    places = torch.randint(2 * size, (sum(p.numel() for p in model.parameters()),), generator=draws)
    sketch = None
    with _measuring(model):
        for columns, jacobian in _jacobian_chunks(model, inputs, kind, outputs, rows, None):
            if sketch is None:
                sketch = jacobian.new_zeros((*jacobian.shape[:2], size), dtype=torch.float64)
            own = places[columns].to(jacobian.device)
            signs = 1 - 2 * (own % 2)
            for row, gradients in zip(sketch, jacobian, strict=True):
                row.index_add_(1, own // 2, gradients.double() * signs)
    return _finished(_add_products(None, _arrange(sketch, kind)), kind, sketch.shape[1])


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; use one of {', '.join(KINDS)}.")


class _RowOutputs(nn.Module):
    """A model's outputs as rows, in a module of its own, through which the model's parameters can be replaced."""

    def __init__(self, model: nn.Module, outputs: Outputs, summed: bool):
        super().__init__()
        self.model, self._outputs, self._summed = model, outputs, summed

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        of_model = self._outputs(self.model, inputs).flatten(0, -2)
        return of_model.sum(-1, keepdim=True) / math.sqrt(of_model.shape[-1]) if self._summed else of_model


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, attention that gradients of several outputs at a time can pass, and no graph of the parameters."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in training:
            module.training = True


def _jacobian_chunks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    kind: str,
    outputs: Outputs,
    rows: Tensor | None,
    chunk_size: int | None,
) -> Iterator[tuple[slice, Tensor]]:
    """The rows' gradients with respect to a chunk of parameters at a time: which ones, and `[n, d, chunk]`.

    The tensor is used again for the next chunk.
    """
    examples = _examples(inputs)
    module = _RowOutputs(model, outputs, summed=kind == "pseudo")
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"No parameter of {type(model).__name__} requires gradients, so it has no tangent kernel.")
    total = sum(p.numel() for p in parameters.values())
    per_example, num_outputs = (first := module(examples[0])).shape
    rows = _checked_rows(rows, per_example * len(examples)).to(first.device)
    if chunk_size is None:
        chunk_size = max(_DEFAULT_NUMBERS // (len(rows) * num_outputs), 1)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it is a number of parameters, at least 1.")
    jacobian = first.new_empty((len(rows), num_outputs, min(chunk_size, total)))
    for start in range(0, total, chunk_size):
        columns = slice(start, min(start + chunk_size, total))
        part = jacobian[..., : columns.stop - start]
        for index, example in enumerate(examples):
            own = (rows // per_example == index).nonzero().flatten().tolist()
            if own:
                some = slice(own[0], own[-1] + 1)
                _write_gradients(part[some], module, parameters, example, rows[some] % per_example, start)
        yield columns, part


def _write_gradients(
    jacobian: Tensor,
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    example: Mapping[str, Any],
    rows: Tensor,
    start: int,
) -> None:
    """Write one example's gradients, `[rows, d, columns]`, with respect to the parameters from number `start`."""
    width, end, places, touched = jacobian.shape[-1], -start, {}, {}
    for name, parameter in parameters.items():
        begin, end = end, end + parameter.numel()
        if begin < width and end > 0:
            places[name], touched[name] = begin, parameter.detach()
    result, backward = vjp(lambda own: functional_call(module, own, (example,))[rows], touched)
    flat = jacobian.flatten(0, 1)
    directions = torch.eye(len(flat), dtype=result.dtype, device=result.device).view(-1, *result.shape)
    # no more memory at a time than the result has, but for one gradient
    at_once = max(flat.numel() // sum(p.numel() for p in touched.values()), 1)
    for some, part in zip(directions.split(at_once), flat.split(at_once), strict=True):
        (gradients,) = vmap(backward)(some)
        for name, begin in places.items():
            own = gradients[name].flatten(1)[:, max(-begin, 0) : width - begin]
            part[:, max(begin, 0) :][:, : own.shape[1]] = own


def _examples(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of each example, as a batch of one."""
    sizes = {name: len(value) if value.dim() else 0 for name, value in inputs.items() if isinstance(value, Tensor)}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"The inputs must be tensors of one number of examples, at least 1, but they have {sizes}.")
    return [
        {name: value[i : i + 1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        for i in range(next(iter(sizes.values())))
    ]


def _checked_rows(rows: Tensor | None, count: int) -> Tensor:
    if rows is None:
        return torch.arange(count)
    whole = not rows.is_floating_point() and rows.dtype != torch.bool
    wrong = not whole or rows.dim() != 1 or not len(rows) or (rows.diff() <= 0).any()
    if wrong or rows[0] < 0 or rows[-1] >= count:
        raise ValueError(f"rows must be increasing whole numbers [n] from 0 to {count - 1}, but they are {rows}.")
    return rows


def _arrange(jacobian: Tensor, kind: str) -> Tensor:
    """Gradients `[n, d, columns]` as `[kernels, rows of a kernel, columns]`, whose products are the kernels."""
    if kind == "per_class":
        return jacobian.transpose(0, 1)
    if kind == "trace":
        return jacobian.flatten(1)[None]
    return jacobian.flatten(0, 1)[None]


def _add_products(gram: Tensor | None, features: Tensor) -> Tensor:
    """Add the products of features, `[kernels, rows, columns]`, to the kernels' lower triangles."""
    num_kernels, num_rows, _ = features.shape
    if gram is None:
        gram = features.new_zeros((num_kernels, num_rows, num_rows), dtype=torch.float64)
    for columns in features.split(max(_PRODUCT_NUMBERS // (num_kernels * num_rows), 1), dim=2):
        columns = columns.double()
        for start in range(0, num_rows, _PRODUCT_ROWS):
            stop = start + _PRODUCT_ROWS
            gram[:, start:stop, :stop] += columns[:, start:stop] @ columns[:, :stop].mT
    return gram


def _finished(gram: Tensor, kind: str, num_outputs: int) -> Tensor:
    """The kernel of sums of products in lower triangles."""
    if not gram.isfinite().all():
        raise FloatingPointError("The gradients of the model's outputs are not finite, so it has no tangent kernel.")
    gram = gram.tril() + gram.tril(-1).mT
    if kind == "trace":
        gram /= num_outputs
    return gram if kind == "per_class" else gram[0]
