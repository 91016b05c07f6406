"""Operations that a device computes in a second, from which a plan's times follow."""

from __future__ import annotations

import time

import torch

from hf_curriculum_distill.config import CurriculumDistillationConfig
from hf_curriculum_distill.planning.arguments import PlanArguments
from hf_curriculum_distill.planning.gpus import GPUS


def find_rate(options: PlanArguments, args: CurriculumDistillationConfig) -> tuple[float | None, str]:
    """Find the rate of one device: the one given, or a share of its peak or of what it reaches in matrix products.

    Args:
        options: `flops_per_second`; or `gpu` or `measure`, and `utilisation`; or none of them.
        args: with the precision and the device of the run.

    Returns:
        Operations per second, None if nothing is known about them; and a line that says where the number comes from.
    """
    if options.flops_per_second is not None:
        return options.flops_per_second, f"time: at {options.flops_per_second:.3g} FLOP/s a device, as given"
    if options.gpu is not None:
        gpu, dtype = GPUS[options.gpu], "bfloat16" if args.bf16 or args.fp16 else "float32"
        ceiling, described = gpu.peak[dtype], f"the {dtype} peak of its data sheet, without sparsity ({gpu.name})"
    elif options.measure is not None:
        ceiling, described = _measure_products(options.measure, args)
    else:
        return None, "time: give --gpu or --flops_per_second, or --measure SECONDS on the machine that will train"
    return options.utilisation * ceiling, (
        f"time: at {options.utilisation:g} (an assumption: --utilisation) of {ceiling:.3g} FLOP/s a device, {described}"
    )


def _measure_products(seconds: float, args: CurriculumDistillationConfig) -> tuple[float, str]:
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    on_cpu = args.use_cpu or not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    size = 1024 if on_cpu else 8192
    matrix = torch.ones(size, size, dtype=dtype, device=device)

    def multiply() -> None:
        matrix @ matrix
        if not on_cpu:
            torch.accelerator.synchronize()

    multiply()  # warms up
    num_products, start = 0, time.perf_counter()
    while not num_products or time.perf_counter() - start < seconds:
        multiply()
        num_products += 1
    rate = 2 * size**3 * num_products / (time.perf_counter() - start)
    return rate, f"measured here: {str(dtype).split('.')[1]} products of {size} x {size} matrices on {device.type}"
