"""Logits of last hidden states, as a causal language model of transformers makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def logits_of(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of last hidden states (..., width): output embeddings, then scale and soft cap.

    The two are known by the names that the families have for them (Cohere and Granite; Gemma); whoever relies on this
    for an unknown model compares it with the model's own logits once.
    """
    causal: Any = model
    config = causal.config.get_text_config()
    logits = causal.get_output_embeddings()(hidden)
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return softcap * torch.tanh(logits / softcap) if softcap else logits
