"""One micro-batch: what it holds, whether it can be used, whose random draws it carries."""

from hf_curriculum_distill.batches.batch import Batch, BatchReader
from hf_curriculum_distill.batches.seeding import SeededBatches, SeededSampler, seed_batches, seeded

__all__ = ["Batch", "BatchReader", "SeededBatches", "SeededSampler", "seed_batches", "seeded"]
