"""Mamba language models of transformers as distillation students: B and C of every layer, with their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from cab.logits import logits_of
from cab.packing import document_bounds
from cab.students.mamba import A_LOG_OF_ZERO
from cab.students.student import Projections, TokenStudent
from cab.students.transformers_mamba import use_cab_kernels
from cab_kernels import causal_conv1d_fn

_FAMILIES = ("mamba", "falcon_mamba", "mamba2")


class PlainLanguageModel(TokenStudent):
    """Any causal language model of transformers, to be trained or measured on text alone: it yields no B and C."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.num_layers = config.get_text_config().num_hidden_layers
        self.vocab_size = config.get_text_config().vocab_size

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The last hidden states (batch, tokens, width) of tokens (batch, tokens)."""
        backbone: Any = self.model.base_model
        options = {"attention_mask": attention_mask, "use_cache": False}
        if position_ids is not None:  # which not every family takes
            options["position_ids"] = position_ids
        return backbone(input_ids, **options).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return logits_of(self.model, hidden)

    def no_weight_decay(self) -> set[str]:
        return set()


class LanguageStudent(PlainLanguageModel):
    """A Mamba or Mamba-2 language model of transformers that yields B and C of every layer.

    ``MambaForCausalLM`` and ``FalconMambaForCausalLM`` are put on ``cab_kernels``, whose mixers show their B and C.
    ``Mamba2ForCausalLM`` computes as it always does. Where mamba_ssm is installed, one fused call then keeps B and C to
    itself, so they are computed a second time from the output of ``in_proj``: the convolution of their channels. Its
    state does not start again within a sequence, so packed documents are refused.

    Args:
        model: the language model, changed in place; it is saved, loaded and generates as before.

    Attributes:
        model: the same.
        num_layers: Mamba blocks.
        d_state: width of B and C; for Mamba-2 that of all groups together.

    Raises:
        ValueError: the model is of another family: it has no B and C, or none that can be read.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        family = getattr(config, "model_type", None)
        if family not in _FAMILIES:
            raise ValueError(
                "LanguageStudent: expected a model with B and C, of model_type 'mamba', 'falcon_mamba' or 'mamba2', "
                f"got {type(model).__name__} of model_type {family!r}"
            )
        super().__init__(model)
        self.d_state = config.state_size * (config.n_groups if family == "mamba2" else 1)
        self._packs = family != "mamba2"
        if family != "mamba2":
            use_cab_kernels(model)
        self._reading = False
        self._seen: dict[int, Projections] | None = None
        for layer, mixer in enumerate(self._mixers()):
            if family == "mamba2":
                mixer.in_proj.register_forward_hook(self._in_proj_hook(layer, mixer))
            else:
                mixer.on_projections = self._keep(layer)

    def start_at_linear_attention(self) -> None:
        """Set A ~ 0: the decay of a step rounds to 1, and the scan starts as linear attention (arXiv:2510.19266)."""
        for mixer in self._mixers():
            nn.init.constant_(mixer.A_log, A_LOG_OF_ZERO)

    def no_weight_decay(self) -> set[str]:
        spared = {"A_log", "D", "dt_bias"}
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in spared}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        self._reading = False
        return self._hidden(input_ids, attention_mask, position_ids)

    def forward_with_projections(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Projections, ...]]]:
        # It outlives this call, because gradient checkpointing repeats the blocks in the backward pass and must find
        # them unchanged; what they show then goes nowhere.
        self._reading = True
        seen: dict[int, Projections] = {}
        self._seen = seen
        try:
            hidden = self._hidden(input_ids, attention_mask, position_ids)
        finally:
            self._seen = None
        if (
            torch.is_grad_enabled()
            and hidden.requires_grad
            and not any(layer.B.requires_grad for layer in seen.values())
        ):
            raise RuntimeError(
                "LanguageStudent: expected B and C to have a gradient, got none: gradient checkpointing must run with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        rows = [Projections(*(side.view(*input_ids.shape, -1) for side in seen[i])) for i in range(self.num_layers)]
        return hidden, [(layer,) for layer in rows]

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """The last hidden states; packed documents run as one sequence of all rows."""
        if position_ids is None:
            return super().forward(input_ids, attention_mask)
        if not self._packs or attention_mask is not None:
            got = "both" if self._packs else type(self.model).__name__
            raise ValueError(f"LanguageStudent: expected Mamba blocks and no padding with packed documents, got {got}")
        hidden = super().forward(input_ids.reshape(1, -1), document_bounds(position_ids))
        return hidden.view(*input_ids.shape, -1)

    def _mixers(self) -> list[Any]:
        backbone: Any = self.model.base_model
        return [layer.mixer for layer in backbone.layers]

    def _keep(self, layer: int) -> Callable[[Tensor, Tensor], None]:
        def keep(B: Tensor, C: Tensor) -> None:
            if self._seen is not None:
                self._seen[layer] = Projections(B, C)

        return keep

    def _in_proj_hook(self, layer: int, mixer: Mamba2Mixer) -> Callable[[nn.Module, Any, Tensor], None]:
        keep, width, inner = self._keep(layer), 2 * self.d_state, mixer.intermediate_size

        def read(module: nn.Module, inputs: Any, projected: Tensor) -> None:
            if not self._reading:
                return
            before = projected[..., 2 * inner : 2 * inner + width].transpose(1, 2)  # behind the gate and x
            weight, bias = mixer.conv1d.weight[inner:].squeeze(1), mixer.conv1d.bias
            bias = None if bias is None else bias[inner:]
            B, C = causal_conv1d_fn(before, weight, bias, mixer.activation).transpose(1, 2).chunk(2, dim=-1)
            keep(B, C)

        return read
