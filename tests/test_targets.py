import pytest
import torch
from torch import Tensor

from cab.distill.targets import RunningStatistics, TeacherTargets


def keys(seed: int, batch: int = 3) -> Tensor:
    """(batch, 2 heads, 5 tokens, 4), with a large mean and channels of different scale."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 2, 5, 4, generator=generator) * torch.arange(1.0, 5.0) + 100


def flat(value: Tensor) -> Tensor:
    return value.transpose(1, 2).reshape(-1, 8)


def test_statistics_are_those_of_all_tokens_seen() -> None:
    statistics = RunningStatistics(2, 8)
    batches = [keys(0), keys(1, batch=1), keys(2, batch=7)]
    for batch in batches:
        statistics.update(1, batch)
    tokens = torch.cat([flat(batch) for batch in batches]).double()
    target = statistics.standardise(1, batches[0])
    torch.testing.assert_close(target.mean.double(), tokens.mean(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(target.rstd.double(), 1 / tokens.std(dim=0, correction=0), rtol=1e-5, atol=0)
    assert not statistics.count[0]


def test_statistics_leave_padding_out() -> None:
    statistics, only = RunningStatistics(1, 8), RunningStatistics(1, 8)
    for seed in (0, 1):
        batch, mask = keys(seed), torch.ones(3, 5, dtype=torch.bool)
        mask[1, 2:] = False
        padded = batch.clone()
        padded[1, :, 2:] = torch.nan
        statistics.update(0, padded, mask)
        only.update(0, flat(batch).unflatten(0, (3, 5))[mask].unflatten(-1, (2, 4)).transpose(0, 1)[None])
    for name, buffer in statistics.named_buffers():
        torch.testing.assert_close(buffer, getattr(only, name), rtol=1e-5, atol=1e-5)


def test_softmax_over_the_tokens_leaves_padding_out() -> None:
    key, mask = keys(0, batch=1), torch.tensor([[True, True, True, False, False]])
    target = TeacherTargets("softmax", 1, 8, 8).key(0, key, mask).value
    torch.testing.assert_close(target[:, :, :3], key[:, :, :3].softmax(dim=-2))
    assert not target[:, :, 3:].any()


def test_standardised_targets_have_mean_0_and_variance_1() -> None:
    targets, key = TeacherTargets("standardised", 1, 8, 8).train(), keys(0)
    target = targets.key(0, key)
    standard = (flat(target.value) - target.mean) * target.rstd
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(standard.std(dim=0, correction=0), torch.ones(8), rtol=1e-4, atol=0)
    assert target.value is key


def test_key_and_query_have_statistics_of_their_own() -> None:
    targets = TeacherTargets("standardised", 1, 8, 8)
    of_key, of_query = targets.key(0, keys(0)), targets.query(0, keys(0) + 50)
    torch.testing.assert_close(of_query.mean - of_key.mean, torch.full((8,), 50.0))


def test_evaluation_does_not_move_the_statistics() -> None:
    targets = TeacherTargets("standardised", 1, 8, 8)
    before = targets.key(0, keys(0)).mean
    targets.eval()
    assert torch.equal(targets.key(0, keys(1)).mean, before)


def test_statistics_are_saved() -> None:
    source, other = TeacherTargets("standardised", 1, 8, 8), TeacherTargets("standardised", 1, 8, 8).eval()
    source.key(0, keys(0))
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.key(0, keys(1)).mean, source.of_key.mean[0])


def test_raw() -> None:
    key = keys(0)
    assert TeacherTargets("raw", 1, 8, 8).key(0, key) == (key, None, None)


def test_softmax_is_over_tokens_for_keys_and_over_all_channels_for_queries() -> None:
    targets = TeacherTargets("softmax", 1, 8, 8)
    key, query = keys(0) / 50, keys(1) / 50
    torch.testing.assert_close(flat(targets.key(0, key).value).view(3, 5, 8), flat(key).view(3, 5, 8).softmax(dim=1))
    torch.testing.assert_close(targets.query(0, query).value, flat(query).view(3, 5, 8).softmax(dim=2))


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="expected kind 'raw', 'standardised' or 'softmax', got 'whitened'"):
        TeacherTargets("whitened", 1, 8, 8)
