"""What distillation asks of a student."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from cab.token_map import TokenLayout


class Projections(NamedTuple):
    """B and C of one direction of one layer, (batch, length, d_state) each, in the tokens' own order."""

    B: Tensor
    C: Tensor


class Student(nn.Module):
    """A Mamba model whose forward pass yields B and C of every layer beside its output.

    Attributes:
        num_layers: blocks.
        directions: scan directions of a Mamba block, 1 or 2.
        d_state: width of B and C.
    """

    num_layers: int
    directions: int
    d_state: int

    @property
    def mamba_layers(self) -> int:
        """Mamba blocks: all of them, unless the student keeps attention in some."""
        return self.num_layers

    @property
    def last_mamba(self) -> int:
        """The place of the last Mamba block among all."""
        return self.num_layers - 1

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay would spoil, A above all: decay undoes A ~ 0."""
        raise NotImplementedError


class ImageStudent(Student):
    """A student that classifies images.

    Attributes:
        token_layout: where the tokens stand in the sequence.
    """

    token_layout: TokenLayout

    def forward_with_projections(self, images: Tensor) -> tuple[Tensor, list[tuple[Projections, ...]]]:
        """Logits, and B and C of every layer: a tuple a layer, with one :class:`Projections` a direction."""
        raise NotImplementedError


class TokenStudent(Student):
    """A student that predicts the next token.

    Attributes:
        vocab_size: logits of a token.
    """

    directions = 1
    vocab_size: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of last hidden states (..., width)."""
        raise NotImplementedError

    def forward_with_projections(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Projections, ...]]]:
        """The last hidden states (batch, tokens, width), and B and C of every layer: a tuple of one a layer.

        The tuple of a layer that keeps attention is empty.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens), 0 where a token is padding; None where there is none.
            position_ids: (batch, tokens), of packed documents, which do not see one another; see
                :func:`cab.packing.document_starts`. There is no padding then.
        """
        raise NotImplementedError
