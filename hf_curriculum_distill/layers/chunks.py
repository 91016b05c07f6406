"""Losses of logits that are never in memory as a whole: chunk by chunk of rows, with each chunk's gradients at once.

With a large vocabulary, the largest tensors of a step are the logits of student and teacher, their logarithms and their
gradients. A loss that is a sum over rows needs only a chunk of them at a time. For each chunk, the head runs and the
loss and its gradients (with respect to the head's input and parameters) are computed; then the chunk is freed. What
remains is a number with known gradients, so nothing is computed twice.

Recomputing each chunk with `torch.utils.checkpoint` would be ten lines, but would run both heads twice: on one CPU
thread, a logit step of a 12 x 768 teacher and a 6 x 512 student takes 7 % longer for BERT (154 rows) and 34 % longer
for GPT-2 (1,016 rows), 3 % and 16 % where the teacher's logits are whole, and needs 57 to 274 MiB more memory: see
`benchmarks/logits_in_pieces.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_curriculum_distill.config import CurriculumDistillationConfig

# bytes of float32 logits; on an accelerator, small chunks spend more time on adding to a gradient than on products
_CHUNK_BYTES = {"cpu": 2**22}
_CHUNK_BYTES_OF_ACCELERATOR = 2**27
_LEAST_ROWS = 96  # with fewer, reading the head's weights for each chunk takes longer than the products
Losses = tuple[Tensor, dict[str, Tensor]]


def chunk_size(args: CurriculumDistillationConfig, num_rows: int, num_classes: int) -> int | None:
    """The number of rows of logits in a chunk; None for all rows at once.

    Args:
        num_rows, num_classes: the shape of the whole logits.
    """
    if args.torch_compile or args.fp16 or args.logit_chunk_size == 0:
        return None  # one graph; loss scaling; turned off
    num_bytes = _CHUNK_BYTES.get(args.device.type, _CHUNK_BYTES_OF_ACCELERATOR)
    size = args.logit_chunk_size or max(_LEAST_ROWS, num_bytes // (4 * max(1, num_classes)))
    return size if size < num_rows else None


class RowLogits:
    """Logits of chosen rows, computed on access: `logits[start:end]` is `[end - start, classes]`.

    Args:
        hidden: the head's input, `[rows, hidden]`.
        head: maps (some rows of) `hidden` to logits. It runs with the gradient mode and autocast of the time of
            construction.
        last: the head's last module, which has nearly all of its parameters.
        chunk_size: the largest number of rows that [`chunks`] puts in a slice.
    """

    def __init__(self, hidden: Tensor, head: Callable[[Tensor], Tensor], last: nn.Module, chunk_size: int):
        self.hidden, self._head, self.last, self._chunk_size = hidden, head, last, chunk_size
        device = hidden.device.type
        self._grad_enabled = torch.is_grad_enabled()
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.head(self.hidden[rows])

    def head(self, hidden: Tensor) -> Tensor:
        """Logits `[n, classes]` of any hidden states `[n, hidden]`."""
        with torch.set_grad_enabled(self._grad_enabled), torch.autocast(*self._autocast):
            return self._head(hidden)

    def chunks(self) -> list[slice]:
        """Slices of at most `chunk_size` rows: see [`cut_rows`]."""
        return cut_rows(len(self), self._chunk_size)

    def run(self) -> None:
        """Compute all logits and keep none, to count the operations."""
        for rows in self.chunks():
            self[rows]


def cut_rows(num_rows: int, size: int) -> list[slice]:
    """Cut `num_rows` rows into as few slices of at most `size` rows as possible, of nearly equal length.

    Without rows there is one, empty slice.

    ```python
    >>> cut_rows(10, size=4)
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]

    ```
    """
    num_chunks = max(1, -(-num_rows // size))
    ends = [num_rows * index // num_chunks for index in range(num_chunks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def sum_over_chunks(losses_of: Callable[[Tensor, slice], Losses], logits: Tensor | RowLogits) -> Losses:
    """Add up a loss and its terms over the chunks of rows; of a tensor, all rows at once.

    Args:
        losses_of: called as `losses_of(logits, rows)` with a chunk's logits and its slice; returns the chunk's loss
            and its terms by name.

    Returns:
        the sum, whose gradients can be taken once, and the terms, without gradients.
    """
    if not isinstance(logits, RowLogits):
        return losses_of(logits, slice(None))
    total, terms, of_rows = 0.0, {}, []
    gradients = _Gradients(logits.last)
    for rows in logits.chunks():
        chunk = logits.hidden[rows].detach().requires_grad_(logits.hidden.requires_grad)
        with gradients.watched():
            chunk_logits = logits.head(chunk)
        part, parts = losses_of(chunk_logits, rows)
        total = total + part.detach()
        terms = {name: terms.get(name, 0.0) + value.detach() for name, value in parts.items()}
        of_rows.append(gradients.add(part, chunk))
        del chunk_logits, part, parts  # before the next chunk's are made
    known = gradients.totals
    if torch.is_grad_enabled() and logits.hidden.requires_grad:
        known = known | {logits.hidden: torch.cat(of_rows)}
    return (_WithGradients.apply(total, list(known.values()), *known) if known else total), terms


class _Gradients:
    """Adds up, chunk by chunk, the gradients of all leaves of a head's graph.

    The gradient of a linear last module is as large as the embeddings, and autograd would allocate a second one to add.
    The graph is therefore cut before and after this module, and its products are added in place.

    Attributes:
        totals: the gradients so far, by parameter.
    """

    def __init__(self, last: nn.Module):
        self.totals: dict[Tensor, Tensor] = {}
        self._last = last if type(last) is nn.Linear and last.weight.is_leaf and last.weight.requires_grad else None
        self._cuts: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which the head runs."""
        hook = self._last.register_forward_hook(self._cut) if self._last and torch.is_grad_enabled() else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _cut(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        self._cuts.append((args[0], output.detach().requires_grad_()))
        return self._cuts[-1][1].view_as(output)  # hooks on a module's output need it to have a graph

    def add(self, part: Tensor, chunk: Tensor) -> Tensor | None:
        """Add the gradients of a chunk's loss `part`; returns the gradient of `chunk`, None if it needs none."""
        found = self._backward(part)
        while self._cuts:
            read, head_output = self._cuts.pop()
            gradient = found.pop(head_output)
            del head_output
            self._add_last(read.detach(), gradient)
            if read.requires_grad:
                of_read = gradient @ self._last.weight.detach().to(gradient.dtype)
                found |= self._backward(read, of_read.to(read.dtype))
        return found.pop(chunk, None)

    def _backward(self, tensor: Tensor, gradient: Tensor | None = None) -> dict[Tensor, Tensor]:
        """Take the gradients of a graph's leaves: add those of parameters to `totals`, return the others."""
        leaves = _leaves(tensor)
        found = dict(zip(leaves, torch.autograd.grad(tensor, leaves, gradient), strict=True)) if leaves else {}
        for leaf in [leaf for leaf in found if isinstance(leaf, nn.Parameter)]:
            self._add(leaf, found.pop(leaf))
        return found

    def _add_last(self, read: Tensor, gradient: Tensor) -> None:
        weight, bias = self._last.weight, self._last.bias
        read_rows, rows = read.flatten(0, -2).to(gradient.dtype), gradient.flatten(0, -2)
        total = self.totals.get(weight)
        if total is not None and total.dtype == rows.dtype:
            torch.addmm(total, rows.T, read_rows, out=total)
        else:
            self._add(weight, rows.T @ read_rows)
        if bias is not None and bias.requires_grad:
            self._add(bias, rows.sum(0))

    def _add(self, parameter: Tensor, gradient: Tensor) -> None:
        if parameter in self.totals:
            self.totals[parameter] += gradient
            return
        gradient = gradient.float().contiguous()  # in half precision every addition would be rounded
        held = {total.untyped_storage()._cdata for total in self.totals.values()}
        shared = gradient.untyped_storage()._cdata in held  # as those of a sum's two operands may be
        self.totals[parameter] = gradient.clone() if shared else gradient


class _WithGradients(torch.autograd.Function):
    """A number with known gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [tensor.dtype for tensor in tensors]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place and handed on
        if gradients is None:
            raise RuntimeError("The gradients of a loss over chunks of logits were taken already; compute it again.")
        scaled = (g.mul_(factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, *scaled


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves of a tensor's graph that require gradients."""
    if tensor.is_leaf:
        return [tensor] if tensor.requires_grad else []
    found, seen, nodes = {}, set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[node.variable] = None
        nodes += [following for following, _ in node.next_functions]
    return list(found)
