"""A frozen timm ViT as teacher: its logits, and Q and K of each layer, handed over as the layer computes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import timm.data
import timm.layers
import torch
from torch import Tensor, nn

from cab.images import input_size, resized
from cab.patches import patches_as_products
from cab.teachers.attention_calls import ScaledDotProductCalls
from cab.teachers.frozen import FrozenLayerNorm, FrozenLinear
from cab.teachers.teacher import AttentionSink, LayerSink, Teacher
from cab.token_map import TokenLayout


class TimmTeacher(Teacher):
    """A timm Vision Transformer, frozen, that hands Q and K of each attention layer to a callback.

    Q and K are taken where ``scaled_dot_product_attention`` is called: after normalisation and rotary embedding, before
    the scale. A model that computes its attention otherwise is read at its packed ``qkv`` projections.

    Args:
        model: a timm model with ``blocks`` whose attention runs over all tokens in one order.

    Attributes:
        token_layout: where the class token and the patches stand in the sequence.
        input_size: (channels, height, width) of its images.
        mean, std: the statistics with which the model wants its images normalised, (channels, 1, 1).

    Raises:
        ValueError: Q and K of the model cannot be read; the message names the model and the reason.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, _name(model))
        data = timm.data.resolve_data_config(model=model)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(-1, 1, 1), persistent=False)
        self.input_size = input_size(model)
        self.num_layers = len(_blocks(model))
        if not self.num_layers:
            raise self._refusal("it has no list of 'blocks'")
        _run_faster(model)
        self._tap = _sdpa_tap
        shapes = self._probe()
        if not shapes:
            self._tap = _packed_qkv_tap
            shapes = self._probe()
        self._check(shapes)
        heads, tokens, head_dim = shapes[0][0][1:]
        self.query_width = heads * head_dim
        self.key_width = shapes[0][1][1] * shapes[0][1][3]
        self.token_layout = self._layout(tokens)

    def forward(self, images: Tensor, on_layer: LayerSink | None = None) -> Tensor:
        """Logits of images.

        Args:
            images: (batch, channels, height, width), values in [0, 1]; resized here to the model's height and width
                where theirs differ, and normalised as the model wants them.
            on_layer: called for each layer, in order, with its index, Q and K (batch, heads, tokens, head_dim). With
                grouped-query attention K may have fewer heads. It runs with the caller's gradient mode.

        Returns:
            (batch, classes).

        Raises:
            ValueError: images of other channels than the model's.
        """
        channels, height, width = self.input_size
        if images.shape[1] != channels:
            raise ValueError(f"TimmTeacher: {self.name} expected images of {channels} channels, got {images.shape[1]}")
        images = (resized(images, (height, width)) - self.mean) / self.std
        return self._stream(lambda: self.model(images), on_layer)

    def _probe(self) -> list[tuple[torch.Size, torch.Size]]:
        """The shapes of Q and K that the tap reads from a forward pass on two blank images."""
        parameter = next(self.model.parameters())
        shapes: list[tuple[torch.Size, torch.Size]] = []
        with torch.no_grad(), self._tap(self.model, lambda query, key: shapes.append((query.shape, key.shape))):
            self.model(torch.zeros(2, *self.input_size, dtype=parameter.dtype, device=parameter.device))
        return shapes

    def _check(self, shapes: list[tuple[torch.Size, torch.Size]]) -> None:
        if len(shapes) != self.num_layers:
            raise self._refusal(f"expected Q and K of {self.num_layers} layers, got {len(shapes)}")
        if any(query[0] != 2 or query != shapes[0][0] or key != shapes[0][1] for query, key in shapes):
            raise self._refusal("its attention does not run over all tokens in one order (windows, or a changing grid)")

    def _layout(self, tokens: int) -> TokenLayout:
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        if grid is None or grid[0] * grid[1] + prefix != tokens:
            raise self._refusal(
                f"expected {prefix} prefix tokens and the patches of the grid {grid}, got {tokens} tokens"
            )
        cls = 0 if getattr(self.model, "cls_token", None) is not None and prefix else None
        return TokenLayout(tuple(grid), cls=cls, patches=tuple(range(prefix, tokens)))


def _blocks(model: Any) -> list[nn.Module]:
    return list(getattr(model, "blocks", ()))


def _run_faster(model: nn.Module) -> None:
    """Let a frozen model's layers compute the same by other means, in place."""
    patches_as_products(model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        norm = type(module) in (nn.LayerNorm, timm.layers.LayerNorm)
        if norm and module.weight is not None and len(module.normalized_shape) == 1:
            module.__class__ = FrozenLayerNorm
        elif type(module) is nn.Linear:
            module.__class__ = FrozenLinear
        if hasattr(module, "fused_attn"):
            module.fused_attn = True  # through scaled_dot_product_attention


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _sdpa_tap(model: nn.Module, show: AttentionSink) -> AbstractContextManager[object]:
    return ScaledDotProductCalls(show)


@contextmanager
def _packed_qkv_tap(model: nn.Module, show: AttentionSink) -> Iterator[None]:
    """Reads each block's packed ``attn.qkv`` projection and applies the attention's own q and k norms."""

    def hook(attention: Any) -> Callable[[nn.Module, Any, Tensor], None]:
        def read(module: nn.Module, inputs: Any, qkv: Tensor) -> None:
            packed = qkv.unflatten(-1, (3, attention.num_heads, -1))  # (batch, tokens, 3, heads, head_dim)
            query, key, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
            show(getattr(attention, "q_norm", nn.Identity())(query), getattr(attention, "k_norm", nn.Identity())(key))

        return read

    attentions: list[Any] = [getattr(block, "attn", None) for block in _blocks(model)]
    handles = [
        attention.qkv.register_forward_hook(hook(attention))
        for attention in attentions
        if isinstance(getattr(attention, "qkv", None), nn.Linear) and hasattr(attention, "num_heads")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
