"""GPUs by name: what NVIDIA's data sheets promise of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """What a GPU can do at most.

    Args:
        name: of the board.
        peak: operations a second in dense matrix products, in `bfloat16` (float16 has the same) and `float32` (without
            TF32, as torch multiplies by default).
        memory: bytes.
    """

    name: str
    peak: dict[str, float]
    memory: int


# The data sheets "NVIDIA H100 Tensor Core GPU" (SXM), "NVIDIA A100 Tensor Core GPU" (SXM, 80 GB), "NVIDIA L4 Tensor
# Core GPU" and, for the RTX 4090, "NVIDIA Ada GPU Architecture", appendix A, with accumulation in float32 as torch uses
# it. With 2:4 sparsity they name twice the numbers that stand here: 1,979, 624, 242 and 330.4 TFLOPS in bfloat16.
GPUS = {
    "h100": GPU("H100 SXM 80 GB", {"bfloat16": 989.4e12, "float32": 67e12}, 80 * 2**30),
    "a100": GPU("A100 SXM 80 GB", {"bfloat16": 312e12, "float32": 19.5e12}, 80 * 2**30),
    "l4": GPU("L4 24 GB", {"bfloat16": 121e12, "float32": 30.3e12}, 24 * 2**30),
    "rtx4090": GPU("GeForce RTX 4090 24 GB", {"bfloat16": 165.2e12, "float32": 82.6e12}, 24 * 2**30),
}
