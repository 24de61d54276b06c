"""Triton kernels for training and distilling Mamba models, each with its definition in PyTorch beside it."""

from cab_kernels.conv import causal_conv1d_fn, causal_conv1d_ref

__all__ = ["causal_conv1d_fn", "causal_conv1d_ref"]
