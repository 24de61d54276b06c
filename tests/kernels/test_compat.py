"""The names and signatures of mamba_ssm and causal_conv1d: called as their users call them, and differentiated."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cab_kernels
from cab_kernels import compat

# The parameters of the originals, in order, up to the first that only this package has.
SIGNATURES = {
    "selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
    "rms_norm_fn": "x weight bias residual",
    "mamba_inner_fn": (
        "xz conv1d_weight conv1d_bias x_proj_weight delta_proj_weight out_proj_weight out_proj_bias A B C D delta_bias "
        "B_proj_bias C_proj_bias delta_softplus checkpoint_lvl b_rms_weight c_rms_weight dt_rms_weight b_c_dt_rms_eps"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_positional_parameters_are_those_of_the_original(name):
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert " ".join(positional) == SIGNATURES[name]


def test_every_name_is_exported_in_order():
    assert sorted(SIGNATURES) == compat.__all__


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_convolution_takes_the_originals_arguments():
    x, weight, bias, initial = (normal(*s, seed=i) for i, s in enumerate([(2, 3, 6), (3, 4), (3,), (2, 3, 3)]))
    buffer = torch.empty(2, 3, 3, dtype=torch.float64)
    out, final = compat.causal_conv1d_fn(x, weight, bias, None, initial, True, buffer, "silu")
    expected, expected_final = cab_kernels.causal_conv1d_fn(
        x, weight, bias, "silu", initial_states=initial, return_final_states=True
    )
    assert final is buffer
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(final, expected_final)
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1]], dtype=torch.int32)
    torch.testing.assert_close(
        compat.causal_conv1d_fn(x, weight, bias, seq_idx, activation="silu")[0, :, 2:5],
        cab_kernels.causal_conv1d_fn(x[:1, :, 2:5], weight, bias, "silu")[0],
    )
    with pytest.raises(ValueError, match="expected return_final_states with final_states_out, got False"):
        compat.causal_conv1d_fn(x, weight, bias, final_states_out=buffer)


BATCH, DIM, LENGTH, DSTATE, DT_RANK, MODEL = 2, 4, 5, 3, 2, 3
BLOCK = {
    "xz": (BATCH, 2 * DIM, LENGTH),
    "conv1d_weight": (DIM, 1, 4),
    "conv1d_bias": (DIM,),
    "x_proj_weight": (DT_RANK + 2 * DSTATE, DIM),
    "delta_proj_weight": (DIM, DT_RANK),
    "out_proj_weight": (MODEL, DIM),
    "out_proj_bias": (MODEL,),
    "A": (DIM, DSTATE),
    "D": (DIM,),
    "delta_bias": (DIM,),
}
OPTIONAL = {
    "plain": {},
    "biases": {"B_proj_bias": (DSTATE,), "C_proj_bias": (DSTATE,)},
    "norms": {"b_rms_weight": (DSTATE,), "c_rms_weight": (DSTATE,), "dt_rms_weight": (DT_RANK,)},
    "constant-B": {"B": (DIM, DSTATE), "x_proj_weight": (DT_RANK + DSTATE, DIM)},
}


def block_inputs(optional: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    inputs = {name: normal(*shape, seed=i) * 0.7 for i, (name, shape) in enumerate({**BLOCK, **optional}.items())}
    inputs["A"] = -inputs["A"].exp()
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def block_step_by_step(inputs: dict[str, Tensor]) -> Tensor:
    """A Mamba block spelled out: PyTorch's convolution, einsum, and a loop over time."""
    x, z = inputs["xz"].chunk(2, dim=1)
    u = F.silu(F.conv1d(x, inputs["conv1d_weight"], inputs["conv1d_bias"], padding=3, groups=DIM)[..., :LENGTH])
    projected = torch.einsum("pd,bdl->bpl", inputs["x_proj_weight"], u)

    def normed(t: Tensor, name: str) -> Tensor:
        if name not in inputs:
            return t
        return t / (t.square().mean(1, keepdim=True) + 1e-6).sqrt() * inputs[name][:, None]

    def projection(t: Tensor, letter: str) -> Tensor:
        if letter in inputs:
            return inputs[letter].unsqueeze(-1).expand(-1, -1, LENGTH).unsqueeze(0).expand(BATCH, -1, -1, -1)
        t = t + inputs[f"{letter}_proj_bias"][:, None] if f"{letter}_proj_bias" in inputs else t
        return normed(t, f"{letter.lower()}_rms_weight").unsqueeze(1).expand(-1, DIM, -1, -1)

    B, C = projection(projected[:, DT_RANK : DT_RANK + DSTATE], "B"), projection(projected[:, -DSTATE:], "C")
    dt = torch.einsum("dr,brl->bdl", inputs["delta_proj_weight"], normed(projected[:, :DT_RANK], "dt_rms_weight"))
    dt = F.softplus(dt + inputs["delta_bias"][:, None])
    state, steps = torch.zeros(BATCH, DIM, DSTATE, dtype=torch.float64), []
    for t in range(LENGTH):
        state = state * torch.exp(dt[..., t, None] * inputs["A"]) + (dt * u)[..., t, None] * B[..., t]
        steps.append((state * C[..., t]).sum(-1))
    y = (torch.stack(steps, dim=-1) + inputs["D"][:, None] * u) * z * torch.sigmoid(z)
    return torch.einsum("md,bdl->blm", inputs["out_proj_weight"], y) + inputs["out_proj_bias"]


@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
def test_block_and_every_gradient_equal_the_block_spelled_out(optional):
    inputs = block_inputs(optional)
    out, expected = compat.mamba_inner_fn(**inputs), block_step_by_step(inputs)
    torch.testing.assert_close(out, expected)
    dout = normal(*out.shape, seed=99)
    gradients = torch.autograd.grad(out, list(inputs.values()), dout)
    exact = torch.autograd.grad(expected, list(inputs.values()), dout)
    for name, gradient, value in zip(inputs, gradients, exact, strict=True):
        torch.testing.assert_close(gradient, value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("channels_fast", [False, True])
def test_gradient_of_the_block_lies_as_its_input(channels_fast):
    """The product before it then reads it in place."""
    inputs = block_inputs({})
    xz = inputs["xz"].detach()
    xz = (xz.mT.contiguous().mT if channels_fast else xz).requires_grad_()
    out = compat.mamba_inner_fn(**inputs | {"xz": xz})
    torch.testing.assert_close(out, compat.mamba_inner_fn(**inputs))
    (gradient,) = torch.autograd.grad(out.sum(), xz)
    assert gradient.stride() == xz.stride()


def test_block_runs_under_autocast():
    inputs = {name: tensor.detach().float().requires_grad_() for name, tensor in block_inputs({}).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = compat.mamba_inner_fn(**inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs.values())
    torch.testing.assert_close(out.float(), compat.mamba_inner_fn(**inputs), rtol=0.05, atol=0.05)


def test_complex_decay_is_refused_by_name():
    inputs = block_inputs({})
    inputs["A"] = torch.complex(inputs["A"], inputs["A"])
    with pytest.raises(NotImplementedError, match="expected A to be real"):
        compat.mamba_inner_fn(**inputs)
