"""Bytes at the worst moment of some operations."""

from hf_curriculum_distill.cost import PeakMemory

__all__ = ["PeakMemory"]
