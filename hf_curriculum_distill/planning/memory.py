"""The peak of the memory of operations."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Measures the peak, in bytes, of the tensors that operations inside the context make, real or fake.

    It does not see tensors that existed before, or what an operation allocates only while it runs.

    Args:
        parameters: tensors whose finished gradients are counted apart.
        num_elements: numbers of elements of tensors that are counted apart.

    Attributes:
        peak: bytes at the peak, without finished gradients of `parameters`: their size is known, and with accumulation
            they exist before.
        peak_of_size: the part of `peak` in tensors whose number of elements is one of `num_elements`.
        peak_with_gradients: bytes at the peak, with all gradients.
    """

    def __init__(self, parameters: Iterable[Tensor] = (), num_elements: Collection[int] = ()):
        super().__init__()
        self.peak = self.peak_of_size = self.peak_with_gradients = 0
        self._live = dict.fromkeys(("of size", "other", "gradients"), 0)
        self._num_elements = num_elements
        self._held: dict[int, tuple[str, int]] = {}
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
        kind = "of size" if tensor.numel() in self._num_elements else "other"
        self._held[storage._cdata] = kind, storage.nbytes()
        weakref.finalize(storage, self._release, storage._cdata)
        self._live[kind] += storage.nbytes()
        held = self._live["of size"] + self._live["other"]
        if held > self.peak:
            self.peak, self.peak_of_size = held, self._live["of size"]
        self.peak_with_gradients = max(self.peak_with_gradients, held + self._live["gradients"])

    def _release(self, key: int) -> None:
        kind, size = self._held.pop(key)
        self._live[kind] -= size

    def _leave_gradient(self, parameter: Tensor) -> None:
        key = parameter.grad.untyped_storage()._cdata
        if key in self._held:
            kind, size = self._held[key]
            self._held[key] = "gradients", size
            self._live[kind] -= size
            self._live["gradients"] += size
