"""Triton kernels for training and distilling Mamba models, each with its definition in PyTorch beside it."""

from cab_kernels.bridge.op import bridge_mse, bridge_mse_grouped
from cab_kernels.bridge.reference import bridge_mse_grouped_ref, bridge_mse_ref
from cab_kernels.conv import causal_conv1d_fn, causal_conv1d_ref, causal_conv1d_update, causal_conv1d_update_ref
from cab_kernels.inner.bidirectional import bidirectional_mamba_inner_fn
from cab_kernels.inner.op import mamba_inner_fn
from cab_kernels.inner.reference import bidirectional_mamba_inner_ref, mamba_inner_ref
from cab_kernels.norm import frozen_layer_norm_fn, frozen_layer_norm_ref, rms_norm_fn, rms_norm_ref
from cab_kernels.qk.op import extract_qk
from cab_kernels.qk.reference import HeadNorm, Rope, extract_qk_ref
from cab_kernels.scan.bidirectional import bidirectional_selective_scan_fn, bidirectional_selective_scan_ref
from cab_kernels.scan.op import selective_scan_fn
from cab_kernels.scan.reference import selective_scan_ref
from cab_kernels.scan.step import selective_state_update, selective_state_update_ref

__all__ = [
    "HeadNorm",
    "Rope",
    "bidirectional_mamba_inner_fn",
    "bidirectional_mamba_inner_ref",
    "bidirectional_selective_scan_fn",
    "bidirectional_selective_scan_ref",
    "bridge_mse",
    "bridge_mse_grouped",
    "bridge_mse_grouped_ref",
    "bridge_mse_ref",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "extract_qk",
    "extract_qk_ref",
    "frozen_layer_norm_fn",
    "frozen_layer_norm_ref",
    "mamba_inner_fn",
    "mamba_inner_ref",
    "rms_norm_fn",
    "rms_norm_ref",
    "selective_scan_fn",
    "selective_scan_ref",
    "selective_state_update",
    "selective_state_update_ref",
]
