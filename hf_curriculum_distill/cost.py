"""Operations and bytes of a stage: counted by torch on a real batch, or on tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

from hf_curriculum_distill import losses
from hf_curriculum_distill.chunks import RowLogits, chunk_size, cut_rows, logit_losses, sum_over_chunks
from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.counting import answers_per_token, label_weights, position_weights
from hf_curriculum_distill.layers import PartialForward
from hf_curriculum_distill.randomness import preserved_random_state
from hf_curriculum_distill.stages import Stage

# torch counts the fused attention of every accelerator, but not the CPU's
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}

_OF_TOKENS = ("scaled_dot_product", "bmm")  # in the names of operations that multiply batches of matrices


def flop_counter() -> FlopCounterMode:
    """torch's counter of operations in matrix products (a multiply-add is two), CPU attention included."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(ModuleTracker):
    """Only totals are wanted; without gradients torch's tracker fails where a module's input is a parameter."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@torch.no_grad()
def count_flops(forward: Callable[[], Any]) -> np.ndarray:
    """Floating-point operations of the matrix products in one forward pass (a multiply-add counts as two): `[2]`.

    The first number are those with weights, which grow with the number of tokens; the second those of tokens with
    tokens, attention's, which grow with the square of their number.

    The pass runs without gradients and leaves every random state as it was. A backward pass through the same blocks
    costs twice as much: one product for the inputs' gradient and one for the weights'.
    """
    with preserved_random_state(), flop_counter() as counter:
        for output in tree_leaves(forward()):
            if isinstance(output, RowLogits):  # left to be computed
                output.run()
    counts = counter.get_flop_counts().get("Global", {})
    attention = sum(n for operation, n in counts.items() if any(name in str(operation) for name in _OF_TOKENS))
    return np.array([sum(counts.values()) - attention, attention])


def stage_flops(
    run_student: Callable[[Stage, Tensor | None], Any],
    run_teacher: Callable[[Stage, Tensor | None], Any],
    stage: Stage,
    rows: Tensor | None,
    frozen: int = 0,
    online: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Student's (forward and backward) and teacher's operations for one batch of a stage: see [`count_flops`].

    Args:
        run_student, run_teacher: one forward pass for a stage and rows of logits; what a stage doesn't need isn't run.
        rows: the rows of logits that count.
        frozen: the student's layers up to this one get no gradient.
        online: whether the teacher learns from these rows' labels, beside teaching.
    """
    chosen = rows if stage.needs_logits else None
    forward = count_flops(lambda: run_student(stage, chosen))
    backward = 2 * forward
    if frozen:
        backward -= 2 * count_flops(lambda: run_student(Stage(hidden=[(frozen, 0)]), None))
    teacher = count_flops(lambda: run_teacher(stage, chosen))
    if online:
        teacher += 3 * count_flops(lambda: run_teacher(Stage(kl_weight=1.0), rows))
    return forward + backward, teacher


class PeakMemory(TorchDispatchMode):
    """Bytes at the worst moment of what operations inside it made; with and without values of the tensors.

    Gradients of `parameters` leave the account when they are whole: how many there are is known without it. Not seen
    is what existed before, and what an operation holds only while it runs.

    Attributes:
        peak: bytes at the worst moment.
        peak_of_size: of these, bytes of tensors with as many elements as one of `num_elements`.
    """

    def __init__(self, parameters: Iterable[Tensor] = (), num_elements: Collection[int] = ()):
        super().__init__()
        self.peak = self.peak_of_size = 0
        self._live = self._live_of_size = 0
        self._num_elements = num_elements
        self._held: dict[int, weakref.finalize] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._leave_gradient) for p in parameters]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._hold(tensor)
        return result

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._held:
            return
        size = storage.nbytes()
        of_size = size if tensor.numel() in self._num_elements else 0
        self._held[storage._cdata] = weakref.finalize(storage, self._release, storage._cdata, size, of_size)
        self._live += size
        self._live_of_size += of_size
        if self._live > self.peak:
            self.peak, self.peak_of_size = self._live, self._live_of_size

    def _release(self, key: int, size: int, of_size: int) -> None:
        del self._held[key]
        self._live -= size
        self._live_of_size -= of_size

    def _leave_gradient(self, parameter: Tensor) -> None:
        if (held := self._held.get(parameter.grad.untyped_storage()._cdata)) is not None:
            held()  # as if it were gone


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as accelerators have it: one kernel, which applies dropout itself and keeps no probabilities."""
    attend = F.scaled_dot_product_attention

    def attend_fused(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args = [t.to(torch.get_autocast_dtype("cpu")) if isinstance(t, Tensor) else t for t in args]
        with torch.autocast("cpu", enabled=False):
            return attend(*args, **kwargs | {"dropout_p": 0.0})

    F.scaled_dot_product_attention = attend_fused  # no mode: a backward pass recomputes blocks outside of modes
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


@dataclass
class DryRun:
    """Student and teacher without values, made under `mode`, and what a micro-batch of a stage does with them.

    Args:
        ids_shape, labels_shape: of the batch; labels are `[batch, length]` or `[batch]`.
        num_rows: how many rows of logits count in it.
    """

    mode: FakeTensorMode
    student: PartialForward
    teacher: PartialForward | None
    args: CurriculumDistillationConfig
    ids_shape: tuple[int, ...]
    labels_shape: tuple[int, ...]
    num_rows: int

    def __post_init__(self):
        self._measured: dict[tuple, tuple[int, int, set[str], PeakMemory]] = {}
        with self.mode:
            shapes = {"input_ids": self.ids_shape, "labels": self.labels_shape}
            self._inputs = {name: torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()}
            self._rows = torch.zeros(self.num_rows, dtype=torch.long)

    def measure(self, stage: Stage, frozen: int = 0, online: bool = False) -> tuple[int, int, set[str], PeakMemory]:
        """Student's and teacher's operations, names of the parameters that get a gradient, and the worst moment.

        Arguments as in [`stage_flops`]. Of the memory at the worst moment, that of logits is told apart.
        """
        key = replace(stage, until=None), frozen, online
        if key not in self._measured:
            with self.mode:
                flops = stage_flops(self._run_student, self._run_teacher, stage, self._rows, frozen, online)
            self._measured[key] = *(int(n.sum()) for n in flops), *self._try_step(stage, frozen, online)
        return self._measured[key]

    def _try_step(self, stage: Stage, frozen: int, online: bool) -> tuple[set[str], PeakMemory]:
        args, student = self.args, self.student.model
        models = [one.model for one in (self.student, self.teacher) if one is not None]
        chunks = cut_rows(self.num_rows, self._chunk_size or max(1, self.num_rows))
        sizes = {(chunk.stop - chunk.start) * self._num_classes for chunk in chunks}
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with self.mode, nullcontext() if args.use_cpu else _fused_attention():
            parameters = [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]
            with PeakMemory(parameters, sizes) as memory:
                with torch.autocast("cpu", dtype, enabled=args.bf16 or args.fp16):
                    loss = self._loss(stage, frozen, online)
                loss.backward()
            trained = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
            for parameter in parameters:
                parameter.grad = None
        return trained, memory

    def _loss(self, stage: Stage, frozen: int, online: bool) -> Tensor:
        """The stage's losses in the trainer's order; weights and divisors are numbers, which cost nothing."""
        target_hidden, target_logits = self._run_teacher(stage, self._rows)

        def losses_of(logits: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
            return logit_losses(stage, self.args, target_logits, self._rows, logits.float(), rows)

        reduce = (lambda logits, _: sum_over_chunks(losses_of, logits)) if self._chunk_size else None
        hidden, logits = self._run_student(stage, self._rows, frozen, reduce)
        logits = logits.float() if isinstance(logits, Tensor) else logits
        hidden = {layer: states.float() for layer, states in hidden.items()}  # as accelerate does in mixed precision
        loss = torch.zeros(())
        for student_layer, teacher_layer in stage.hidden:
            states = target_hidden[teacher_layer].float()
            target = F.linear(states, torch.zeros(hidden[student_layer].shape[-1], states.shape[-1]))
            weigh = label_weights if self.args.hidden_positions == "labels" else position_weights
            weights = weigh(self.student.model, self._inputs, target)
            loss = loss + losses.hidden_state_mse(hidden[student_layer], target, weights)
        if stage.needs_logits:
            total, _ = logits if self._chunk_size else losses_of(logits, slice(None))
            loss = loss + total
        if online:
            _, answers = self._run(self.teacher, Stage(kl_weight=1.0), self._rows)
            losses.cross_entropy(answers, self._rows).backward()
        return loss

    @property
    def _num_classes(self) -> int:
        config = self.student.model.config
        return config.num_labels if "Classification" in type(self.student.model).__name__ else config.vocab_size

    @property
    def _chunk_size(self) -> int | None:
        sharded = self.args.deepspeed or self.args.fsdp
        return None if sharded else chunk_size(self.args, self.num_rows, self._num_classes)

    def _run_student(self, stage: Stage, rows: Tensor | None, frozen: int = 0, reduce: Callable | None = None):
        return self._run(self.student, stage, rows, stage.student_layers, frozen, reduce, self._chunk_size)

    @torch.no_grad()
    def _run_teacher(self, stage: Stage, rows: Tensor | None):
        if not stage.needs_teacher:
            return {}, None
        return self._run(self.teacher, stage, rows, stage.teacher_layers, chunk_size=self._chunk_size)

    def _run(self, model: PartialForward, stage: Stage, rows, layers=(), frozen: int = 0, reduce=None, chunk_size=None):
        questions = {"input_ids": self._inputs["input_ids"]}
        if model is self.teacher and model.accepts("use_cache"):
            questions["use_cache"] = False
        logits = bool(stage.kl_weight) if model is self.teacher else stage.needs_logits
        return model(
            model.model,
            questions,
            layers,
            logits=logits,
            rows=rows,
            gather=answers_per_token(model.model, self._inputs),
            frozen=frozen,
            truncate=self.args.truncate,
            chunk_size=chunk_size,
            reduce=reduce,
        )
