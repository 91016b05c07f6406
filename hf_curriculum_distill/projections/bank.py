"""The bank of fixed projections of the teacher's hidden states: made, measured once, frozen, saved and read."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_curriculum_distill.files import replacing
from hf_curriculum_distill.projections.files import FILE_NAME, find_file, upload_file
from hf_curriculum_distill.projections.matrices import MEASURED, PROJECTIONS, STORED, make_matrix, principal_matrices
from hf_curriculum_distill.projections.moments import apply_matrix, measure
from hf_curriculum_distill.stages import LayerPair, parse_layer_pairs

FORMAT_VERSION = "2"
_IDENTITY = ("fingerprint", "name", "revision")


@dataclass
class _Projection:
    weight: Tensor  # [student_dim, teacher_dim]; of a PCA 0 before `fit`
    mean: Tensor  # [student_dim], of the calibration sample's projected states; 0 before `fit`
    std: Tensor  # [student_dim]; 1 before `fit`


class ProjectionBank:
    """One fixed matrix for each `(student_layer, teacher_layer)` pair, with the statistics of its outputs.

    [`create`] draws the matrices, [`fit`] measures mean and standard deviation of their outputs once and freezes the
    bank: nothing changes it afterwards, and a second `fit` raises. A bank that was measured fits only the teacher that
    it was measured on; a bank that was frozen without that fits any. The matrices of a PCA are measured, too.

    Gupta & Karmalkar (2025, arXiv 2503.17494) project the teacher's hidden states with fixed random matrices; to
    standardise the targets and to offer a PCA is our choice.

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

    def __repr__(self) -> str:
        return f"ProjectionBank({self.metadata}, frozen={self.frozen}, shapes={self.shapes})"

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
        """Draw one matrix `[student_dim, teacher_dim]` for each pair, or leave it to [`fit`].

        A matrix that is drawn depends on the seed and its pair alone, on every machine; with `shared` on the seed
        alone. Most of what a residual stream holds at one layer is there at the next: a shared matrix keeps it in one
        basis, while separate ones make each stage learn another.

        Args:
            layer_pairs: `(student_layer, teacher_layer)` pairs, each student layer once.
            student_dims, teacher_dims: the hidden sizes at each pair's layers, in the order of the pairs.
            kind: "gaussian" or "rademacher", with entries of variance `1 / teacher_dim`; "orthogonal", with orthonormal
                rows (for a wider student, scaled orthonormal columns); "identity", which copies the first units; "pca",
                whose rows are the directions in which the teacher's states vary most; "rotated_pca", the same
                directions mixed by a random rotation. Standardised, the products of a "pca" are whitened: small
                directions count as much as large ones, while those of a "rotated_pca" keep their relative sizes.
            shared: whether pairs with the same dims have the same matrix; that of a PCA is then found from the
                covariances of their teacher layers, pooled.

        Returns:
            a bank that is not frozen.

        Raises:
            ValueError: the kind is unknown, the dims do not match the pairs, or a student is wider than its teacher
                and the kind is "identity" or a PCA.
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
            weight = make_matrix(kind, student_dim, teacher_dim, seed, (0, 0) if shared else pair)
            mean, std = (torch.full((student_dim,), value, **STORED) for value in (0.0, 1.0))
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

    @property
    def lacks_matrices(self) -> bool:
        """Whether the matrices are those of a PCA, and [`fit`] has yet to find them."""
        return self.metadata["kind"] in MEASURED and self.metadata["teacher"] is None

    def check_fits(
        self, pairs: Iterable[LayerPair], student_dim: int, teacher_dim: int, teacher_fingerprint: str | None
    ) -> None:
        """Check that the bank can project this teacher's states for this student.

        Args:
            pairs: the `(student_layer, teacher_layer)` pairs that are needed.
            student_dim, teacher_dim: the models' hidden sizes.
            teacher_fingerprint: of its weights ([`~teachers.weights_fingerprint`]); None if they change.

        Raises:
            ValueError: a pair has no `[student_dim, teacher_dim]` matrix, the bank was measured on another teacher, or
                matrices are to be measured on a teacher that changes.
        """
        if missing := [pair for pair in pairs if self.shapes.get(pair) != (student_dim, teacher_dim)]:
            raise ValueError(
                f"The projection bank does not fit: layer pairs {missing} need [{student_dim}, {teacher_dim}] matrices "
                f"(student, teacher), but it has {self.shapes}. Create it for this layer map and these models."
            )
        if self.lacks_matrices and teacher_fingerprint is None:
            raise ValueError(
                f"The matrices of a {self.metadata['kind']!r} projection are measured on the teacher before the first "
                "step, but the teacher changes while it teaches; use a random projection, such as 'orthogonal'."
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
        """SHA-256 over pairs and matrices alone, which the seed determines; of a PCA, over what it is measured for."""
        if self.metadata["kind"] in MEASURED:
            made_of = self.metadata["kind"], self.metadata["seed"], self.metadata["shared"], sorted(self.shapes.items())
            return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        return self._hash(("weight",))

    def freeze(self) -> ProjectionBank:
        """Freeze the bank as it is; before [`fit`] that leaves the targets unstandardised. Returns this bank.

        Raises:
            ValueError: the matrices are yet to be found by [`fit`].
        """
        self._check_has_matrices()
        self.frozen = True
        return self

    @torch.no_grad()
    def fit(
        self,
        teacher: Callable[[Any, Sequence[int]], tuple[Mapping[int, Tensor], Tensor]],
        dataloader: Iterable[Any],
        identity: Mapping[str, str | None] | None = None,
        standardize: bool = True,
    ) -> ProjectionBank:
        """Measure mean and standard deviation of the projected teacher states, then freeze the bank.

        A coordinate that does not vary keeps a standard deviation of 1, so that its target is 0. Of a PCA, the same
        sample gives the matrices.

        Args:
            teacher: a function that is called as `teacher(batch, layers)` for each batch, without gradients. `layers`
                is the sorted list of the pairs' teacher layers. It returns two things, on the bank's device: the hidden
                states at these layers, `{layer: [batch, length, teacher_dim]}`, and a mask that is non-zero where a
                position counts, `[batch, length]` or `[batch, 1]`.
            dataloader: the batches of the calibration sample. It is read once, and batches are passed on as they are.
            identity: the teacher's `fingerprint` ([`~teachers.weights_fingerprint`]), without which a trainer refuses
                the bank, and, for readers, its `name` and `revision` on the Hub.
            standardize: whether targets are standardised; if not, mean and deviation stay 0 and 1.

        Returns:
            this bank, frozen.

        Raises:
            ValueError: the bank is frozen already, no position of the sample counts, a layer's states do not vary, or a
                PCA has no more positions than directions.
            FloatingPointError: the teacher's states are not finite.
        """
        if self.frozen:
            raise ValueError("This ProjectionBank is fitted and frozen already; create a new one to calibrate again.")
        finds_matrices, layers = self.metadata["kind"] in MEASURED, sorted({layer for _, layer in self._projections})
        if finds_matrices:
            states = measure(teacher, dataloader, {layer: layer for layer in layers}, products=True)
            settings = (self.metadata[name] for name in ("kind", "seed", "shared"))
            for pair, matrix in principal_matrices(states, self.shapes, *settings).items():
                self._projections[pair].weight = matrix.to(self._projections[pair].weight.device)
            outputs = {pair: states[pair[1]].projected(p.weight.double()) for pair, p in self._projections.items()}
        else:
            weights = {pair: projection.weight for pair, projection in self._projections.items()}
            outputs = measure(
                teacher,
                dataloader,
                {pair: pair[1] for pair in weights},
                lambda pair, states: apply_matrix(states, weights[pair]),
            )
        for pair, own in outputs.items():
            projection = self._projections[pair]
            if not own.varies.any():
                raise ValueError(
                    f"The teacher's hidden states at layer {pair[1]} are the same at all {own.count} calibration "
                    "positions, so there is nothing to learn from them. Check the teacher and the data."
                )
            if finds_matrices and own.count <= len(own.mean):
                raise ValueError(
                    f"The calibration sample has {own.count} positions that count, in which no {len(own.mean)} "
                    "principal directions can be found; raise calibration_samples, or use a random projection."
                )
            if standardize:
                projection.mean = own.mean.float().to(projection.weight.device)
                projection.std = torch.where(own.varies, own.std, 1.0).float().to(projection.weight.device)
        self.metadata["teacher"] = {name: (identity or {}).get(name) for name in _IDENTITY}
        return self.freeze()

    def _check_has_matrices(self) -> None:
        if self.lacks_matrices:
            raise ValueError(
                f"The matrices of a {self.metadata['kind']!r} projection are found by ProjectionBank.fit, which has "
                "not been called; fit the bank first, or use a random projection."
            )

    def project(self, student_layer: int, hidden: Tensor) -> Tensor:
        """The student's targets at a layer: the teacher's states, projected and standardised, in float32.

        Args:
            student_layer: of one of the pairs.
            hidden: the teacher's states at that pair's teacher layer, `[..., teacher_dim]`.

        Returns:
            `[..., student_dim]`, in float32 even under autocast.

        Raises:
            ValueError: the matrices are yet to be found by [`fit`].
        """
        self._check_has_matrices()
        projection = self._by_student_layer[student_layer]
        weight = projection.weight / projection.std[:, None]
        return apply_matrix(hidden, weight, -projection.mean / projection.std)

    def project_output(self, output: Tensor) -> Tensor:
        """The teacher's embeddings, `[batch, teacher_dim]`, in the student's width: by the highest student layer's
        matrix, but not standardised; where both widths are equal, as they are."""
        self._check_has_matrices()
        weight = self._by_student_layer[max(self._by_student_layer)].weight
        return output.float() if weight.shape[0] == weight.shape[1] else apply_matrix(output, weight)

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
        path = find_file(folder_or_repo, revision)
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
        if frozen and measured is None and metadata["kind"] in MEASURED:
            raise ValueError(f"its kind is {metadata['kind']!r}, but it was measured on no teacher")
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
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload_file(folder, repo_id, **kwargs)

    def _hash(self, names: Sequence[str], described: str = "") -> str:
        digest = hashlib.sha256(described.encode())
        for pair in sorted(self._projections):
            for name in names:
                tensor = getattr(self._projections[pair], name).detach().cpu().contiguous()
                digest.update(f"{pair} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()
