"""Losses of logits that are never whole in memory: a chunk of rows at a time, its gradients taken at once.

The logits of a large vocabulary are the largest tensors of a step: student's, teacher's, their logarithms and their
gradients. A loss that is a sum over rows needs none of them whole. Each chunk's head, loss and gradients (with respect
to the rows that the head reads and the head's parameters) are computed and left; what remains is a number whose
gradients are known, so nothing is computed twice.
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

# of float32 logits: an accelerator needs more rows to spend its time on products rather than on adding to a gradient
_CHUNK_BYTES = {"cpu": 2**22}
_CHUNK_BYTES_OF_ACCELERATOR = 2**27
_LEAST_ROWS = 96  # with fewer, to read the head's weights for each chunk takes longer than the products
Losses = tuple[Tensor, dict[str, Tensor]]


def chunk_size(args: CurriculumDistillationConfig, num_rows: int, num_classes: int) -> int | None:
    """How many of so many rows of logits to have at a time; None for all."""
    if args.torch_compile or args.fp16 or args.logit_chunk_size == 0:
        return None  # one graph; loss scaling; asked for
    num_bytes = _CHUNK_BYTES.get(args.device.type, _CHUNK_BYTES_OF_ACCELERATOR)
    size = args.logit_chunk_size or max(_LEAST_ROWS, num_bytes // (4 * max(1, num_classes)))
    return size if size < num_rows else None


class RowLogits:
    """Logits of chosen rows, computed where they are asked for: `logits[start:end]` is `[end - start, classes]`.

    Args:
        hidden: `[rows, hidden]`, what the head reads.
        head: these, or some of them, to logits. Runs with the gradient mode and autocast of now.
        last: the head's last module, which holds nearly all of its parameters.
        chunk_size: the most rows to ask for at a time.
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
        """Logits of other hidden rows."""
        with torch.set_grad_enabled(self._grad_enabled), torch.autocast(*self._autocast):
            return self._head(hidden)

    def chunks(self) -> list[slice]:
        return cut_rows(len(self), self._chunk_size)

    def run(self) -> None:
        """Compute all and keep none: for what it costs."""
        for rows in self.chunks():
            self[rows]


def cut_rows(num_rows: int, size: int) -> list[slice]:
    """Slices of so many rows, as few as fit `size`, of nearly the same length; one if there are no rows."""
    num_chunks = max(1, -(-num_rows // size))
    ends = [num_rows * index // num_chunks for index in range(num_chunks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def sum_over_chunks(losses_of: Callable[[Tensor, slice], Losses], logits: Tensor | RowLogits) -> Losses:
    """A sum over rows and its terms, from those of each chunk; of a whole tensor at once.

    Args:
        losses_of: a chunk's logits and its slice of the rows -> its part of the sum, and of the terms by name.

    Returns:
        the sum, with gradients, and the terms without. Its gradients can be taken once.
    """
    if not isinstance(logits, RowLogits):
        return losses_of(logits, slice(None))
    total, terms, of_rows = 0.0, {}, []
    gradients = _Gradients(logits.last)
    for rows in logits.chunks():
        chunk = logits.hidden[rows].detach().requires_grad_(logits.hidden.requires_grad)
        with gradients.watched():
            answers = logits.head(chunk)
        part, parts = losses_of(answers, rows)
        total = total + part.detach()
        terms = {name: terms.get(name, 0.0) + value.detach() for name, value in parts.items()}
        of_rows.append(gradients.add(part, chunk))
        del answers, part, parts  # the next chunk's come in their place
    known = gradients.totals
    if torch.is_grad_enabled() and logits.hidden.requires_grad:
        known = known | {logits.hidden: torch.cat(of_rows)}
    return (_WithGradients.apply(total, list(known.values()), *known) if known else total), terms


class _Gradients:
    """Adds up the gradients of all that a head's graph ends in, chunk by chunk.

    A linear last module has a gradient as large as the embeddings', and autograd would hold a second one to add. Its
    graph is therefore cut before and behind, and its products are added in place.

    Attributes:
        totals: by parameter.
    """

    def __init__(self, last: nn.Module):
        self.totals: dict[Tensor, Tensor] = {}
        self._last = last if type(last) is nn.Linear and last.weight.is_leaf and last.weight.requires_grad else None
        self._cuts: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the head runs."""
        hook = self._last.register_forward_hook(self._cut) if self._last and torch.is_grad_enabled() else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _cut(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        self._cuts.append((args[0], output.detach().requires_grad_()))
        return self._cuts[-1][1].view_as(output)  # hooks on what modules return need a graph behind it

    def add(self, part: Tensor, chunk: Tensor) -> Tensor | None:
        """Add those of a chunk's part of the sum; returns that of its rows."""
        found = self._backward(part)
        while self._cuts:
            read, answer = self._cuts.pop()
            gradient = found.pop(answer)
            del answer
            self._add_last(read.detach(), gradient)
            if read.requires_grad:
                of_read = gradient @ self._last.weight.detach().to(gradient.dtype)
                found |= self._backward(read, of_read.to(read.dtype))
        return found.pop(chunk, None)

    def _backward(self, tensor: Tensor, gradient: Tensor | None = None) -> dict[Tensor, Tensor]:
        """Gradients of a graph's ends: added up if these are parameters, else returned."""
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
        gradient = gradient.float().contiguous()  # half precision would round every addition
        held = {total.untyped_storage()._cdata for total in self.totals.values()}
        shared = gradient.untyped_storage()._cdata in held  # as those of a sum's two operands are
        self.totals[parameter] = gradient.clone() if shared else gradient


class _WithGradients(torch.autograd.Function):
    """A number whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [tensor.dtype for tensor in tensors]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, and given away
        if gradients is None:
            raise RuntimeError("The gradients of a loss over chunks of logits were taken already; compute it again.")
        scaled = (g.mul_(factor).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, *scaled


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The tensors that gradients of this one end in."""
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
