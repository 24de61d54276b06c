"""A frozen Hugging Face decoder as teacher: its last hidden states, and Q and K of each layer as it computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cab.logits import logits_of
from cab.placement import entrance, stays
from cab.teachers.attention_calls import ScaledDotProductCalls, WrittenOutCalls
from cab.teachers.teacher import AttentionSink, LayerSink, Tap, Teacher

_IMPLEMENTATION = "cab_tapped_sdpa"
_SINK: ContextVar[AttentionSink | None] = ContextVar("_SINK", default=None)


class HuggingFaceTeacher(Teacher):
    """A decoder of transformers, frozen, that hands Q and K of each attention layer to a callback.

    Q and K are those of the scores: after rotary embedding and q/k norm, K with the heads that it has (fewer than Q's
    under grouped-query attention). They are read in transformers' own attention interface, else where
    ``scaled_dot_product_attention`` is called, else where the product Q K^T is written out. Which of the three it is,
    is settled once, by a forward pass on a few tokens that must show every layer and leave the logits as they were.
    The scale of Q is the family's: OPT, for one, divides it by sqrt(head_dim) before this point, others after.

    A quantised model, and one that ``device_map`` has spread over devices, stays where it is and as it is when the task
    moves or changes its dtype: tokens go to it, and what it gives comes back to where they were.

    Args:
        model: a causal language model of transformers, on any device or several, quantised or not.

    Attributes:
        max_length: the longest sequence that it takes, None where it states none.
        vocab_size: logits of a token.
        packs: whether packed documents are kept apart by their positions, settled by such a pass too.

    Raises:
        ValueError: Q and K, or the logits, of the model cannot be read, or it is no causal language model; the message
            names the model and the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        super().__init__(model, config.name_or_path or type(model).__name__)
        self.stays = stays(model)
        text = config.get_text_config()
        if not getattr(text, "num_attention_heads", None):
            raise self._refusal("it has no attention heads")
        self._check_causal()
        self.num_layers = text.num_hidden_layers
        self.max_length: int | None = getattr(text, "max_position_embeddings", None)
        self._heads = text.num_attention_heads
        self._repeats = self._heads // (getattr(text, "num_key_value_heads", None) or self._heads)
        shapes = self._settle_tap()
        self.vocab_size = self._check_logits()
        self.packs = self._probe_packing()
        query, key = shapes[0]
        self.query_width, self.key_width = query[1] * query[3], key[1] * key[3]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        on_layer: LayerSink | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states of tokens; :meth:`logits` makes logits of them, of as many at a time as fit.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens), 0 where a token is padding; None where there is none.
            on_layer: called for each layer, in order, with its index, Q (batch, heads, tokens, head_dim) and K
                (batch, key heads, tokens, head_dim). It runs with the caller's gradient mode.
            position_ids: (batch, tokens), of packed documents, which do not see one another; see
                :func:`cab.packing.document_starts`. There is no padding then.

        Returns:
            (batch, tokens, width).

        Raises:
            ValueError: more tokens than the model has positions; packed documents with padding, or for a model that
                does not keep them apart.
        """
        if position_ids is not None and (not self.packs or attention_mask is not None):
            got = "both" if self.packs else f"{self.name}, which crosses them"
            raise ValueError(
                f"HuggingFaceTeacher: expected packed documents that are kept apart, without padding, got {got}"
            )
        if self.max_length is not None and input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"HuggingFaceTeacher: {self.name} expected at most {self.max_length} tokens, got {input_ids.shape[1]}"
            )
        decoder: Any = self.model.base_model
        options: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
        if position_ids is not None:  # which not every family takes
            options["position_ids"] = position_ids
        home, there = input_ids.device, entrance(self.model)
        options = {name: value.to(there) if isinstance(value, Tensor) else value for name, value in options.items()}

        def bring(layer: int, query: Tensor, key: Tensor) -> None:
            if on_layer is not None:
                on_layer(layer, query.to(home), key.to(home))

        hidden = self._stream(
            lambda: decoder(input_ids.to(there), **options).last_hidden_state, None if on_layer is None else bring
        )
        return hidden.to(home)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of last hidden states (..., width)."""
        return logits_of(self.model, hidden.to(entrance(self.model))).to(hidden.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HuggingFaceTeacher:
        return self if self.stays else super()._apply(fn, recurse)

    def _check_causal(self) -> None:
        """Refuse a model without a head, and one whose logits follow what comes behind them."""
        model: Any = self.model
        kind = type(model).__name__
        if model.get_output_embeddings() is None:
            raise self._refusal(f"expected a causal language model, got {kind}, which has no head for logits")
        ids, _ = self._probe_batch()
        other = torch.cat((ids[:, :3], ids.flip(0)[:, 3:]), dim=1)
        with torch.no_grad():
            before, after = (model(tokens, use_cache=False).logits for tokens in (ids, other))
        # Rounding may follow it too, by a few per cent: LLM.int8 leaves a column out of its products in 8 bits, for all
        # tokens, if it is large in one. Where tokens see those behind them, their logits change as much as the others'.
        change = (before.float() - after.float()).abs()
        if not _close(before[:, :3], after[:, :3]) and change[:, :3].max() > change[:, 3:].max() / 10:
            raise self._refusal(f"expected a causal language model, got {kind}, whose tokens see those behind them")

    def _settle_tap(self) -> list[tuple[torch.Size, torch.Size]]:
        """Take the first tap that shows all layers and changes nothing, and return the shapes of Q and K."""
        model: Any = self.model
        untapped = self._probe_logits()
        own = model.config._attn_implementation
        seen = 0
        for tap, implementation in self._taps():
            try:
                model.set_attn_implementation(implementation or own)
            except ValueError:  # the family does not have this implementation
                continue
            logits, shapes = self._probe(tap)
            complete = len(shapes) == self.num_layers and all(len(query) == 4 for query, _ in shapes)
            if complete and _close(logits, untapped):
                if len(set(shapes)) > 1:
                    raise self._refusal("its layers have Q and K of different sizes")
                self._tap = tap
                return shapes
            seen = max(seen, len(shapes))
        model.set_attn_implementation(own)
        raise self._refusal(f"expected Q and K of {self.num_layers} layers, got {seen}")

    def _probe(self, tap: Tap) -> tuple[Tensor, list[tuple[torch.Size, torch.Size]]]:
        shapes: list[tuple[torch.Size, torch.Size]] = []
        with tap(self.model, lambda query, key: shapes.append((query.shape, key.shape))):
            return self._probe_logits(), shapes

    def _taps(self) -> Iterator[tuple[Tap, str | None]]:
        """Each tap with the attention implementation that it needs, None for the model's own."""
        model: Any = self.model
        if model._can_set_attn_implementation() and not getattr(model.config, "attn_logit_softcapping", None):
            yield _interface_tap, _IMPLEMENTATION
        yield lambda model, show: ScaledDotProductCalls(self._unrepeated(show)), None
        yield lambda model, show: WrittenOutCalls(self._unrepeated(show), self._heads), "eager"

    def _unrepeated(self, show: AttentionSink) -> AttentionSink:
        """``show`` for places where a head of K may come as often as heads of Q share it."""

        def narrow(query: Tensor, key: Tensor) -> None:
            show(query, key[:, :: self._repeats] if key.shape[1] == self._heads else key)

        return narrow

    def _probe_logits(self) -> Tensor:
        """Logits of two short sequences, of which one has padding, where it is not padding."""
        ids, mask = self._probe_batch()
        model: Any = self.model
        with torch.no_grad():
            return model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]

    def _check_logits(self) -> int:
        ids, mask = self._probe_batch()
        logits, own = self.logits(self(ids, mask))[mask.bool()], self._probe_logits()
        if not _close(logits, own):
            raise self._refusal("its logits are not its last hidden states times its output embeddings")
        return own.shape[-1]

    def _probe_packing(self) -> bool:
        """Whether two short sequences, packed into one, have the logits that they have by themselves."""
        ids, _ = self._probe_batch()
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids))
        model: Any = self.model
        with torch.no_grad():
            try:
                packed = model(ids.view(1, -1), position_ids=positions.unsqueeze(0), use_cache=False).logits
            except (TypeError, ValueError):  # the family takes no positions
                return False
            return _close(packed.view(*ids.shape, -1), model(ids, use_cache=False).logits)

    def _probe_batch(self) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        ids = torch.arange(2 * 7, device=entrance(self.model)).view(2, 7) % model.config.get_text_config().vocab_size
        mask = torch.ones_like(ids)
        mask[1, :2] = 0
        return ids, mask


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether logits agree within what another order of summation may change in their dtype."""
    tolerance = 1e-3 if torch.finfo(b.dtype).eps < 1e-4 else 5e-2
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())


def _tapped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    show = _SINK.get()
    if show is not None and query.shape[-2] == key.shape[-2]:
        show(query, key)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


# With no mask function of its name an implementation gets no mask at all, and padding is silently attended to.
AttentionInterface.register(_IMPLEMENTATION, _tapped_sdpa)
AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)


@contextmanager
def _interface_tap(model: nn.Module, show: AttentionSink) -> Iterator[None]:
    token = _SINK.set(show)
    try:
        yield
    finally:
        _SINK.reset(token)
