"""Packed documents: where they begin and end, told by positions that start again with each of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(position_ids: Tensor) -> Tensor:
    """Which tokens are the first of their document, bool (batch, tokens).

    Args:
        position_ids: (batch, tokens), of each token in its document. A row begins a document, and so does every token
            whose position is not its predecessor's plus 1, as in transformers.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return starts


def document_bounds(position_ids: Tensor) -> Tensor:
    """``cu_seqlens`` of the documents, int32 (documents + 1,), when the rows lie end to end."""
    starts = document_starts(position_ids).flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=position_ids.numel()).int()
