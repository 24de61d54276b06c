import pytest
import torch
from torch import nn

from cab.distill.agreement import AdaptiveTrust, gradient_agreement


def test_cosine_and_norms_of_two_losses() -> None:
    a, b, unused = nn.Parameter(torch.tensor([3.0, 0.0])), nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(2))
    kl = (a * torch.tensor([3.0, 4.0])).sum()
    align = a[0] * 2 + b * 0
    agreement = gradient_agreement(kl, align, [a, b, unused])
    assert [round(float(value), 5) for value in agreement] == [5.0, 2.0, 0.6]
    assert a.grad is None
    (kl + align).backward()  # the graph is still there
    assert a.grad.tolist() == [5.0, 4.0]


def test_a_term_without_gradient_agrees_with_nothing() -> None:
    a = nn.Parameter(torch.ones(2))
    assert gradient_agreement(a.sum(), a.sum() * 0, [a]).cosine == 0


def test_whole_weight_before_the_first_observation_and_while_agreement_is_at_its_best() -> None:
    trust = AdaptiveTrust()
    assert trust.value() == 1.0
    for _ in range(5):
        trust.observe(0.01)
    assert trust.value() == pytest.approx(1.0)


def test_weight_falls_with_the_agreement_and_ends_at_conflict() -> None:
    trust = AdaptiveTrust()
    for _ in range(20):
        trust.observe(0.2)
    values = []
    for _ in range(40):
        trust.observe(-0.2)
        values.append(trust.value())
    assert values[0] < 1.0
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0


def test_weight_comes_back() -> None:
    trust = AdaptiveTrust()
    for cosine in [0.2] * 20 + [-0.2] * 20 + [0.2] * 60:
        trust.observe(cosine)
    assert trust.value() > 0.95


def test_scale_of_the_cosines_cancels() -> None:
    one, other = AdaptiveTrust(), AdaptiveTrust()
    for cosine in torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist():
        one.observe(cosine)
        other.observe(cosine * 1e-3)
    assert abs(one.value() - other.value()) < 1e-9


def test_no_agreement_from_the_start_gives_no_weight() -> None:
    trust = AdaptiveTrust()
    trust.observe(-0.1)
    assert trust.value() == 0.0


def test_observations_are_spread_over_the_run() -> None:
    assert sum(AdaptiveTrust.is_due(step, 1000) for step in range(1000)) == 100
    assert sum(AdaptiveTrust.is_due(step, 30) for step in range(30)) == 30


def test_state_is_saved() -> None:
    trust, resumed = AdaptiveTrust(), AdaptiveTrust()
    for cosine in (0.3, 0.1):
        trust.observe(cosine)
    resumed.load_state_dict(trust.state_dict())
    assert resumed.value() == trust.value()
