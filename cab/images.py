"""Images as a model of timm wants them."""

from __future__ import annotations

from typing import Any

import timm.data
import torch.nn.functional as F
from torch import Tensor, nn


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of a timm model's images: as it was built, or else as it was published."""
    patches: Any = getattr(model, "patch_embed", None)
    channels, *published = timm.data.resolve_data_config(model=model)["input_size"]
    height, width = getattr(patches, "img_size", None) or published
    return channels, height, width


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (batch, channels, height, width), values in [0, 1], of another height and width where theirs differ."""
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
