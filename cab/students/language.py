"""Mamba language models as distillation students: B and C of every Mamba layer, with their gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cab.logits import logits_of
from cab.packing import document_bounds
from cab.placement import entrance, stays
from cab.students.mamba import A_LOG_OF_ZERO
from cab.students.student import Projections, TokenStudent
from cab.students.transformers_mamba import use_cab_kernels
from cab_kernels import causal_conv1d_fn

_FAMILIES = ("mamba", "falcon_mamba", "mamba2", "bamba", "discrete_mamba2")


class PlainLanguageModel(TokenStudent):
    """Any causal language model of transformers, to be trained or measured on text alone: it yields no B and C.

    One that is quantised or spread over devices is measured where it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stays = stays(model)
        config: Any = model.config
        self.num_layers = config.get_text_config().num_hidden_layers
        self.vocab_size = config.get_text_config().vocab_size

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """The last hidden states (batch, tokens, width) of tokens (batch, tokens)."""
        backbone: Any = self.model.base_model
        home, there = input_ids.device, entrance(self.model)
        options = {"attention_mask": None if attention_mask is None else attention_mask.to(there), "use_cache": False}
        if position_ids is not None:  # which not every family takes
            options["position_ids"] = position_ids.to(there)
        return backbone(input_ids.to(there), **options).last_hidden_state.to(home)

    def logits(self, hidden: Tensor) -> Tensor:
        return logits_of(self.model, hidden.to(entrance(self.model))).to(hidden.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PlainLanguageModel:
        return self if self.stays else super()._apply(fn, recurse)

    def no_weight_decay(self) -> set[str]:
        return set()


class LanguageStudent(PlainLanguageModel):
    """A language model with Mamba or Mamba-2 blocks that yields B and C of each of them.

    ``MambaForCausalLM`` and ``FalconMambaForCausalLM`` are put on ``cab_kernels``, whose mixers show their B and C.
    ``Mamba2ForCausalLM`` computes as it always does, and so does ``BambaForCausalLM``, which joins Mamba-2 with
    attention. Where mamba_ssm is installed, one fused call of theirs keeps B and C to itself, so they are computed a
    second time from the output of ``in_proj``: the convolution of their channels. ``DiscreteMamba2ForCausalLM`` shows
    its B and C itself. The state of these three does not start again within a sequence: they refuse packed documents.

    A block of a hybrid that keeps attention has K and Q already, and yields no B and C.

    Args:
        model: the language model, changed in place; it is saved, loaded and generates as before.

    Attributes:
        model: the same.
        num_layers: blocks.
        d_state: width of B and C; for Mamba-2 that of all groups together.

    Raises:
        ValueError: the model is of another family, or keeps attention in all blocks: it has no B and C, or none that
            can be read.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        family = getattr(config, "model_type", None)
        if family not in _FAMILIES:
            raise ValueError(
                f"LanguageStudent: expected a model with B and C, of model_type {', '.join(_FAMILIES)}, "
                f"got {type(model).__name__} of model_type {family!r}"
            )
        super().__init__(model)
        mixers = self._mixers()
        if not mixers:
            raise ValueError(
                f"LanguageStudent: expected a block with B and C, got {type(model).__name__} with attention in all of "
                f"its {self.num_layers} blocks"
            )
        self._packs = family in ("mamba", "falcon_mamba")
        if self._packs:
            use_cab_kernels(model)
        self._reading = False
        self._seen: dict[int, Projections] | None = None
        for layer, mixer in mixers.items():
            self.d_state = mixer.ssm_state_size * getattr(mixer, "n_groups", 1)
            if hasattr(mixer, "on_projections"):
                mixer.on_projections = self._keep(layer)
            else:
                mixer.in_proj.register_forward_hook(self._in_proj_hook(layer, mixer))

    @property
    def mamba_layers(self) -> int:
        return len(self._mixers())

    @property
    def last_mamba(self) -> int:
        return max(self._mixers())

    def start_at_linear_attention(self) -> None:
        """Set A ~ 0: the decay of a step rounds to 1, and the scan starts as linear attention (arXiv:2510.19266)."""
        for mixer in self._mixers().values():
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
        rows = {i: Projections(*(side.view(*input_ids.shape, -1) for side in layer)) for i, layer in seen.items()}
        return hidden, [(rows[i],) if i in rows else () for i in range(self.num_layers)]

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """The last hidden states; packed documents run as one sequence of all rows."""
        if position_ids is None:
            return super().forward(input_ids, attention_mask)
        if not self._packs or attention_mask is not None:
            got = "both" if self._packs else type(self.model).__name__
            raise ValueError(f"LanguageStudent: expected Mamba blocks and no padding with packed documents, got {got}")
        hidden = super().forward(input_ids.reshape(1, -1), document_bounds(position_ids))
        return hidden.view(*input_ids.shape, -1)

    def _mixers(self) -> dict[int, Any]:
        """The mixer of each Mamba block, by the block's place among all."""
        backbone: Any = self.model.base_model
        mixers = (getattr(layer, "mixer", None) or getattr(layer, "mamba", None) for layer in backbone.layers)
        return {place: mixer for place, mixer in enumerate(mixers) if mixer is not None}

    def _keep(self, layer: int) -> Callable[[Tensor, Tensor], None]:
        def keep(B: Tensor, C: Tensor) -> None:
            if self._seen is not None:
                self._seen[layer] = Projections(B, C)

        return keep

    def _in_proj_hook(self, layer: int, mixer: Any) -> Callable[[nn.Module, Any, Tensor], None]:
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


def attention_blocks(text: str, depth: int) -> list[int]:
    """The blocks of a hybrid that keep attention.

    Args:
        text: "every-K", the last block of each K; or their numbers from 0, "3,7,11".
        depth: blocks in all.

    Raises:
        ValueError: the text is none of these, or leaves no attention or no Mamba block.
    """
    prefix, _, every = text.partition("every-")
    if not prefix and every.isdecimal() and int(every) > 0:
        blocks = list(range(int(every) - 1, depth, int(every)))
    else:
        blocks = [int(part) if part.strip().isdecimal() else depth for part in text.split(",")]
    if not 0 < len(set(blocks)) < depth or max(blocks) >= depth:
        raise ValueError(
            f"attention_blocks: expected every-K or some of the blocks from 0 to {depth - 1}, such as 3,7,11, that "
            f"leave at least one of each kind, got {text!r}"
        )
    return sorted(set(blocks))
