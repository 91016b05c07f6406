"""A teacher's targets on disk, by example.

A record is one target of one example. Its key is a hash of the example's inputs to the teacher, so the order of the
data, the batches and padding after the example do not matter, but for that of a decoder's tokens. Each teacher,
projection matrix and precision has its own folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.files import replacing
from hf_curriculum_distill.layers.chunks import RowLogits
from hf_curriculum_distill.layers.weights import weights_fingerprint
from hf_curriculum_distill.losses import TopLogits, top_logits
from hf_curriculum_distill.projections import ProjectionBank
from hf_curriculum_distill.stages import Stage
from hf_curriculum_distill.teachers.records import ROW_SIZE, RecordStore
from hf_curriculum_distill.teachers.teacher import Targets, Teacher

_FORMAT_VERSION = 1
_LOGITS = "logits"  # a target is named "logits" or by the number of its student layer
_WITHOUT_EFFECT = ("architectures", "dtype", "torch_dtype", "transformers_version")  # in a config, on the targets


class Examples:
    """The examples of a batch: their keys, and how many positions and rows each has.

    Args:
        inputs: the teacher's inputs.
        rows: numbers `[rows]` of the rows that count in the flattened logits; None if no logits are wanted.
        rows_per_example: the number of rows of logits of an example, padding included.
        classes_are_tokens: whether a row of logits has a class for each token, padding included.
        stack: the stack of an encoder-decoder whose states are wanted. The decoder's may count where it reads padding,
            so with them nothing of an example is left out.

    Raises:
        ValueError: an input does not have one entry per example.
    """

    def __init__(
        self,
        inputs: Mapping[str, Any],
        rows: Tensor | None,
        rows_per_example: int,
        classes_are_tokens: bool = False,
        stack: str = "encoder",
    ):
        tensors = {name: value.detach().cpu() for name, value in inputs.items() if isinstance(value, Tensor)}
        self.size = len(next(iter(tensors.values())))
        if wrong := [name for name, tensor in tensors.items() if not tensor.dim() or len(tensor) != self.size]:
            raise ValueError(
                f"{wrong[0]} has shape {tuple(tensors[wrong[0]].shape)} in a batch of {self.size}; teacher_cache needs "
                "inputs with one entry an example. Use a collator without packing, or leave out teacher_cache."
            )
        ids = tensors.get("input_ids")
        self.num_texts = ids.shape[1] if ids is not None and ids.dim() == 3 else 1  # of an example with choices
        tokens = None if ids is None or ids.dim() == 3 else ids.shape[:2]
        self.length = None if tokens is None else tokens[1]
        self.lengths = [self.length] * self.size
        mask = tensors.get("attention_mask")
        if stack == "encoder" and mask is not None and mask.shape == tokens:  # no token sees the padding after these
            self.lengths = (mask.ne(0) * torch.arange(1, self.length + 1)).amax(1).tolist()
        rows = torch.empty(0, dtype=torch.long) if rows is None else rows.cpu()
        self.counts = torch.bincount(rows // rows_per_example, minlength=self.size).tolist()
        positions = (rows % rows_per_example).split(self.counts)
        self.keys, self.logit_keys = [], []
        for index, (length, own) in enumerate(zip(self.lengths, positions, strict=True)):
            digest = hashlib.blake2b(digest_size=16)
            for name, tensor in sorted(tensors.items()):
                # the mask is the text's: a decoder's tokens, even if they are as many, end elsewhere
                of_text = tensor.shape[:2] == tokens and not name.startswith("decoder_")
                value = tensor[index, :length] if of_text else tensor[index]
                digest.update(f"{name} {tuple(value.shape)} {value.dtype} ".encode())
                digest.update(_bytes(value))
            self.keys.append(digest.digest())
            digest.update(b"rows " + _bytes(own) + (b" of %d tokens" % self.length if classes_are_tokens else b""))
            self.logit_keys.append(digest.digest())
        decoded = tensors.get("decoder_input_ids", tensors.get("decoder_inputs_embeds"))
        if stack == "decoder" and decoded is not None:
            self.length = decoded.shape[1]
            self.lengths = [self.length] * self.size


class TargetStore:
    """Writes targets to a folder and reads them.

    Hidden states are stored projected, in bfloat16; logits in float32, as the `teacher_cache_logits` likeliest classes
    and all others as one, or as a whole.

    Args:
        teacher: computes the targets; its weights, configuration and dtype are part of the records' folders' names.
        bank: projects the hidden states; None if no stage matches any.
        args: the folder, what is stored of logits, and the precision.
    """

    def __init__(self, teacher: Teacher, bank: ProjectionBank | None, args: CurriculumDistillationConfig):
        self.folder = args.teacher_cache
        os.makedirs(self.folder, exist_ok=True)
        self._bank, self._k, self._temperature = bank, args.teacher_cache_logits, args.temperature
        self._pooling, self._stack = args.pooling, teacher.partial_forward.stack
        self._num_classes = teacher.partial_forward.num_classes
        config = {n: v for n, v in teacher.model.config.to_dict().items() if n[0] != "_" and n not in _WITHOUT_EFFECT}
        self._teacher = {
            "format_version": _FORMAT_VERSION,
            "teacher": weights_fingerprint(teacher.model, samples=2**62),  # every value: other runs use the folder
            "class": type(teacher.model).__name__,
            "config": json.loads(json.dumps(config, default=str)),
            "dtype": str(teacher.model.dtype),
            "attention": teacher.model.config._attn_implementation,
            "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        }
        self._records: dict[int | str, RecordStore] = {}
        self._row_sizes: dict[int | str, int] = {}  # in bytes, known once the teacher has run

    def _records_of(self, target: int | str) -> RecordStore:
        if target not in self._records:
            facts = {"target": "logits", "k": self._k, "temperature": self._temperature if self._k else None}
            facts |= {} if self._num_classes is None else {"classes": self._num_classes}
            if target != _LOGITS:
                (teacher_layer,) = [t for s, t in self._bank.layer_pairs if s == target]
                tensors = (
                    self._bank.tensors()[f"layer_{target}_{teacher_layer}.{n}"] for n in ("weight", "mean", "std")
                )
                facts = {"target": "hidden", "teacher_layer": teacher_layer, "projection": _hash(*tensors)}
                facts |= {"layer_stack": "decoder"} if self._stack == "decoder" else {}
            elif self._pooling is not None:  # embeddings take the logits' place, in the student's width
                facts["pooling"] = self._pooling
                if self._bank is not None:
                    weight = next(iter(self._bank.tensors().values()))  # of any layer: the teacher has one width
                    facts["projection"] = _hash(self._bank.project_output(torch.eye(weight.shape[1]).to(weight)))
            described = json.dumps(self._teacher | facts, sort_keys=True, indent=2)
            folder = os.path.join(self.folder, hashlib.sha256(described.encode()).hexdigest()[:32])
            self._records[target] = RecordStore(folder)
            description = os.path.join(folder, "description.json")
            with replacing(description) as path, open(path, "w", encoding="utf-8") as file:
                file.write(described)  # for people; no code reads it
        return self._records[target]

    def measure(self, values: Mapping[int | str, Sequence[bytes]], keys: Sequence[bytes]) -> tuple[float, float]:
        """Measure how long it takes to write and to read the records of some examples.

        They are written to a temporary folder on the same disk.

        Args:
            values: the examples' records, by target.

        Returns:
            seconds to write them, and to read them.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            moments = [time.perf_counter()]
            for target, own in values.items():
                RecordStore(os.path.join(folder, str(target))).write(dict(zip(keys, own, strict=True)))
            moments.append(time.perf_counter())
            for target in values:
                records = RecordStore(os.path.join(folder, str(target)))
                for key in keys:
                    records.read(key)
            moments.append(time.perf_counter())
        write, read = (end - begin for begin, end in itertools.pairwise(moments))
        return write, read

    def expected_bytes(
        self, examples: Examples, missing: Mapping[int | str, list[int]], row_bytes: Mapping[int | str, float]
    ) -> float:
        """The bytes that the missing records will take.

        Args:
            missing: see [`missing`].
            row_bytes: the bytes of one row of each target.
        """
        return sum(
            ROW_SIZE + row_bytes[target] * self.num_rows(target, examples)[index]
            for target, lacking in missing.items()
            for index in lacking
        )

    def _targets_of(self, stage: Stage) -> list[int | str]:
        return [*stage.student_layers, *([_LOGITS] if stage.kl_weight else [])]

    def _keys(self, target: int | str, examples: Examples) -> list[bytes]:
        return examples.logit_keys if target == _LOGITS else examples.keys

    def missing(self, examples: Examples, stage: Stage) -> dict[int | str, list[int]]:
        """The numbers of the examples without a record, by target of the stage."""

        def look() -> dict[int | str, list[int]]:
            keys = {target: self._keys(target, examples) for target in self._targets_of(stage)}
            return {t: [i for i, key in enumerate(own) if key not in self._records_of(t)] for t, own in keys.items()}

        missing = look()
        if any(missing.values()):  # another process may have written them since
            for target in missing:
                self._records_of(target).refresh()
            missing = look()
        return missing

    def write(self, examples: Examples, missing: Mapping[int | str, list[int]], targets: Targets) -> None:
        """Write the missing records.

        Args:
            missing: see [`missing`].
            targets: those of all examples, of at least the missing targets.

        Raises:
            OSError: the folder cannot be written.
        """
        values = self.encode(examples, targets)
        for target, lacking in missing.items():
            keys = self._keys(target, examples)
            try:
                self._records_of(target).write({keys[i]: values[target][i] for i in lacking})
            except OSError as error:
                raise OSError(
                    f"teacher_cache {self.folder} cannot be written ({error}). Make room and resume from the last "
                    "checkpoint, what was written stays good; or start without teacher_cache."
                ) from error

    def encode(self, examples: Examples, targets: Targets) -> dict[int | str, list[bytes]]:
        """The record of each example, by target."""
        values: dict[int | str, list[bytes]] = {}
        for layer, states in targets.hidden.items():
            states = states.bfloat16().cpu().reshape(examples.size, -1, states.shape[-1])
            values[layer] = [_bytes(own[:length]) for own, length in zip(states, examples.lengths, strict=True)]
        if (logits := targets.logits) is not None:
            pieces = (logits[rows] for rows in logits.chunks()) if isinstance(logits, RowLogits) else [logits]
            numbers = torch.cat([self._encode_logits(piece).cpu() for piece in pieces])
            values[_LOGITS] = [_bytes(own) for own in numbers.split(examples.counts)]
        for target, own in values.items():
            if num_rows := sum(self.num_rows(target, examples)):
                self._row_sizes[target] = sum(map(len, own)) // num_rows
        return values

    def _encode_logits(self, logits: Tensor) -> Tensor:
        if self._k is None or logits.shape[-1] <= self._k:
            return logits.float()
        top = top_logits(logits, self._k, self._temperature)
        return torch.cat([top.log_probabilities, top.classes.int().view(torch.float32)], -1)

    def read(self, examples: Examples, stage: Stage, device: torch.device) -> Targets | None:
        """The targets of a stage; None if a record is missing or damaged, which is then forgotten.

        Args:
            device: where the targets are needed.
        """
        records = {
            t: [self._records_of(t).read(key) for key in self._keys(t, examples)] for t in self._targets_of(stage)
        }
        if any(record is None for own in records.values() for record in own):
            return None
        row_sizes = {target: self._row_size(target, examples, own) for target, own in records.items()}
        if wrong := [target for target, size in row_sizes.items() if size is None]:
            for target in wrong:
                for key in set(self._keys(target, examples)):
                    self._records_of(target).forget(key)
            return None
        targets = Targets()
        for target, own in records.items():
            if target == _LOGITS:
                numbers = np.frombuffer(b"".join(own), np.int32).reshape(sum(examples.counts), row_sizes[target] // 4)
                targets.logits = self._decode_logits(torch.from_numpy(numbers.copy()).view(torch.float32).to(device))
                continue
            width = self._bank.shapes[next(pair for pair in stage.hidden if pair[0] == target)][0]
            arrays = [np.frombuffer(record, np.int16).reshape(-1, width) for record in own]
            states = np.zeros((examples.size, examples.length or len(arrays[0]), width), np.int16)
            for index, array in enumerate(arrays):
                states[index, : len(array)] = array  # the rest is padding, which no loss counts
            states = torch.from_numpy(states.reshape(examples.size * examples.num_texts, -1, width))
            targets.hidden[target] = states.view(torch.bfloat16).to(device).float()
        return targets

    def _row_size(self, target: int | str, examples: Examples, records: Sequence[memoryview]) -> int | None:
        """The size of a row of these records in bytes; None if it is impossible, or not the same in all of them."""
        lengths = self.num_rows(target, examples)
        # the size of the rows that the teacher computed or, before it ran, the mean size of these
        size = self._row_sizes.get(target, sum(map(len, records)) // max(1, sum(lengths)))
        if target == _LOGITS:
            whole = size % 4 == 0 and (self._k is None or size // 4 <= self._k or size // 4 == 2 * self._k + 1)
        else:
            state = 2 * self._bank.shapes[next(pair for pair in self._bank.layer_pairs if pair[0] == target)][0]
            whole = size % state == 0 if examples.length is None else size == state
        return size if whole and all(len(r) == n * size for r, n in zip(records, lengths, strict=True)) else None

    def _decode_logits(self, numbers: Tensor) -> Tensor | TopLogits:
        if self._k is None or numbers.shape[-1] <= self._k:
            return numbers
        log_probabilities, classes = numbers.split([self._k + 1, self._k], -1)
        return TopLogits(log_probabilities, classes.contiguous().view(torch.int32).long(), self._num_classes)

    def num_rows(self, target: int | str, examples: Examples) -> list[int]:
        """The number of rows in the record of each example; without tokens records have one length, counted as 1."""
        if target == _LOGITS:
            return examples.counts
        return [1 if length is None else length for length in examples.lengths]


def _hash(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(f"{t.shape}".encode() + _bytes(t.cpu()) for t in tensors)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
