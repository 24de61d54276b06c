"""Models of transformers that stay where they are: quantised, or spread over devices by ``device_map``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def stays(model: nn.Module) -> bool:
    """Whether neither the device nor the dtype of a model may change."""
    return getattr(model, "is_quantized", False) or hasattr(model, "hf_device_map")


def entrance(model: nn.Module) -> torch.device:
    """Where tokens go in. A hook of accelerate knows it where weights are not there until they are needed."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if device is None else torch.device(device)
