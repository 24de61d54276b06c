"""Triton kernels for training and distilling Mamba models, each with its definition in PyTorch beside it."""
