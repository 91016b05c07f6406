"""What the empirical tangent kernel of 512 digits costs, for ResNets of three sizes, in seconds of one core.

OMP_NUM_THREADS=1 python benchmarks/tangent_kernel.py
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, ResNetConfig, ResNetForImageClassification, set_seed

from hf_curriculum_distill import empirical_ntk
from hf_curriculum_distill.tasks.images import read_images

SIZES = ((1, 4), (1, 8), (3, 8))  # blocks of each of three stages, channels of the first


@dataclass
class Arguments:
    examples: int = field(default=512, metadata={"help": "Held-out digits, 16 x 16 pixels, 10 classes."})
    chunk_size: int = field(default=20_000, metadata={"help": "Parameters whose Jacobian is in memory at a time."})


def main():
    [args] = HfArgumentParser([Arguments]).parse_args_into_dataclasses()
    _, heldout, _ = read_images("digits", 16)
    pixels = torch.stack([heldout[index]["pixel_values"] for index in range(args.examples)])
    print("parameters | CPU seconds | seconds")
    for blocks, width in SIZES:
        set_seed(0)
        sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width, 4 * width], "depths": [blocks] * 3}
        config = ResNetConfig(num_channels=1, num_labels=10, layer_type="basic", **sizes)
        model = ResNetForImageClassification(config)
        start, cpu = time.perf_counter(), time.process_time()
        empirical_ntk(model, {"pixel_values": pixels}, "trace", chunk_size=args.chunk_size)
        print(f"{model.num_parameters():,} | {time.process_time() - cpu:.1f} | {time.perf_counter() - start:.1f}")


if __name__ == "__main__":
    main()
