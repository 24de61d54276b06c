"""Causal depthwise convolution over time with SiLU, in training and a step at a time."""

from cab_kernels.conv.op import causal_conv1d_fn
from cab_kernels.conv.reference import causal_conv1d_ref
from cab_kernels.conv.step import causal_conv1d_update, causal_conv1d_update_ref

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref", "causal_conv1d_update", "causal_conv1d_update_ref"]
