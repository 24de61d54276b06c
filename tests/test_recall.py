import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cab.recall import mqar, recall

KNOWN = torch.arange(10, 200)


class Remembers(nn.Module):
    """Predicts what followed the same token before, if that is at most ``reach`` tokens ago, and else token 0."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1])
        ago = position[:, None] - position
        same = (ids[:, :, None] == ids[:, None, :]) & (ago > 0) & (ago <= self.reach)
        predicted = ids.gather(1, (same.int().argmax(-1) + 1).clamp(max=ids.shape[1] - 1))
        return F.one_hot(predicted.where(same.any(-1), 0), 200).float()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


class KnowsTheText(Remembers):
    """Prefers some tokens to others, whatever it has read."""

    def forward(self, ids: Tensor) -> Tensor:
        return torch.rand(200, generator=torch.Generator().manual_seed(0)).expand(*ids.shape, 200)


def test_pairs_are_told_and_then_asked_for_in_another_order() -> None:
    ids = mqar(8, 20, KNOWN, torch.Generator().manual_seed(0))
    assert ids.shape == (20, 32)
    for row in ids.tolist():
        told, asked = (list(zip(half[::2], half[1::2], strict=True)) for half in (row[:16], row[16:]))
        assert len(set(row[:16])) == 16
        assert set(row) <= set(KNOWN.tolist())
        assert sorted(told) == sorted(asked)
        assert told != asked
    assert len({tuple(row) for row in ids.tolist()}) == 20


@pytest.mark.parametrize("pairs", [4, 16, 64])
def test_a_model_that_remembers_all_recalls_all(pairs: int) -> None:
    assert recall(Remembers(4 * pairs), pairs, KNOWN) == 1


@pytest.mark.parametrize("pairs", [4, 16, 64])
def test_models_that_cannot(pairs: int) -> None:
    """They choose one value for all keys, which is right for one of them."""
    assert recall(Remembers(0), pairs, KNOWN) == 1 / pairs
    assert recall(KnowsTheText(0), pairs, KNOWN) == 1 / pairs


def test_a_short_memory_recalls_fewer_of_more() -> None:
    shares = [recall(Remembers(16), pairs, KNOWN) for pairs in (4, 8, 16, 32)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    # Within reach is the pair told as the i-th before the end and asked for as the j-th after it, i + j at most 9; of
    # the others, one value is right by chance.
    assert shares[-1] == pytest.approx(36 / 32**2 + 1 / 32, abs=0.015)
