"""How well a language model predicts far into a sequence: its loss against the position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cab.students.language import PlainLanguageModel

_TOKENS_AT_A_TIME = 1024  # whose logits exist together


@torch.no_grad()
def loss_by_position(
    model: PlainLanguageModel, stream: Tensor, length: int, vocab_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The mean cross-entropy of each position of sequences of one length, float64 (length - 1,).

    The text is cut into sequences that share no token; each is read from its beginning. Entry i is the loss of
    predicting the token at position i + 1 from all those before it, in nats.

    Args:
        model: on ``device``, in evaluation mode.
        stream: (tokens,) of text, at least ``length``; a shorter rest is left out.
        length: of a sequence.
        vocab_size: logits that count, the first ones.
        device: of the model.
    """
    sequences = stream[: len(stream) // length * length].view(-1, length).long()
    total = torch.zeros(length - 1, dtype=torch.float64)
    for sequence in sequences.to(device):
        hidden = model(sequence[None])[0, :-1]
        losses = [
            F.cross_entropy(model.logits(part)[:, :vocab_size].float(), following, reduction="none")
            for part, following in zip(
                hidden.split(_TOKENS_AT_A_TIME), sequence[1:].split(_TOKENS_AT_A_TIME), strict=True
            )
        ]
        total += torch.cat(losses).double().cpu()
    return total / len(sequences)
