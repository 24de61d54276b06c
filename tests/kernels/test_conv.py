"""Causal depthwise convolution: the definition against PyTorch's own, the kernels against the definition."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from cab_kernels import causal_conv1d_fn, causal_conv1d_ref


def make_inputs(
    batch: int, dim: int, length: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and bias that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, dim, length), (dim, width), (dim,))
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def convolve_in_float64(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """The same by PyTorch's grouped convolution over a padded input: shares no code with the definition."""
    dim, width = weight.shape
    out = F.conv1d(
        x.double(),
        weight.double().unsqueeze(1),
        None if bias is None else bias.double(),
        padding=width - 1,
        groups=dim,
    )[..., : x.shape[-1]]
    return out if activation is None else out * torch.sigmoid(out)


# One step; fewer steps than the filter has taps; one less than its width; an odd length; a filter of one tap.
SHAPES = {
    "one step": (2, 3, 1, 4),
    "below the filter": (1, 2, 2, 4),
    "width - 1": (2, 1, 2, 3),
    "odd": (2, 5, 33, 4),
    "one tap": (2, 3, 7, 1),
    "two taps": (1, 3, 9, 2),
}


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_definition_equals_padded_grouped_convolution(shape: tuple[int, ...], activation: str | None) -> None:
    x, weight, bias = make_inputs(*shape)
    for given_bias in (bias, None):
        out = causal_conv1d_ref(x, weight, given_bias, activation)
        torch.testing.assert_close(out, convolve_in_float64(x, weight, given_bias, activation))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_reverse_equals_flip_convolve_flip(shape: tuple[int, ...]) -> None:
    batch, dim, _, width = shape
    x, weight, bias = make_inputs(*shape)
    initial = torch.randn(batch, dim, width - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for states in (None, initial):
        flipped, final = causal_conv1d_fn(
            x.flip(-1), weight, bias, "silu", initial_states=states, return_final_states=True
        )
        out, out_final = causal_conv1d_fn(
            x, weight, bias, "silu", initial_states=states, return_final_states=True, reverse=True
        )
        torch.testing.assert_close(out, flipped.flip(-1))
        torch.testing.assert_close(out_final, final)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 11])
def test_two_calls_with_states_equal_one(cut: int, reverse: bool) -> None:
    x, weight, bias = make_inputs(2, 3, 11, 4)
    whole, whole_final = causal_conv1d_fn(x, weight, bias, "silu", reverse=reverse, return_final_states=True)
    parts = [x[..., cut:], x[..., :cut]] if reverse else [x[..., :cut], x[..., cut:]]
    first, states = causal_conv1d_fn(parts[0], weight, bias, "silu", reverse=reverse, return_final_states=True)
    second, final = causal_conv1d_fn(
        parts[1], weight, bias, "silu", reverse=reverse, initial_states=states, return_final_states=True
    )
    torch.testing.assert_close(torch.cat([second, first] if reverse else [first, second], dim=-1), whole)
    torch.testing.assert_close(final, whole_final)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_equal_separate_ones(reverse: bool) -> None:
    x, weight, bias = make_inputs(1, 3, 14, 4)
    bounds = [0, 1, 1, 3, 9, 14]  # one step, none, two, six, five
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    separate = [
        causal_conv1d_fn(x[..., start:stop], weight, bias, "silu", reverse=reverse)
        for start, stop in zip(bounds, bounds[1:], strict=False)
    ]
    packed = causal_conv1d_fn(x, weight, bias, "silu", reverse=reverse, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, torch.cat(separate, dim=-1))


def test_steps_of_a_negative_sequence_index_give_zero_and_are_not_seen() -> None:
    x, weight, bias = make_inputs(2, 3, 6, 3)
    seq_idx = torch.tensor([[0, 0, 0, -1, -1, -1], [-1, -1, 7, 7, 7, 7]], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, bias, "silu", seq_idx=seq_idx)
    expected = torch.zeros_like(x)
    expected[0, :, :3] = causal_conv1d_fn(x[:1, :, :3], weight, bias, "silu")[0]
    expected[1, :, 2:] = causal_conv1d_fn(x[1:, :, 2:], weight, bias, "silu")[0]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool, reverse: bool) -> None:
    x, weight, bias = make_inputs(1, 2, 6, 3)
    initial = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 1, 4, 6]) if packed else None

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        states = None if packed else initial
        return causal_conv1d_fn(x, weight, bias, "silu", initial_states=states, cu_seqlens=cu_seqlens, reverse=reverse)

    assert torch.autograd.gradcheck(function, (x, weight, bias, initial))


def test_low_precision_is_computed_in_float32_and_rounded_once() -> None:
    x, weight, bias = make_inputs(2, 5, 33, 4)
    for dtype in (torch.float16, torch.bfloat16):
        low = x.detach().to(dtype)
        out = causal_conv1d_fn(low, weight.float(), bias.float(), "silu")
        exact = convolve_in_float64(low, weight.float(), bias.float(), "silu")
        assert out.dtype == dtype
        spacing = torch.finfo(dtype).eps * exact.abs()
        assert ((out.double() - exact).abs() <= 0.51 * spacing + 1e-7).all()


def test_empty_axes_give_empty_results() -> None:
    for shape in ((0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4)):
        x, weight, bias = make_inputs(*shape)
        out, final = causal_conv1d_fn(x, weight, bias, "silu", return_final_states=True)
        assert out.shape == x.shape
        assert final.shape == (shape[0], shape[1], 3)


ERRORS: dict[str, tuple[type[Exception], Callable[..., dict], str]] = {
    "x without a batch": (
        ValueError,
        lambda x, weight, bias: {"x": x[0], "weight": weight},
        "causal_conv1d_fn: expected x of shape (batch, dim, length), got (3, 8)",
    ),
    "a weight as nn.Conv1d keeps it": (
        ValueError,
        lambda x, weight, bias: {"x": x, "weight": weight.unsqueeze(1)},
        "causal_conv1d_fn: expected weight of shape (dim, width), got (3, 1, 4)",
    ),
    "a bias of another size": (
        ValueError,
        lambda x, weight, bias: {"x": x, "weight": weight, "bias": bias[:2]},
        "causal_conv1d_fn: expected bias of shape (dim) = (3,), got (2,)",
    ),
    "an unknown activation": (
        ValueError,
        lambda x, weight, bias: {"x": x, "weight": weight, "activation": "gelu"},
        "causal_conv1d_fn: expected activation None, 'silu' or 'swish', got 'gelu'",
    ),
    "no taps": (
        ValueError,
        lambda x, weight, bias: {"x": x, "weight": weight[:, :0]},
        "causal_conv1d_fn: expected weight with at least one tap, got (3, 0)",
    ),
    "whole numbers": (
        TypeError,
        lambda x, weight, bias: {"x": x.long(), "weight": weight},
        "causal_conv1d_fn: expected x of dtype float32 or float16 or bfloat16 or float64, got int64",
    ),
    "too many initial states": (
        ValueError,
        lambda x, weight, bias: {"x": x, "weight": weight, "initial_states": x},
        "causal_conv1d_fn: expected initial_states of shape (batch, dim, width-1) = (2, 3, 3), got (2, 3, 8)",
    ),
    "packed rows": (
        ValueError,
        lambda x, weight, bias: {"x": x, "weight": weight, "cu_seqlens": torch.tensor([0, 8])},
        "causal_conv1d_fn: expected x of batch 1 with cu_seqlens, got batch 2",
    ),
    "packed and with states": (
        ValueError,
        lambda x, weight, bias: {
            "x": x[:1],
            "weight": weight,
            "cu_seqlens": torch.tensor([0, 8]),
            "initial_states": x[:1, :, :3],
        },
        "causal_conv1d_fn: expected no initial_states with cu_seqlens or seq_idx, got both",
    ),
    "an unknown backend": (
        ValueError,
        lambda x, weight, bias: {"x": x, "weight": weight, "backend": "cuda"},
        "causal_conv1d_fn: expected backend None, 'triton' or 'reference', got 'cuda'",
    ),
}


@pytest.mark.parametrize(("error", "arguments", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_named(error: type[Exception], arguments: Callable[..., dict], text: str) -> None:
    tensors = (tensor.detach() for tensor in make_inputs(2, 3, 8, 4))
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        causal_conv1d_fn(**arguments(*tensors))
