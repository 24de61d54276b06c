"""Causal depthwise convolution over time with SiLU."""

from cab_kernels.conv.op import causal_conv1d_fn
from cab_kernels.conv.reference import causal_conv1d_ref

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref"]
