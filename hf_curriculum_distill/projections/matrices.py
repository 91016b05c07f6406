"""The kinds of matrices: drawn from a seed, or the principal directions of the teacher's states."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_curriculum_distill.projections.moments import NOT_ROUNDING, Moments
from hf_curriculum_distill.stages import LayerPair

DRAWN = ("gaussian", "rademacher", "orthogonal", "identity")
MEASURED = ("pca", "rotated_pca")
PROJECTIONS = DRAWN + MEASURED
STORED = {"dtype": torch.float32, "device": "cpu"}  # regardless of torch's default dtype and device


def make_matrix(kind: str, rows: int, columns: int, seed: int, pair: LayerPair) -> Tensor:
    """The matrix `[rows, columns]` of a kind, in float32; zeros for a kind that is yet to be measured.

    It depends on the arguments alone, on every machine.

    Raises:
        ValueError: the kind gives no more rows than columns.
    """
    if kind == "identity":
        if rows > columns:
            raise ValueError(
                f"projection='identity' copies teacher units, but the student has {rows} and the teacher {columns}; "
                "use a random projection for a student that is wider than its teacher."
            )
        return torch.eye(rows, columns, **STORED)
    if kind in MEASURED:
        if rows > columns:
            raise ValueError(
                f"projection={kind!r} finds as many directions as the teacher has units, {columns}, but the student "
                f"has {rows}; use a random projection, such as 'orthogonal', for a student that is wider than its "
                "teacher."
            )
        return torch.zeros(rows, columns, **STORED)
    seed = _pair_seed(seed, pair)
    if kind == "orthogonal":
        return _orthogonal(rows, columns, seed).float().contiguous()
    if kind == "rademacher":
        return ((torch.randint(0, 2, (rows, columns), **_drawn(seed)) * 2 - 1) / columns**0.5).float()
    return (torch.randn(rows, columns, **_drawn(seed)) / columns**0.5).float()


def principal_matrices(
    states: Mapping[int, Moments], shapes: Mapping[LayerPair, tuple[int, int]], kind: str, seed: int, shared: bool
) -> dict[LayerPair, Tensor]:
    """The matrices whose rows are the principal directions of hidden states, those of the largest variance first.

    A row is zero where the states vary in fewer directions. With kind "rotated_pca" the directions are mixed by a
    random rotation, which makes the variances of the rows' products about equal.

    Args:
        states: the moments, with products and in float64, of the states at each teacher layer.
        shapes: `[rows, columns]` of the matrix of each `(student_layer, teacher_layer)` pair.
        kind: one of `MEASURED`.
        seed: of the rotations.
        shared: whether pairs with the same shape have the same matrix, that of the pooled covariance of their layers:
            deviations are those from each layer's own mean.

    Returns:
        the matrix of each pair, in float32.
    """
    groups: dict[Any, list[LayerPair]] = {}
    for pair, shape in shapes.items():
        groups.setdefault(shape if shared else pair, []).append(pair)
    matrices = {}
    for pairs in groups.values():
        rows, layers = shapes[pairs[0]][0], sorted({layer for _, layer in pairs})
        matrix = _principal_directions([states[layer] for layer in layers], rows)
        if kind == "rotated_pca":
            matrix = _orthogonal(rows, rows, _pair_seed(seed, (0, 0) if shared else pairs[0])) @ matrix
        matrices |= {pair: matrix.to(torch.float32, copy=True).contiguous() for pair in pairs}
    return matrices


def _principal_directions(layers: Sequence[Moments], rows: int) -> Tensor:
    count = sum(moments.count for moments in layers)
    covariance = sum(moments.scatter for moments in layers).cpu() / count
    size = covariance.trace() + sum(moments.count * moments.mean.square().sum() for moments in layers).cpu() / count
    variances, vectors = torch.linalg.eigh(covariance)  # in increasing order
    directions, variances = vectors.T.flip(0)[:rows], variances.flip(0)[:rows]
    # LAPACKs differ in the signs: make the largest entry, of equally large ones the first, positive
    sizes = directions.abs()
    largest = (sizes > (1 - 1e-6) * sizes.amax(1, keepdim=True)).int().argmax(1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    return directions * (variances > NOT_ROUNDING**2 * size)[:, None]


def _pair_seed(seed: int, pair: LayerPair) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {pair[0]} {pair[1]}".encode()).digest()[:8], "big") >> 1


def _orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    normal = torch.randn(rows, columns, **_drawn(seed))
    basis, triangle = torch.linalg.qr(normal if rows > columns else normal.T)
    basis = basis * triangle.diagonal().sign()  # makes it unique: LAPACKs differ in the signs
    return basis * (rows / columns) ** 0.5 if rows > columns else basis.T


def _drawn(seed: int) -> dict[str, Any]:
    # Its own CPU generator leaves the global random state, and so the data order, as it is. Rounding from float64 to
    # float32 removes the differences between CPUs, which are in the last bits.
    return {"generator": torch.Generator("cpu").manual_seed(seed), "dtype": torch.float64, "device": "cpu"}
