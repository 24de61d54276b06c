"""The Mamba blocks of transformers on this project's kernels: training, prompts and one-token steps, no mamba_ssm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.falcon_mamba.modeling_falcon_mamba import (
    FalconMambaBlock,
    FalconMambaMixer,
    FalconMambaRMSNorm,
)
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer, MambaRMSNorm

from cab_kernels import (
    causal_conv1d_fn,
    causal_conv1d_update,
    mamba_inner_fn,
    rms_norm_fn,
    selective_scan_fn,
    selective_state_update,
)


class _KernelForward(nn.Module):
    """The forward pass of transformers' Mamba mixers over ``cab_kernels``; parameters, cache and arguments are theirs.

    A prompt that comes in several parts goes on from the state in the cache, as a single token does. Without a cache,
    forward keeps neither the convolved tokens nor delta for backward, which makes them again.
    """

    on_projections: Callable[[Tensor, Tensor], None] | None = None  # shown B and C, (batch, tokens, state) each

    def forward(
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        *,
        cache_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix (batch, tokens, width); ``attention_mask`` (batch, tokens) is 0 where a token is padding.

        In its place may come ``cu_seqlens``, (documents + 1,) int32: the batch is then 1, and state and convolution
        start again at each of these tokens. transformers' Mamba hands its blocks nothing else of what it was given.

        transformers before 5.24 names the model's cache ``cache_params``.
        """
        mixer: Any = self
        caches = cache_params if cache is None else cache
        cache = None if caches is None else caches.layers[mixer.layer_idx]
        cu_seqlens = None
        if attention_mask is not None and attention_mask.dim() == 1:
            attention_mask, cu_seqlens = None, attention_mask
            if cache is not None:
                raise ValueError("use_cab_kernels: expected use_cache=False with packed documents, got a cache")
        state = None if cache is None else cache.recurrent_states[0]
        one_token = hidden_states.shape[1] == 1 and attention_mask is None and not torch.is_grad_enabled()
        if state is not None and one_token and not cache.record_past:
            return self._step(hidden_states, cache)
        projected = mixer.in_proj(_without_padding(hidden_states, attention_mask))
        if cache is None:
            out, B, C = mamba_inner_fn(
                projected,
                mixer.conv1d.weight.squeeze(1),
                mixer.conv1d.bias,
                mixer.x_proj.weight,
                mixer.dt_proj.weight,
                mixer.dt_proj.bias,
                mixer.A_log,
                mixer.D,
                norm_eps=getattr(mixer, "rms_eps", None),  # FalconMamba's
                mask=attention_mask,
                cu_seqlens=cu_seqlens,
            )
        else:
            out, B, C = self._with_cache(projected, attention_mask, cache)
        if self.on_projections is not None:
            self.on_projections(B, C)
        return mixer.out_proj(out.to(hidden_states.dtype))

    def _with_cache(
        self, projected: Tensor, attention_mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is to be projected back, (batch, tokens, channels), B and C, of tokens that go on from the cache."""
        mixer: Any = self
        x, z = projected.transpose(1, 2).chunk(2, dim=1)
        x = cache.update_conv_state(x, conv_kernel_size=mixer.conv_kernel_size)  # puts the last inputs before these
        u = causal_conv1d_fn(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, "silu")[..., -z.shape[-1] :]
        u = _without_padding(u.transpose(1, 2), attention_mask)
        low_rank, B, C = self._project(u)
        state = cache.recurrent_states[0]
        out, last_state = selective_scan_fn(
            u.transpose(1, 2),
            F.linear(low_rank, mixer.dt_proj.weight.to(low_rank.dtype)).transpose(1, 2),
            -mixer.A_log.float().exp(),
            B.transpose(1, 2),
            C.transpose(1, 2),
            mixer.D.float(),
            z=z,
            delta_bias=mixer.dt_proj.bias.float(),
            delta_softplus=True,
            return_last_state=True,
            # The cache is about to be written over, and backward may still want what it held.
            initial_state=None if state is None else state.clone(),
        )
        cache.update_recurrent_state(last_state)
        return out.transpose(1, 2), B, C

    def _step(self, hidden: Tensor, cache: Any) -> Tensor:
        """Mix one token (batch, 1, width), and advance the cache in place."""
        mixer: Any = self
        x, z = mixer.in_proj(hidden.squeeze(1)).chunk(2, dim=-1)
        u = causal_conv1d_update(x, cache.conv_states[0], mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, "silu")
        low_rank, B, C = self._project(u)
        out = selective_state_update(
            cache.recurrent_states[0],
            u,
            F.linear(low_rank, mixer.dt_proj.weight.to(low_rank.dtype)),
            -mixer.A_log.float().exp(),
            B,
            C,
            mixer.D.float(),
            z=z,
            dt_bias=mixer.dt_proj.bias.float(),
            dt_softplus=True,
        )
        return mixer.out_proj(out.to(hidden.dtype)).unsqueeze(1)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixer: Any = self
        sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
        low_rank, B, C = mixer.x_proj(u).split(sizes, dim=-1)
        return low_rank, B, C


class KernelMambaMixer(_KernelForward, MambaMixer):
    """``MambaMixer`` on ``cab_kernels``."""


class KernelFalconMambaMixer(_KernelForward, FalconMambaMixer):
    """``FalconMambaMixer`` on ``cab_kernels``: Mamba with the step, B and C normalised."""

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low_rank, B, C = super()._project(u)
        mixer: Any = self
        return mixer.dt_layernorm(low_rank), mixer.b_layernorm(B), mixer.c_layernorm(C)


class _KernelNorm(nn.Module):
    """The forward pass of transformers' root-mean-square norms in one launch.

    Under autocast the result has its dtype, to which the linear layer that follows would round it.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm: Any = self
        return rms_norm_fn(hidden_states, norm.weight, eps=norm.variance_epsilon)


class KernelMambaRMSNorm(_KernelNorm, MambaRMSNorm):
    """``MambaRMSNorm`` on ``cab_kernels``."""


class KernelFalconMambaRMSNorm(_KernelNorm, FalconMambaRMSNorm):
    """``FalconMambaRMSNorm`` on ``cab_kernels``."""


class _KernelBlock(nn.Module):
    """The forward pass of transformers' blocks, where the norm's backward pass adds the residual stream's gradient."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add what the mixer makes of (batch, tokens, width) to it; the arguments after it are the mixer's."""
        block: Any = self
        residual = hidden_states.to(torch.float32) if block.residual_in_fp32 else hidden_states
        x = residual.to(block.norm.weight.dtype)
        normed, same = rms_norm_fn(x, block.norm.weight, eps=block.norm.variance_epsilon, prenorm=True)
        if x is residual:
            residual = same
        return residual + block.mixer(normed, *args, **kwargs)


class KernelMambaBlock(_KernelBlock, MambaBlock):
    """``MambaBlock`` on ``cab_kernels``."""


class KernelFalconMambaBlock(_KernelBlock, FalconMambaBlock):
    """``FalconMambaBlock`` on ``cab_kernels``."""


_ON_KERNELS = {
    MambaMixer: KernelMambaMixer,
    FalconMambaMixer: KernelFalconMambaMixer,
    MambaRMSNorm: KernelMambaRMSNorm,
    FalconMambaRMSNorm: KernelFalconMambaRMSNorm,
    MambaBlock: KernelMambaBlock,
    FalconMambaBlock: KernelFalconMambaBlock,
}


def use_cab_kernels(model: nn.Module) -> nn.Module:
    """Let the Mamba blocks and norms of a model of transformers run on ``cab_kernels``, in place, and return the model.

    Parameters, configuration, checkpoints, caches and ``generate`` stay as they are; the blocks no longer care whether
    mamba_ssm, causal_conv1d or mambapy is installed. It applies to ``MambaForCausalLM``, ``FalconMambaForCausalLM`` and
    whatever else is built of their mixers, and may be called again. Weights must be floating point, not quantised.

    Raises:
        ValueError: the model has no such mixer, or one whose activation is not SiLU.
    """
    mixers = [module for module in model.modules() if isinstance(module, (MambaMixer, FalconMambaMixer))]
    if not mixers:
        raise ValueError(f"use_cab_kernels: expected a model with Mamba mixers, got {type(model).__name__}")
    for mixer in mixers:
        if mixer.activation not in ("silu", "swish"):
            raise ValueError(f"use_cab_kernels: expected activation 'silu', got {mixer.activation!r}")
    for module in model.modules():
        module.__class__ = _ON_KERNELS.get(type(module), type(module))
    return model


def _without_padding(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(batch, tokens, width) with zeros where a token is padding, so that the state does not see it."""
    return hidden if attention_mask is None else hidden * attention_mask.unsqueeze(-1).to(hidden.dtype)
