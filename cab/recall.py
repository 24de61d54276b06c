"""How well a language model recalls what it has just read: multi-query associative recall (MQAR, arXiv:2312.04927)."""

from __future__ import annotations

import torch
from torch import Tensor

from cab.students.language import PlainLanguageModel

PAIRS = (4, 8, 16, 32, 64, 128, 256)
SEQUENCES = 64
_QUERIES_AT_A_TIME = 1024  # whose logits exist together


def mqar(pairs: int, sequences: int, known: Tensor, generator: torch.Generator) -> Tensor:
    """Sequences that tell pairs of key and value and then repeat them in another order, (sequences, 4 * pairs).

    ::

        k1 v1 k2 v2 ... kN vN   k3 v3 k1 v1 ...

    Keys and values of a sequence are all different, so that in the second half nothing but the first occurrence of a
    key tells its value. In the paper each key is asked for in the same way, at gaps that follow a power law.

    Args:
        pairs: N.
        sequences: how many.
        known: (tokens,) different tokens to draw from, at least 2 N.
        generator: on the CPU.

    Source: arXiv:2312.04927, section 4.
    """
    drawn = torch.rand(sequences, len(known), generator=generator).argsort(1)[:, : 2 * pairs]
    told = known[drawn].view(sequences, pairs, 2)
    order = torch.rand(sequences, pairs, generator=generator).argsort(1)
    asked = told.gather(1, order.unsqueeze(-1).expand_as(told))
    return torch.cat((told, asked), dim=1).flatten(1)


@torch.no_grad()
def recall(model: PlainLanguageModel, pairs: int, known: Tensor, device: torch.device | str = "cpu") -> float:
    """The share of the keys asked for in :func:`mqar` after which the model finds their value the likeliest of all N.

    It learns nothing for it: what is measured is what it does in its context. Only the values of the sequence compete,
    since a model that was trained on text cannot know that one of them must come next. Chance is 1 / N.

    Args:
        model: on ``device``, in evaluation mode.
        pairs: N.
        known: (tokens,) different tokens to draw from, int64 on the CPU.
        device: of the model.
    """
    sequences = mqar(pairs, SEQUENCES, known, torch.Generator().manual_seed(pairs)).to(device)
    right = 0
    for part in sequences.split(max(_QUERIES_AT_A_TIME // pairs, 1)):
        told, values = part[:, 1 : 2 * pairs : 2], part[:, 2 * pairs + 1 :: 2]
        logits = model.logits(model(part)[:, 2 * pairs :: 2])
        likeliest = logits.gather(-1, told.unsqueeze(1).expand(-1, pairs, -1)).argmax(-1)
        right += int((told.gather(1, likeliest) == values).sum())
    return right / (SEQUENCES * pairs)
