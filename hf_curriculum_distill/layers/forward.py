"""Run a prefix of a model's blocks, or its head on chosen rows only."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_curriculum_distill.layers.adapted import transformers_model
from hf_curriculum_distill.layers.blocks import backbone_config, changes_shape, find_block_stack
from hf_curriculum_distill.layers.chunks import RowLogits
from hf_curriculum_distill.layers.heads import head_of, predicts_next_token


@dataclass
class Wanted:
    """What a forward pass returns of a model.

    Args:
        layers: the numbers of the layers whose hidden states are returned.
        logits: whether to run the later blocks and the head, and return logits.
        rows: row numbers `[rows]` into the flattened logits, of the logits to return; None for all.
        gather: whether to pick the rows before the head, which needs logits with one row for each token, or after it.
        frozen: layers up to this one (0: the embeddings) run without gradients; None for none.
        truncate: whether to stop after the highest of `layers` if no logits are returned.
        chunk_size: the number of rows that the head reads at a time: the model stops before its head, and logits are
            a [`RowLogits`]. They are still a tensor if rows are not gathered before the head, and for classifiers.
        reduce: a function of the logits and the model's outputs (None if the head runs in chunks) that is called inside
            the model's forward, where wrappers see its gradients; its result is returned in place of the logits.
        pool: a function of the model's outputs that is called inside the model's forward; what it returns, an embedding
            of each example, takes the place of the logits.
        substitutes: states by layer, `{layer: [batch, length, hidden]}`, that the next block reads in place of that
            layer's output. No gradient goes from a block above the lowest of them to what runs before it.
    """

    layers: Sequence[int] = ()
    logits: bool = False
    rows: Tensor | None = None
    gather: bool = True
    frozen: int | None = None
    truncate: bool = True
    chunk_size: int | None = None
    reduce: Callable[[Tensor | RowLogits, Any], Any] | None = None
    pool: Callable[[Any], Tensor] | None = None
    substitutes: Mapping[int, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self.gather = self.gather and self.rows is not None
        if not self.logits:
            self.chunk_size = self.reduce = None

    @property
    def whole(self) -> bool:
        """Whether the model runs to its end, head included."""
        return self.logits or not self.truncate


@dataclass
class _Pass:
    """A forward pass in progress."""

    wanted: Wanted
    grad_enabled: bool = field(default_factory=torch.is_grad_enabled)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    number: int = 0  # the layer that ran last
    gathered: bool = False
    before_head: dict[nn.Module, Any] = field(default_factory=dict)  # outputs of the modules that the head follows


class _Stop(Exception):
    """Raised after the last block that is needed, or before the head; caught in the same model's forward."""


class PartialForward:
    """Runs a model up to a block and returns hidden states, or runs it whole, with its head on chosen rows only.

    Layers are block numbers from 1; 0 is the input of block 1. A forward hook on each block records its output. The
    hook of the last block that is needed raises [`_Stop`]; the model's `forward`, which [`install`] replaces, catches
    it and returns what was recorded. The call goes through whatever wraps the model (DistributedDataParallel, autocast,
    compile): gradients of a tensor that does not leave through the wrapper's `forward` would not be reduced over
    processes. The hooks act only during [`__call__`], so evaluation and recomputed activations are the plain model's.

    Args:
        stack: the stack of an encoder-decoder whose blocks are counted; the decoder's run after the whole encoder.

    Attributes:
        blocks: those of [`find_block_stack`]; none of a model whose hidden states change their shape, whose logits
            alone can be matched.
        num_classes: the number of classes that logits are cut to, because the other model has no more; None for all.
    """

    def __init__(self, model: nn.Module, stack: str = "encoder"):
        self.model = model = transformers_model(model)
        self.stack = stack
        self.blocks = [] if changes_shape(model, stack) else find_block_stack(model, stack)
        self.num_classes: int | None = None
        self._inputs = frozenset(inspect.signature(model.forward).parameters)
        self._pending: _Pass | None = None
        self._active: _Pass | None = None
        self._handles: list[Any] = []

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states."""
        return backbone_config(self.model, self.stack).hidden_size

    def check_training(self, freezes: bool) -> None:
        """Check that hidden states can be matched while the model trains.

        Args:
            freezes: whether a stage freezes earlier layers, or trains them in another way.

        Raises:
            ValueError: training skips blocks at random (layer drop), blocks run outside of autograd, or a layer to be
                frozen shares its block with others.
        """
        for name in ("layerdrop", f"{self.stack}_layerdrop"):
            if probability := getattr(self.model.config, name, 0.0):
                raise ValueError(
                    f"The student's {name} is {probability}, so that training leaves out blocks whose hidden states "
                    f"are to be matched; load it with {name}=0.0."
                )
        if self.model.config.model_type == "reformer":
            raise ValueError(
                f"{type(self.model).__name__} runs its blocks outside of autograd, which gives their hidden states no "
                "gradient; match logits only, with method='one_shot'."
            )
        if freezes and len(set(self.blocks)) < self.depth:
            raise ValueError(
                f"{type(self.model).__name__} runs one block for many layers, so that no layer can be frozen while "
                "others train; leave out freeze_matched_layers, finished_layer_rate and train_prefix='block' or "
                "'independent'."
            )

    @property
    def hooks_blocks_in_recomputation(self) -> bool:
        """Whether activation checkpointing also recomputes what hooks do, which by then are no longer active."""
        checkpointed = all(isinstance(block, GradientCheckpointingLayer) for block in self.blocks)
        return not checkpointed or "__call__" in vars(GradientCheckpointingLayer)  # transformers before 5.23

    def layer_of_parameters(self) -> dict[nn.Parameter, int]:
        """The number of each parameter's block; 0 for all others."""
        layers = dict.fromkeys(self.model.parameters(), 0)
        return layers | {p: number for number, block in enumerate(self.blocks, start=1) for p in block.parameters()}

    def parameters_before(self, layer: int, frozen: int | None = None) -> Iterator[nn.Parameter]:
        """The parameters that a loss on the output of block `layer` trains, with layers up to `frozen` frozen."""
        if frozen is None:  # embeddings (and, for a decoder's blocks, the encoder) come before the first block
            first = next(self.blocks[0].parameters(), None) if self.blocks else None
            yield from itertools.takewhile(lambda parameter: parameter is not first, self.model.parameters())
        for block in self.blocks[frozen or 0 : layer]:
            yield from block.parameters()

    def accepts(self, name: str) -> bool:
        """Whether the model's forward has an input of this name."""
        return name in self._inputs

    def __call__(
        self, wrapped: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int] = (), **wanted: Any
    ) -> tuple[dict[int, Tensor], Any]:
        """Run `wrapped(**inputs)`, the model or whatever wraps it.

        Args:
            layers, wanted: see [`Wanted`].

        Returns:
            hidden states `{layer: [batch, length, hidden]}`; and logits `[rows, classes]`, the result of `reduce`, or
            None.

        Raises:
            ValueError: the model did not call one of the layers' blocks, or its outputs have other shapes.
        """
        if not self._handles:
            self.install()
        self._pending = _Pass(Wanted(layers, **wanted))
        try:
            hidden, output = wrapped(**inputs)
        finally:
            self._pending = None
        return hidden, output

    def install(self) -> None:
        """Hook the model and replace its `forward`, after every wrapper that moves or shards its parameters."""
        model, original = self.model, self.model.forward

        @functools.wraps(original)
        def forward(module, *args, **kwargs):
            # not `original`, which is bound to this model: a deep copy must run its own weights
            own = functools.partial(original.__func__, module) if hasattr(original, "__func__") else original
            return own(*args, **kwargs) if self._pending is None else self._run(own, args, kwargs)

        # Trainer reads the names of the inputs from the signature; binding drops its first parameter
        signature = inspect.signature(original)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
        self._original = model.__dict__.get("forward")
        model.forward = MethodType(forward, model)
        for block in self.blocks[:1]:
            self._handles.append(block.register_forward_pre_hook(self._record_input, with_kwargs=True))
        for block in dict.fromkeys(self.blocks):
            self._handles.append(block.register_forward_pre_hook(self._substitute_input, with_kwargs=True))
            hook = functools.partial(self._record_output, self.blocks.index(block) + 1)
            self._handles.append(block.register_forward_hook(hook))
        self._handles += [m.register_forward_hook(self._gather_rows) for m in self._modules_before_head()]
        if getattr(model.config, "is_encoder_decoder", False):
            self._handles.append(model.get_encoder().register_forward_hook(self._keep_for_head))

    def remove(self) -> None:
        """Remove the hooks and restore the model's `forward`."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._original is None:
            del self.model.forward
        else:
            self.model.forward = self._original

    def _modules_before_head(self) -> list[nn.Module]:
        """The modules whose `last_hidden_state` the head may read; rows are gathered in the first output."""
        modules = [self.model.base_model]
        if getattr(self.model.config, "is_encoder_decoder", False) or predicts_next_token(self.model):
            modules.append(self.model.get_decoder())  # OPT and T5 bypass the base model's forward
        return [m for m in dict.fromkeys(modules) if m is not None and m is not self.model]

    def _run(self, original, args, kwargs) -> tuple[dict[int, Tensor], Any]:
        active = self._active = self._pending
        wanted = active.wanted
        try:
            if wanted.frozen is not None:
                torch.set_grad_enabled(False)
            outputs = original(*args, **kwargs)
        except _Stop:
            outputs = None
        finally:
            self._active = None
            torch.set_grad_enabled(active.grad_enabled)
        if missing := [layer for layer in wanted.layers if layer not in active.hidden]:
            raise ValueError(
                f"{type(self.model).__name__} did not call blocks {missing}, so there are no hidden states to match; a "
                "model must call each of its blocks, as a module and every time."
            )
        if wrong := [states.shape for states in active.hidden.values() if states.dim() != 3]:
            raise ValueError(
                f"The hidden states of {type(self.model).__name__} have shape {tuple(wrong[0])}; only those of shape "
                "[batch, length, hidden size] can be matched."
            )
        if not wanted.logits:
            return active.hidden, None
        if outputs is None:
            logits = self._logits_of_rows(active, functools.partial(original, *args, **kwargs))
        else:
            logits = self._read_logits(outputs, active)
        return active.hidden, logits if wanted.reduce is None else wanted.reduce(logits, outputs)

    def _read_logits(self, outputs: Any, active: _Pass) -> Tensor:
        if active.wanted.pool is not None:
            return active.wanted.pool(outputs)
        logits, rows = self.logits_in(outputs), active.wanted.rows
        if active.gathered and logits.shape[:-1] == (1, len(rows)):
            return logits.squeeze(0)
        logits = logits.flatten(0, -2)  # the head reads whole sequences, or something else
        return logits if rows is None else logits[rows]

    def logits_in(self, outputs: Any, has_loss: bool = False) -> Tensor:
        """The logits among the model's outputs.

        Args:
            has_loss: whether a tuple of outputs begins with a loss.

        Raises:
            ValueError: there are none.
        """
        head = head_of(self.model)
        if not head.is_in(outputs):
            raise ValueError(
                f"{type(self.model).__name__} returns no {' and '.join(head.output_names)}, only "
                f"{', '.join(outputs)}; use a model with one head, like those of AutoModelForMaskedLM or "
                "AutoModelForSequenceClassification, or match hidden states only, with method='hidden'."
            )
        logits = head.logits(outputs, has_loss)
        return logits if self.num_classes is None else logits[..., : self.num_classes]

    def _logits_of_rows(self, active: _Pass, original: Callable[[], Any]) -> RowLogits:
        """Logits from the model's own forward, in which the modules before the head return recorded outputs."""
        *_, (base, output) = active.before_head.items()
        hidden = output[0].squeeze(0)

        def run_head(rows: Tensor) -> Tensor:
            kept = active.before_head | {base: _with_last_hidden_state(output, rows[None])}
            own = {module: module.__dict__.get("forward") for module in kept}
            try:
                for module, recorded in kept.items():
                    module.forward = functools.partial(_return, recorded)
                logits = self.logits_in(original())
            finally:
                for module, forward in own.items():
                    module.__dict__.pop("forward")
                    if forward is not None:
                        module.forward = forward
            if logits.shape[:-1] != (1, len(rows)):
                raise ValueError(
                    f"The head of {type(self.model).__name__} returns logits of shape {tuple(logits.shape)} for "
                    f"{len(rows)} rows, so it reads more than these and cannot be run in chunks; set "
                    "logit_chunk_size=0."
                )
            return logits.squeeze(0)

        return RowLogits(hidden, run_head, self.model.get_output_embeddings(), active.wanted.chunk_size)

    def _record_input(self, block, args, kwargs) -> None:
        active = self._active
        if active is None or active.number:  # a shared block runs again for later layers
            return
        if active.wanted.frozen == 0:
            torch.set_grad_enabled(active.grad_enabled)
        if 0 in active.wanted.layers:
            active.hidden[0] = args[0] if args else kwargs["hidden_states"]
            self._maybe_stop(active, 0)

    def _substitute_input(self, block, args, kwargs):
        active = self._active
        substitutes = {} if active is None else active.wanted.substitutes
        if not substitutes or active.number < min(substitutes):
            return None
        inputs = {**dict(enumerate(args)), **kwargs}
        states = 0 if args else "hidden_states"
        # a position bias or an encoder's states, for instance, are computed before, and passed to every block
        detached = {n: v.detach() if isinstance(v, Tensor) and n != states else v for n, v in inputs.items()}
        if active.number in substitutes:
            detached[states] = substitutes[active.number].to(inputs[states].dtype)
        return tuple(detached[n] for n in range(len(args))), {n: detached[n] for n in kwargs}

    def _record_output(self, first: int, block, args, output) -> None:
        active = self._active
        if active is None:
            return
        number = active.number = max(first, active.number + 1)  # a shared block runs again for later layers
        if number == active.wanted.frozen:
            torch.set_grad_enabled(active.grad_enabled)
        if number in active.wanted.layers:
            active.hidden[number] = output if isinstance(output, Tensor) else output[0]
            self._maybe_stop(active, number)

    @staticmethod
    def _maybe_stop(active: _Pass, layer: int) -> None:
        wanted = active.wanted
        if layer == max(wanted.layers, default=0) and not wanted.whole:
            raise _Stop

    def _keep_for_head(self, module, args, output) -> None:
        if self._active is not None and self._active.wanted.chunk_size:
            self._active.before_head[module] = output

    def _gather_rows(self, module, args, output):
        active = self._active
        if active is None or not active.wanted.gather or active.gathered:
            return output
        if output[0].dim() != 3:
            raise ValueError(
                f"{type(module).__name__} returns {tuple(output[0].shape)} first, no hidden states of shape [batch, "
                f"length, hidden size], so that {type(self.model).__name__} has no head to run for a part of them."
            )
        active.gathered = True
        chosen = output[0].flatten(0, 1).index_select(0, active.wanted.rows).unsqueeze(0)
        output = _with_last_hidden_state(output, chosen)
        head = self.model.get_output_embeddings() if active.wanted.chunk_size else None
        if head is not None and head not in module.modules():  # otherwise a classifier, or the head is inside
            active.before_head[module] = output
            raise _Stop
        return output


def _with_last_hidden_state(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output


def _return(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output
