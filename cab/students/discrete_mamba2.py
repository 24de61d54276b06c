"""Discrete Mamba-2: a language model whose blocks are a Transformer's, with a state in the place of attention.

Importing this module lets ``AutoConfig`` and ``AutoModelForCausalLM`` load it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from cab_kernels import causal_conv1d_fn

SUPPORTED = "cache" in BaseModelOutputWithPast.__dataclass_fields__  # its name since transformers 5.24
_GATE_OF_ONE = 1.2784645  # silu of it is 1
_RATES = (1e-3, 1e-1)  # of the decay at the start, as the steps of Mamba-2


def discrete_scan(
    x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, chunk: int, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Linear attention that forgets, a chunk of the tokens at a time.

    ::

        h_t = exp(log_decay_t) h_(t-1) + x_t B_t^T        y_t = h_t C_t

    Unlike in Mamba-2, what comes in is not scaled by a step. Computed in float32 at least; y has the dtype of x.

    Args:
        x: (batch, length, heads, head_dim).
        log_decay: (batch, length, heads), at most 0.
        B, C: (batch, length, groups, state); consecutive heads share a group.
        chunk: tokens whose scores exist together.
        initial_state: (batch, heads, head_dim, state); None for zeros.

    Returns:
        y, as x, and the last state, (batch, heads, head_dim, state).

    Source: arXiv:2405.21060, section 6; for the discrete form arXiv:2408.10189, section 4.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads, groups = x.shape[2], B.shape[2]
    B, C = (part.to(dtype).repeat_interleave(heads // groups, dim=2) for part in (B, C))
    state = x.new_zeros(1, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if initial_state is None:
        state = state.expand(x.shape[0], heads, x.shape[3], B.shape[3])
    out = []
    parts = (part.split(chunk, dim=1) for part in (x.to(dtype), log_decay.to(dtype), B, C))
    for x_part, decay, B_part, C_part in zip(*parts, strict=True):
        since = decay.cumsum(1).transpose(1, 2)  # (batch, heads, tokens): from before the chunk to behind the token
        between = since.unsqueeze(-1) - since.unsqueeze(-2)
        future = torch.ones(between.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = torch.einsum("bthn,bshn->bhts", C_part, B_part) * between.masked_fill(future, -torch.inf).exp()
        of_state = torch.einsum("bthn,bhpn,bht->bthp", C_part, state, since.exp())
        out.append(torch.einsum("bhts,bshp->bthp", scores, x_part) + of_state)
        left = (since[..., -1:] - since).exp()
        state = state * since[..., -1].exp()[..., None, None]
        state = state + torch.einsum("bshp,bshn,bhs->bhpn", x_part, B_part, left)
    return torch.cat(out, dim=1).to(x.dtype), state


class DiscreteMamba2Config(PreTrainedConfig):
    """Sizes of a discrete Mamba-2.

    Attributes:
        num_heads, head_dim: of the scanned channels; their product need not be ``hidden_size``.
        state_size: width of a head's B and C.
        n_groups: sets of B and C; a divisor of ``num_heads``.
        intermediate_size: inside the gated MLPs.
    """

    model_type = "discrete_mamba2"

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_heads: int = 12
    head_dim: int = 64
    state_size: int = 64
    n_groups: int = 12
    conv_kernel: int = 4
    chunk_size: int = 64
    intermediate_size: int = 2048
    hidden_act: str = "silu"
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    @property
    def layer_types(self) -> list[str]:
        return ["linear_attention"] * self.num_hidden_layers


class DiscreteMamba2Mixer(nn.Module):
    """The mixer of Phi-Mamba: heads of x, B and C through a short convolution, a decay for each head and token, a gate.

    ::

        decay_t = exp(-softplus(a_t + A_log))       out = out_proj(y * silu(z + z_bias))

    It starts with a convolution that passes its input through, a gate of 1 and a decay that is the same for all
    tokens: with A_log far below 0 it is linear attention.

    Source: arXiv:2408.10189, section 4.
    """

    on_projections: Callable[[Tensor, Tensor], None] | None = None  # shown B and C, (batch, tokens, groups * state)

    def __init__(self, config: DiscreteMamba2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.n_groups = config.num_heads, config.n_groups
        if self.num_heads % self.n_groups:
            raise ValueError(
                f"DiscreteMamba2Mixer: expected n_groups to divide num_heads={self.num_heads}, got {self.n_groups}"
            )
        self.ssm_state_size, self.chunk_size = config.state_size, config.chunk_size
        self.intermediate_size = inner = config.num_heads * config.head_dim
        self.conv_kernel = config.conv_kernel
        width = inner + 2 * config.n_groups * config.state_size
        self.in_proj = nn.Linear(config.hidden_size, inner + width + config.num_heads, bias=False)  # z, x, B, C, a
        self.conv1d = nn.Conv1d(width, width, config.conv_kernel, groups=width)
        self.z_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        """Mix (batch, tokens, width); ``attention_mask`` (batch, tokens) is 0 where a token is padding."""
        inner, of_b = self.intermediate_size, self.n_groups * self.ssm_state_size
        tokens = hidden.shape[1]
        z, xBC, a = self.in_proj(hidden).split([inner, inner + 2 * of_b, self.num_heads], dim=-1)
        if attention_mask is not None:
            xBC = xBC * attention_mask.unsqueeze(-1).to(xBC.dtype)
        xBC, state = xBC.transpose(1, 2), None
        layer = None if cache is None else cache.layers[self.layer]
        if layer is not None:  # which puts the last inputs before these
            state = layer.recurrent_states[0]
            xBC = layer.update_conv_state(xBC, conv_kernel_size=self.conv_kernel)
        xBC = causal_conv1d_fn(xBC, self.conv1d.weight.squeeze(1), self.conv1d.bias)[..., -tokens:].transpose(1, 2)
        if attention_mask is not None:
            xBC = xBC * attention_mask.unsqueeze(-1).to(xBC.dtype)
        x, B, C = xBC.split([inner, of_b, of_b], dim=-1)
        if self.on_projections is not None:
            self.on_projections(B, C)
        x = x.unflatten(-1, (self.num_heads, -1))
        B, C = B.unflatten(-1, (self.n_groups, -1)), C.unflatten(-1, (self.n_groups, -1))
        # The cache is about to be written over, and backward may still want what it held.
        state = None if state is None else state.clone()
        y, state = discrete_scan(x, -F.softplus(a.float() + self.A_log.float()), B, C, self.chunk_size, state)
        if layer is not None:
            layer.update_recurrent_state(state)
        return self.out_proj(y.flatten(2) * F.silu(z + self.z_bias))


class DiscreteMamba2Block(GradientCheckpointingLayer):
    """Norm and mixer, norm and gated MLP, each added to what came in."""

    def __init__(self, config: DiscreteMamba2Config, layer: int) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = DiscreteMamba2Mixer(config, layer)
        self.pre_ff_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = LlamaMLP(config)

    def forward(self, hidden: Tensor, cache: Any = None, attention_mask: Tensor | None = None) -> Tensor:
        hidden = hidden + self.mixer(self.norm(hidden), cache, attention_mask)
        return hidden + self.feed_forward(self.pre_ff_layernorm(hidden))


class DiscreteMamba2PreTrainedModel(PreTrainedModel):
    config_class = DiscreteMamba2Config
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiscreteMamba2Block"]
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DiscreteMamba2Mixer):
            projection, passing = module.in_proj.weight.clone(), torch.zeros_like(module.conv1d.weight)
            projection[: module.intermediate_size] = 0
            projection[-module.num_heads :] = 0
            passing[..., -1] = 1
            init.copy_(module.in_proj.weight, projection)
            init.copy_(module.conv1d.weight, passing)
            init.zeros_(module.conv1d.bias)
            init.constant_(module.z_bias, _GATE_OF_ONE)
            first, last = map(math.log, _RATES)
            rates = torch.linspace(first, last, module.num_heads, device=module.A_log.device).exp()
            init.copy_(module.A_log, rates.expm1().log())


class DiscreteMamba2Model(DiscreteMamba2PreTrainedModel):
    """The blocks between embeddings and last norm.

    Raises:
        RuntimeError: transformers is older than 5.24.
    """

    def __init__(self, config: DiscreteMamba2Config) -> None:
        if not SUPPORTED:
            raise RuntimeError(
                f"DiscreteMamba2Model: expected transformers of at least 5.24, got {transformers.__version__}"
            )
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DiscreteMamba2Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm_f = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last hidden states (batch, tokens, width) of tokens (batch, tokens), which go on from ``cache``."""
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if attention_mask is not None:  # that of all tokens so far
            attention_mask = attention_mask[:, -hidden.shape[1] :]
        for layer in self.layers:
            hidden = layer(hidden, cache, attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=self.norm_f(hidden), cache=cache if use_cache else None)


class DiscreteMamba2ForCausalLM(DiscreteMamba2PreTrainedModel, GenerationMixin):
    """Discrete Mamba-2 with a head on top: it is saved, loaded and generates as the models of transformers do."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}

    def __init__(self, config: DiscreteMamba2Config) -> None:
        super().__init__(config)
        self.backbone = DiscreteMamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocabulary), of the last ``logits_to_keep`` tokens alone where that is above 0."""
        out = self.backbone(input_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=out.cache)


AutoConfig.register(DiscreteMamba2Config.model_type, DiscreteMamba2Config)
AutoModelForCausalLM.register(DiscreteMamba2Config, DiscreteMamba2ForCausalLM)
