"""Fixed random projections of the teacher's hidden states: the student's targets in the layer stages."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_curriculum_distill.files import replacing
from hf_curriculum_distill.stages import LayerPair, parse_layer_pairs

FILE_NAME = "projection_bank.safetensors"
FORMAT_VERSION = "2"
PROJECTIONS = ("gaussian", "rademacher", "orthogonal", "identity")
_IDENTITY = ("fingerprint", "name", "revision")
_STORED = {"dtype": torch.float32, "device": "cpu"}  # regardless of torch's default dtype and device


@dataclass
class _Projection:
    weight: Tensor  # [student_dim, teacher_dim]
    mean: Tensor  # [student_dim], of the calibration sample's projected states; 0 before `fit`
    std: Tensor  # [student_dim]; 1 before `fit`


class ProjectionBank:
    """One fixed random matrix for each `(student_layer, teacher_layer)` pair, with the statistics of its outputs.

    [`create`] draws the matrices, [`fit`] measures mean and standard deviation of their outputs once and freezes the
    bank: nothing changes it afterwards, and a second `fit` raises. A bank that was measured fits only the teacher that
    it was measured on; a bank that was frozen without that fits any.

    Gupta & Karmalkar (2025, arXiv 2503.17494) project the teacher's hidden states with fixed random matrices; to
    standardise the targets is our choice.

    ```python
    >>> bank = ProjectionBank.create([(1, 2)], student_dims=[1], teacher_dims=[1], kind="identity")
    >>> teacher = lambda batch, layers: ({2: batch}, torch.ones(batch.shape[:2]))
    >>> bank.fit(teacher, [torch.tensor([[[4.0], [6.0]]])]).project(1, torch.tensor([7.0]))  # mean 5, deviation 1
    tensor([2.])

    ```

    Attributes:
        metadata: `kind`, `seed` and `shared`, the arguments of [`create`], and `teacher`, the `identity` that [`fit`]
            was given, or None.
        frozen: whether [`fit`] or [`freeze`] was called.
    """

    def __init__(self, projections: Mapping[LayerPair, _Projection], metadata: Mapping[str, Any], frozen: bool):
        self._projections = dict(projections)
        self._by_student_layer = {student: p for (student, _), p in self._projections.items()}
        self.metadata = dict(metadata)
        self.frozen = frozen

    @classmethod
    def create(
        cls,
        layer_pairs: Iterable[LayerPair],
        student_dims: Sequence[int],
        teacher_dims: Sequence[int],
        kind: str = "gaussian",
        seed: int = 0,
        shared: bool = False,
    ) -> ProjectionBank:
        """Draw one matrix `[student_dim, teacher_dim]` for each pair.

        A matrix depends on the seed and its pair alone, on every machine; with `shared` on the seed alone. Most of what
        a residual stream holds at one layer is there at the next: a shared matrix keeps it in one basis, while separate
        ones make each stage learn another.

        Args:
            layer_pairs: `(student_layer, teacher_layer)` pairs, each student layer once.
            student_dims, teacher_dims: the hidden sizes at each pair's layers, in the order of the pairs.
            kind: "gaussian" or "rademacher", with entries of variance `1 / teacher_dim`; "orthogonal", with orthonormal
                rows (for a wider student, scaled orthonormal columns); "identity", which copies the first units.
            shared: whether pairs with the same dims have the same matrix.

        Returns:
            a bank that is not frozen.

        Raises:
            ValueError: the kind is unknown, the dims do not match the pairs, or a wider student has kind "identity".
        """
        pairs = parse_layer_pairs(layer_pairs)
        if kind not in PROJECTIONS:
            raise ValueError(f"projection is {kind!r}; use one of {', '.join(PROJECTIONS)}.")
        if not len(pairs) == len(student_dims) == len(teacher_dims):
            raise ValueError(
                f"{len(pairs)} layer pairs came with {len(student_dims)} student and {len(teacher_dims)} teacher "
                "dimensions; give one of each per pair."
            )
        if wrong := [n for n in (*student_dims, *teacher_dims, seed) if not isinstance(n, int) or isinstance(n, bool)]:
            raise ValueError(
                f"The dimensions and the seed of a projection must be whole numbers, but one is {wrong[0]!r}."
            )
        if (smallest := min((*student_dims, *teacher_dims), default=1)) < 1:
            raise ValueError(f"A projection's dimension is {smallest}; hidden states have at least 1.")
        projections = {}
        for pair, student_dim, teacher_dim in zip(pairs, student_dims, teacher_dims, strict=True):
            weight = _draw(kind, student_dim, teacher_dim, _pair_seed(seed, (0, 0) if shared else pair))
            mean, std = (torch.full((student_dim,), value, **_STORED) for value in (0.0, 1.0))
            projections[pair] = _Projection(weight, mean, std)
        return cls(projections, {"kind": kind, "seed": seed, "shared": shared, "teacher": None}, frozen=False)

    @property
    def layer_pairs(self) -> tuple[LayerPair, ...]:
        """The `(student_layer, teacher_layer)` pairs, in the order in which they were given."""
        return tuple(self._projections)

    @property
    def shapes(self) -> dict[LayerPair, tuple[int, int]]:
        """The matrices' shapes: `{(student_layer, teacher_layer): (student_dim, teacher_dim)}`."""
        return {pair: tuple(p.weight.shape) for pair, p in self._projections.items()}

    def check_fits(
        self, pairs: Iterable[LayerPair], student_dim: int, teacher_dim: int, teacher_fingerprint: str | None
    ) -> None:
        """Check that the bank can project this teacher's states for this student.

        Args:
            pairs: the `(student_layer, teacher_layer)` pairs that are needed.
            student_dim, teacher_dim: the models' hidden sizes.
            teacher_fingerprint: of its weights ([`~teachers.weights_fingerprint`]); None if they change.

        Raises:
            ValueError: a pair has no `[student_dim, teacher_dim]` matrix, or the bank was measured on another teacher.
        """
        if missing := [pair for pair in pairs if self.shapes.get(pair) != (student_dim, teacher_dim)]:
            raise ValueError(
                f"The projection bank does not fit: layer pairs {missing} need [{student_dim}, {teacher_dim}] matrices "
                f"(student, teacher), but it has {self.shapes}. Create it for this layer map and these models."
            )
        measured = self.metadata["teacher"]
        if measured is not None and (teacher_fingerprint is None or measured["fingerprint"] != teacher_fingerprint):
            known = measured["fingerprint"]
            given = "changes while it teaches" if teacher_fingerprint is None else f"has {teacher_fingerprint[:12]}"
            raise ValueError(
                f"The projection bank standardises what was measured on {measured['name'] or 'a teacher'} with weights "
                f"{known[:12] if known else 'that fit was not told of'}, but the teacher {given}; another teacher's "
                "states, or the same one's in another dtype, have other means and deviations. Pass the teacher it was "
                "measured on, or leave projection_bank out, so that one is measured on yours."
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all pairs, matrices, means and standard deviations, to the bit, and all metadata."""
        metadata = {**self.metadata, "frozen": self.frozen}
        return self._hash(("weight", "mean", "std"), json.dumps(metadata, sort_keys=True))

    @property
    def matrix_fingerprint(self) -> str:
        """SHA-256 over pairs and matrices alone, which the seed determines."""
        return self._hash(("weight",))

    def freeze(self) -> ProjectionBank:
        """Freeze the bank as it is; before [`fit`] that leaves the targets unstandardised. Returns this bank."""
        self.frozen = True
        return self

    @torch.no_grad()
    def fit(
        self,
        teacher: Callable[[Any, Sequence[int]], tuple[Mapping[int, Tensor], Tensor]],
        dataloader: Iterable[Any],
        identity: Mapping[str, str | None] | None = None,
    ) -> ProjectionBank:
        """Measure mean and standard deviation of the projected teacher states, then freeze the bank.

        A coordinate that does not vary keeps a standard deviation of 1, so that its target is 0.

        Args:
            teacher: a function that is called as `teacher(batch, layers)` for each batch, without gradients. `layers`
                is the sorted list of the pairs' teacher layers. It returns two things, on the bank's device: the hidden
                states at these layers, `{layer: [batch, length, teacher_dim]}`, and a mask that is non-zero where a
                position counts, `[batch, length]` or `[batch, 1]`.
            dataloader: the batches of the calibration sample. It is read once, and batches are passed on as they are.
            identity: the teacher's `fingerprint` ([`~teachers.weights_fingerprint`]), without which a trainer refuses
                the bank, and, for readers, its `name` and `revision` on the Hub.

        Returns:
            this bank, frozen.

        Raises:
            ValueError: the bank is frozen already, no position of the sample counts, or a layer's states do not vary.
            FloatingPointError: the teacher's states are not finite.
        """
        if self.frozen:
            raise ValueError("This ProjectionBank is fitted and frozen already; create a new one to calibrate again.")
        layers = sorted({teacher_layer for _, teacher_layer in self._projections})
        moments = dict.fromkeys(self._projections, (0, 0.0, 0.0))
        for batch in dataloader:
            hidden, mask = teacher(batch, layers)
            for pair, projection in self._projections.items():
                states = hidden[pair[1]][mask.expand(hidden[pair[1]].shape[:2]) != 0]
                moments[pair] = _add(moments[pair], _linear(states, projection.weight).double())
        for pair, (count, mean, squares) in moments.items():
            if not count:
                raise ValueError("The calibration sample has no position that counts; give a larger one.")
            std = (squares / count).sqrt()
            if not torch.isfinite(std).all():
                raise FloatingPointError(f"The teacher's hidden states at layer {pair[1]} are not finite.")
            # the last bits of constant states differ by rounding
            varies = std > 1e-6 * (mean.square() + std.square()).sqrt()
            if not varies.any():
                raise ValueError(
                    f"The teacher's hidden states at layer {pair[1]} are the same at all {count} calibration "
                    "positions, so there is nothing to learn from them. Check the teacher and the data."
                )
            projection = self._projections[pair]
            projection.mean = mean.float().to(projection.weight.device)
            projection.std = torch.where(varies, std, 1.0).float().to(projection.weight.device)
        self.metadata["teacher"] = {name: (identity or {}).get(name) for name in _IDENTITY}
        return self.freeze()

    def project(self, student_layer: int, hidden: Tensor) -> Tensor:
        """The student's targets at a layer: the teacher's states, projected and standardised, in float32.

        Args:
            student_layer: of one of the pairs.
            hidden: the teacher's states at that pair's teacher layer, `[..., teacher_dim]`.

        Returns:
            `[..., student_dim]`, in float32 even under autocast.
        """
        projection = self._by_student_layer[student_layer]
        weight = projection.weight / projection.std[:, None]
        return _linear(hidden, weight, -projection.mean / projection.std)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in the file: `layer_{s}_{t}.weight`, `.mean` and `.std` of each pair."""
        return {
            f"layer_{student}_{teacher}.{name}": getattr(projection, name)
            for (student, teacher), projection in self._projections.items()
            for name in ("weight", "mean", "std")
        }

    def to(self, device: torch.device | str) -> ProjectionBank:
        """Move all tensors of this bank to a device; returns this bank."""
        for projection in self._projections.values():
            projection.weight = projection.weight.to(device)
            projection.mean, projection.std = projection.mean.to(device), projection.std.to(device)
        return self

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `projection_bank.safetensors` into a folder, completely or not at all."""
        os.makedirs(folder, exist_ok=True)
        metadata = {name: json.dumps(value) for name, value in self.metadata.items()} | {
            "format_version": FORMAT_VERSION,
            "layer_pairs": json.dumps(self.layer_pairs),
            "frozen": json.dumps(self.frozen),
            "fingerprint": self.fingerprint,
        }
        with replacing(os.path.join(folder, FILE_NAME)) as partial:
            save_file({n: t.cpu().contiguous() for n, t in self.tensors().items()}, partial, metadata=metadata)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | os.PathLike, revision: str | None = None) -> ProjectionBank:
        """Read a bank from a folder or a Hub repository.

        Args:
            folder_or_repo: one that holds `projection_bank.safetensors`, as every folder of a student does.
            revision: the branch, tag or commit of a Hub repository.

        Raises:
            OSError: there is no such folder, repository or file.
            ValueError: the file is damaged, has another format version, or does not match its fingerprint.
        """
        folder = os.fspath(folder_or_repo)
        if not os.path.isdir(folder):
            try:
                folder = snapshot_download(folder, revision=revision, allow_patterns=FILE_NAME)
            except (OSError, ValueError) as error:
                raise OSError(
                    f"{folder!r} is no folder, and there is no such Hub repository within reach ({error}); name the "
                    f"folder or repository that holds {FILE_NAME}."
                ) from error
        path = os.path.join(folder, FILE_NAME)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no {FILE_NAME} in {folder}; it is saved beside each student.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            version, fingerprint = metadata.pop("format_version"), metadata.pop("fingerprint")
            if version == FORMAT_VERSION:
                bank = cls._from_file(tensors, {name: json.loads(value) for name, value in metadata.items()})
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a readable projection bank ({error}); restore the file.") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this library reads {FORMAT_VERSION}, which says which "
                "teacher was measured; create the bank anew from its seed, or use the library's version that wrote it."
            )
        if bank.fingerprint != fingerprint:
            raise ValueError(
                f"{path} does not match the fingerprint it was saved with ({fingerprint[:12]}...): its tensors or "
                "metadata were changed afterwards. Restore the original file."
            )
        return bank

    @classmethod
    def _from_file(cls, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> ProjectionBank:
        pairs, frozen = parse_layer_pairs(metadata.pop("layer_pairs")), metadata.pop("frozen")
        if metadata["kind"] not in PROJECTIONS or not isinstance(frozen, bool):
            raise ValueError(f"its kind is {metadata['kind']!r} and frozen is {frozen!r}")
        measured = metadata["teacher"]
        if measured is not None and (not isinstance(measured, dict) or sorted(measured) != sorted(_IDENTITY)):
            raise ValueError(f"its teacher is {measured!r}")
        projections = {
            (s, t): _Projection(*(tensors[f"layer_{s}_{t}.{name}"] for name in ("weight", "mean", "std")))
            for s, t in pairs
        }
        bank = cls(projections, metadata, frozen)
        if unknown := sorted(tensors.keys() - bank.tensors().keys()):
            raise ValueError(f"tensors {unknown} belong to none of its layer pairs {list(pairs)}")
        for name, tensor in bank.tensors().items():
            matrix = tensors[f"{name.split('.')[0]}.weight"]
            fits = tensor.dim() == 2 if tensor is matrix else tensor.shape == matrix.shape[:1]
            if not fits or tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
            if not tensor.isfinite().all() or (name.endswith(".std") and not (tensor > 0).all()):
                raise ValueError(f"{name} has values that are not finite or deviations that are not positive")
        return bank

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the bank's file to a Hub repository, which is created if needed; returns the commit's address.

        Args:
            kwargs: `token`, `private` (of a new repository), and further arguments of `HfApi.upload_file`.
        """
        api = HfApi(token=kwargs.pop("token", None))
        api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            path = os.path.join(folder, FILE_NAME)
            return str(api.upload_file(path_or_fileobj=path, path_in_repo=FILE_NAME, repo_id=repo_id, **kwargs))

    def _hash(self, names: Sequence[str], described: str = "") -> str:
        digest = hashlib.sha256(described.encode())
        for pair in sorted(self._projections):
            for name in names:
                tensor = getattr(self._projections[pair], name).detach().cpu().contiguous()
                digest.update(f"{pair} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def _add(moments: tuple[int, Any, Any], values: Tensor) -> tuple[int, Any, Any]:
    """Update count, mean and sum of squared deviations by `[positions, dim]` values (Chan et al., 1983)."""
    (before, mean, squares), count = moments, len(values)
    if not count:
        return moments
    own_mean, total = values.mean(0), before + count
    delta = own_mean - mean
    squares = squares + (values - own_mean).square().sum(0) + delta**2 * (before * count / total)
    return total, mean + delta * (count / total), squares


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not torch.is_autocast_enabled(hidden.device.type):
        return F.linear(hidden.float(), weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):  # targets belong to the loss, which is float32
        return F.linear(hidden.float(), weight, bias)


def _pair_seed(seed: int, pair: LayerPair) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {pair[0]} {pair[1]}".encode()).digest()[:8], "big") >> 1


def _draw(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    # Its own CPU generator leaves the global random state, and so the data order, as it is. Rounding from float64 to
    # float32 removes the differences between CPUs, which are in the last bits.
    drawn = {"generator": torch.Generator("cpu").manual_seed(seed), "dtype": torch.float64, "device": "cpu"}
    if kind == "identity":
        if rows > columns:
            raise ValueError(
                f"projection='identity' copies teacher units, but the student has {rows} and the teacher {columns}; "
                "use a random projection for a student that is wider than its teacher."
            )
        return torch.eye(rows, columns, **_STORED)
    if kind == "rademacher":
        return ((torch.randint(0, 2, (rows, columns), **drawn) * 2 - 1) / columns**0.5).float()
    normal = torch.randn(rows, columns, **drawn)
    if kind == "gaussian":
        return (normal / columns**0.5).float()
    basis, triangle = torch.linalg.qr(normal if rows > columns else normal.T)
    basis = basis * triangle.diagonal().sign()  # makes it unique: LAPACKs differ in the signs
    return ((basis * (rows / columns) ** 0.5) if rows > columns else basis.T).float().contiguous()
