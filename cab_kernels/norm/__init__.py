"""Residual add and root-mean-square norm in one pass."""

from cab_kernels.norm.op import rms_norm_fn
from cab_kernels.norm.reference import rms_norm_ref

__all__ = ["rms_norm_fn", "rms_norm_ref"]
