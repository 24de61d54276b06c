"""Discrete Mamba-2: its scan against a loop over the tokens, its start, and what transformers asks of a model."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cab.students import discrete_mamba2
from cab.students.discrete_mamba2 import DiscreteMamba2Config, DiscreteMamba2ForCausalLM, discrete_scan

pytestmark = pytest.mark.skipif(not discrete_mamba2.SUPPORTED, reason="needs transformers 5.24")


def model(**sizes: object) -> DiscreteMamba2ForCausalLM:
    torch.manual_seed(0)
    given = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8}
    given |= {"state_size": 8, "n_groups": 2, "intermediate_size": 40, "chunk_size": 4, "eos_token_id": 1}
    made = DiscreteMamba2ForCausalLM(DiscreteMamba2Config(**{**given, **sizes})).eval()
    for name, parameter in made.named_parameters():  # away from their start, which leaves gate and decay constant
        if "in_proj" in name or "conv1d" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def ids() -> Tensor:
    return torch.randint(2, 48, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 7, 8, 19])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_chunks_are_the_loop_over_tokens(length: int, groups: int) -> None:
    torch.manual_seed(0)
    x, raw, state = torch.randn(2, length, 4, 3), torch.randn(2, length, 4), torch.randn(2, 4, 3, 5)
    B, C = torch.randn(2, 2, length, groups, 5)
    log_decay = -raw.abs() * 3
    inputs = [part.double().requires_grad_() for part in (x, log_decay, B, C, state)]

    def loop(x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for t in range(length):
            b, c = (side[:, t].repeat_interleave(4 // groups, dim=1) for side in (B, C))
            h = log_decay[:, t].exp()[..., None, None] * h + x[:, t].unsqueeze(-1) * b.unsqueeze(-2)
            out.append((h * c.unsqueeze(-2)).sum(-1))
        return torch.stack(out, dim=1), h

    got = discrete_scan(*inputs[:4], chunk=8, initial_state=inputs[4])
    expected = loop(*inputs)
    torch.testing.assert_close(got, expected)
    weights = [torch.randn_like(part) for part in expected]
    gradients, wanted = (
        torch.autograd.grad(sum((part * w).sum() for part, w in zip(parts, weights, strict=True)), inputs)
        for parts in (got, expected)
    )
    torch.testing.assert_close(gradients, wanted)
    without = discrete_scan(*(part.detach() for part in inputs[:4]), chunk=8)
    torch.testing.assert_close(without, loop(*inputs[:4], torch.zeros(2, 4, 3, 5, dtype=torch.float64)))


def test_saved_loaded_and_generating_from_a_state(tmp_path) -> None:
    made = model()
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DiscreteMamba2ForCausalLM
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = loaded.generate(ids(), **settings)
    assert cached.shape == (2, 20)
    assert torch.equal(cached, made.generate(ids(), use_cache=False, **settings))


@pytest.mark.parametrize("split", [1, 2, 7, 10])
def test_a_prompt_in_parts_goes_on_from_the_cache(split: int) -> None:
    made = model()
    with torch.no_grad():
        whole = made(ids()).logits
        first = made(ids()[:, :split], use_cache=True)
        second = made(ids()[:, split:], cache=first.cache, use_cache=True)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_nothing() -> None:
    made, mask = model(), torch.ones(2, 11, dtype=torch.int64)
    mask[:, :3] = 0
    with torch.no_grad():
        got, alone = made(ids(), attention_mask=mask).logits[:, 3:], made(ids()[:, 3:]).logits
    torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)


def test_groups_that_do_not_divide_the_heads() -> None:
    with pytest.raises(ValueError, match="expected n_groups to divide num_heads=4, got 3"):
        model(n_groups=3)


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrete_mamba2, "SUPPORTED", False)
    with pytest.raises(RuntimeError, match="^DiscreteMamba2Model: expected transformers of at least 5.24, got "):
        model()
