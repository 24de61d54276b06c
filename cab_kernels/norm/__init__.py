"""Residual add and root-mean-square norm in one pass, and layer norm for frozen models."""

from cab_kernels.norm.layer import frozen_layer_norm_fn, frozen_layer_norm_ref
from cab_kernels.norm.op import rms_norm_fn
from cab_kernels.norm.reference import rms_norm_ref

__all__ = ["frozen_layer_norm_fn", "frozen_layer_norm_ref", "rms_norm_fn", "rms_norm_ref"]
