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
_STORED = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


@dataclass
class _Projection:
    weight: Tensor  # [student_dim, teacher_dim]
    mean: Tensor  # [student_dim], of the projected states on the calibration sample
    std: Tensor  # [student_dim]


class ProjectionBank:
    """One fixed random matrix for each `(student_layer, teacher_layer)` pair, and how its outputs are standardised.

    Made by [`create`], measured once by [`fit`], then frozen: `project` never changes it, and a second `fit` raises.
    What was measured belongs to the teacher that it was measured on; matrices that were drawn alone belong to none.
    Gupta & Karmalkar (2025) project the teacher's hidden states with fixed random matrices; that targets are
    standardised with a calibration sample's mean and standard deviation is our choice.

    ```python
    >>> bank = ProjectionBank.create([(1, 2)], student_dims=[4], teacher_dims=[8], kind="gaussian", seed=0)
    >>> bank.project(1, torch.ones(2, 3, 8)).shape
    torch.Size([2, 3, 4])

    ```

    Attributes:
        metadata: `kind`, `seed` and `shared` as given to [`create`]; `teacher`, whom [`fit`] measured, or None.
        frozen: whether it has been measured, or taken as it is.
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
        """Draw one matrix `[student_dim, teacher_dim]` a pair.

        Entries of `gaussian` and `rademacher` have variance `1 / teacher_dim`; `orthogonal` has orthonormal rows (or
        scaled orthonormal columns, where the student is wider); `identity` copies the first `student_dim` units.
        A pair's matrix depends on the seed and the pair alone, on every machine; with `shared` on the seed alone, so
        that pairs of the same dims have the same matrix. In a residual stream one layer's states are mostly the next
        one's: a shared matrix keeps them in one basis, where a matrix for each layer makes every stage learn another.

        Raises:
            ValueError: unknown kind, dims that do not match the pairs, or `identity` for a student that is wider.
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
        return tuple(self._projections)

    @property
    def shapes(self) -> dict[LayerPair, tuple[int, int]]:
        """`{(student_layer, teacher_layer): (student_dim, teacher_dim)}`."""
        return {pair: tuple(p.weight.shape) for pair, p in self._projections.items()}

    def check_fits(
        self, pairs: Iterable[LayerPair], student_dim: int, teacher_dim: int, teacher_fingerprint: str | None
    ) -> None:
        """Raise a `ValueError` unless there is a `[student_dim, teacher_dim]` matrix for each pair.

        Args:
            teacher_fingerprint: the teacher's [`~teachers.weights_fingerprint`], which a bank that was measured must
                have been measured on; None for a teacher that changes while it teaches.
        """
        missing = [pair for pair in pairs if self.shapes.get(pair) != (student_dim, teacher_dim)]
        if missing:
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
        """SHA-256 over every pair, matrix, mean and standard deviation, to the bit, and all the metadata."""
        described = json.dumps({**self.metadata, "frozen": self.frozen}, sort_keys=True)
        return self._hash(("weight", "mean", "std"), described)

    @property
    def matrix_fingerprint(self) -> str:
        """SHA-256 over the pairs and matrices alone: what the seed determines, before any calibration."""
        return self._hash(("weight",))

    def freeze(self) -> ProjectionBank:
        """Take the bank as it is, targets unstandardised."""
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

        Args:
            teacher: `teacher(batch, layers)` returns `{layer: [batch, length, teacher_dim]}` and a mask
                `[batch, length]`, non-zero where a position counts.
            dataloader: the calibration sample's batches.
            identity: who is measured, as [`~teachers.Teacher`]'s `identity` says it: `fingerprint` (of the
                weights: [`~teachers.weights_fingerprint`]) and, for the reader, the `name` and `revision` of a model on
                the Hub. A bank that wasn't told is of no use to a trainer, which cannot know whether it fits.

        A coordinate that never varies keeps a standard deviation of 1, so that its target is 0.

        Raises:
            ValueError: the bank is frozen already, the sample is empty, or a layer's states do not vary at all.
            FloatingPointError: the teacher's states are not finite.
        """
        if self.frozen:
            raise ValueError("This ProjectionBank is fitted and frozen already; create a new one to calibrate again.")
        layers = sorted({teacher_layer for _, teacher_layer in self._projections})
        moments = {pair: _Moments() for pair in self._projections}
        for batch in dataloader:
            hidden, mask = teacher(batch, layers)
            for pair, projection in self._projections.items():
                states = hidden[pair[1]][mask.expand(hidden[pair[1]].shape[:2]) != 0]
                moments[pair].add(_linear(states, projection.weight).double())
        for pair, moment in moments.items():
            if not moment.count:
                raise ValueError("The calibration sample has no position that counts; give a larger one.")
            std = (moment.squares / moment.count).sqrt()
            if not torch.isfinite(std).all():
                raise FloatingPointError(f"The teacher's hidden states at layer {pair[1]} are not finite.")
            # rounding alone makes constant states differ in their last bits
            varies = std > 1e-6 * (moment.mean.square() + std.square()).sqrt()
            if not varies.any():
                raise ValueError(
                    f"The teacher's hidden states at layer {pair[1]} are the same at all {moment.count} calibration "
                    "positions, so there is nothing to learn from them. Check the teacher and the data."
                )
            projection = self._projections[pair]
            projection.mean = moment.mean.float().to(projection.weight.device)
            projection.std = torch.where(varies, std, 1.0).float().to(projection.weight.device)
        self.metadata["teacher"] = {name: (identity or {}).get(name) for name in _IDENTITY}
        return self.freeze()

    def project(self, student_layer: int, hidden: Tensor) -> Tensor:
        """Standardised projection of teacher states: `[..., teacher_dim]` -> `[..., student_dim]`, float32."""
        projection = self._by_student_layer[student_layer]
        weight = projection.weight / projection.std[:, None]
        return _linear(hidden, weight, -projection.mean / projection.std)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in the file."""
        return {
            f"layer_{student}_{teacher}.{name}": getattr(projection, name)
            for (student, teacher), projection in self._projections.items()
            for name in ("weight", "mean", "std")
        }

    def to(self, device: torch.device | str) -> ProjectionBank:
        """Move the bank's tensors in place."""
        for projection in self._projections.values():
            projection.weight = projection.weight.to(device)
            projection.mean, projection.std = projection.mean.to(device), projection.std.to(device)
        return self

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `projection_bank.safetensors` into a folder, whole or not at all."""
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, FILE_NAME)
        metadata = {name: json.dumps(value) for name, value in self.metadata.items()} | {
            "format_version": FORMAT_VERSION,
            "layer_pairs": json.dumps(self.layer_pairs),
            "frozen": json.dumps(self.frozen),
            "fingerprint": self.fingerprint,
        }
        with replacing(path) as partial:
            save_file({n: t.cpu().contiguous() for n, t in self.tensors().items()}, partial, metadata=metadata)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | os.PathLike, revision: str | None = None) -> ProjectionBank:
        """Read a bank from a folder or a Hub repository.

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged, was written by a newer format, or does not match its fingerprint.
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
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is not a readable projection bank ({error}); restore the file.") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this library reads {FORMAT_VERSION}, which says which "
                "teacher was measured; create the bank anew from its seed, or use the library's version that wrote it."
            )
        try:
            bank = cls._from_file(tensors, {name: json.loads(value) for name, value in metadata.items()})
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a readable projection bank ({error}); restore the file.") from error
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
        """Upload the bank's file to a Hub repository (created if needed); returns the commit's address."""
        api = HfApi(token=kwargs.pop("token", None))
        api.create_repo(repo_id, exist_ok=True, private=kwargs.pop("private", None))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(
                api.upload_file(
                    path_or_fileobj=os.path.join(folder, FILE_NAME), path_in_repo=FILE_NAME, repo_id=repo_id, **kwargs
                )
            )

    def _hash(self, names: Sequence[str], described: str = "") -> str:
        digest = hashlib.sha256(described.encode())
        for pair in sorted(self._projections):
            for name in names:
                tensor = getattr(self._projections[pair], name).detach().cpu().contiguous()
                digest.update(f"{pair} {name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


class _Moments:
    """Running mean and sum of squared deviations (Chan et al., 1983), float64: no cancellation, one pass."""

    def __init__(self):
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """values: `[positions, dim]`."""
        if not len(values):
            return
        count, mean = len(values), values.mean(0)
        delta, total = mean - self.mean, self.count + count
        self.squares = self.squares + (values - mean).square().sum(0) + delta**2 * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # targets are part of the loss: float32 even under autocast
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), weight, bias)


def _pair_seed(seed: int, pair: LayerPair) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {pair[0]} {pair[1]}".encode()).digest()[:8], "big") >> 1


def _draw(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    # A CPU generator of its own leaves the global random state, hence the data order, alone; float64 rounded to
    # float32 hides the last-bit differences between CPUs.
    drawn = {"generator": torch.Generator("cpu").manual_seed(seed), "dtype": torch.float64, "device": "cpu"}
    if kind == "identity":
        if rows > columns:
            raise ValueError(
                f"projection='identity' copies teacher units, but the student has {rows} and the teacher {columns}; "
                "use a random projection for a student that is wider than its teacher."
            )
        return torch.eye(rows, columns, **_STORED)
    if kind == "rademacher":
        signs = torch.randint(0, 2, (rows, columns), **drawn) * 2 - 1
        return (signs / columns**0.5).float()
    normal = torch.randn(rows, columns, **drawn)
    if kind == "gaussian":
        return (normal / columns**0.5).float()
    tall = normal if rows > columns else normal.T
    basis, triangle = torch.linalg.qr(tall)
    basis = basis * triangle.diagonal().sign()  # unique, whatever the LAPACK
    return ((basis * (rows / columns) ** 0.5) if rows > columns else basis.T).float().contiguous()
