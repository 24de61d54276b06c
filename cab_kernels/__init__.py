"""Triton kernels for training and distilling Mamba models, each with its definition in PyTorch beside it."""

from cab_kernels.conv import causal_conv1d_fn, causal_conv1d_ref, causal_conv1d_update, causal_conv1d_update_ref
from cab_kernels.scan.op import selective_scan_fn
from cab_kernels.scan.reference import selective_scan_ref
from cab_kernels.scan.step import selective_state_update, selective_state_update_ref

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]
