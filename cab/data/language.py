"""Sequences of tokens for a language model: text, tokenised, held out in part, and cut to a length."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from cab.config import TextConfig, UserError
from cab.data.encoded import Encoded, encoded
from cab.data.tokens import Tokens, tokenizer

IGNORED = -100  # the label of what is not learnt


class Row(TypedDict, total=False):
    """One sequence: its tokens, the labels of a language model (-100 does not count), and what its data set adds.

    That is 0 where a token is padding, or of each token its position in its document.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor


class TextSplits(NamedTuple):
    """The data of a run.

    Attributes:
        train: what is learnt.
        test: windows over the text that was held out.
        tokens: the tokenizer.
        train_tokens, test_tokens: how many.
    """

    train: Concatenated | Isolated | Padded
    test: Windows
    tokens: Tokens
    train_tokens: int
    test_tokens: int


def load(config: TextConfig, teacher: str | None = None) -> TextSplits:
    """The splits that the configuration describes.

    Which documents are held out for the test, and where the tokens lie, :func:`cab.data.encoded.encoded` says.

    Args:
        config: of the data.
        teacher: the model whose tokenizer is meant by "teacher".

    Raises:
        UserError: no such file or tokenizer, no text, or less of it than a sequence.
    """
    tokens = tokenizer(config, teacher)
    train, test = encoded(config, tokens)
    test_stream = test.stream[: config.test_tokens]
    for name, count in (("test", len(test_stream)), ("training", len(train.stream))):
        if count < config.length:
            raise UserError(f"expected {name} text of at least data.length={config.length} tokens, got {count}")
    rows, windows = _PACKINGS[config.packing](train, config.length), Windows(test_stream, config.length)
    return TextSplits(rows, windows, tokens, len(train.stream), len(test_stream))


class Concatenated(Dataset[Row]):
    """Documents end to end, cut into sequences of one length; a shorter rest is dropped."""

    def __init__(self, documents: Encoded, length: int) -> None:
        self.stream = documents.stream
        self.length = length

    def __len__(self) -> int:
        return len(self.stream) // self.length

    def __getitem__(self, index: int) -> Row:
        ids = self.stream[index * self.length :][: self.length].long()
        return {"input_ids": ids, "labels": ids}


class Isolated(Concatenated):
    """The same sequences, of which each token knows its position in its document.

    Positions start again with each document and with each sequence: the rest of a document that was cut begins anew.
    The first token of either is not predicted.
    """

    def __init__(self, documents: Encoded, length: int) -> None:
        super().__init__(documents, length)
        self.bounds = documents.bounds

    def __getitem__(self, index: int) -> Row:
        ids = super().__getitem__(index)["input_ids"]
        first = index * self.length
        at = torch.arange(first, first + self.length)
        document = torch.searchsorted(self.bounds, at, right=True) - 1
        positions = at - self.bounds[document].clamp(min=first)
        return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, IGNORED), "position_ids": positions}


class Padded(Dataset[Row]):
    """Documents cut into sequences of one length; what is shorter is filled up with padding on its right."""

    def __init__(self, documents: Encoded, length: int) -> None:
        self.documents = documents
        self.length = length
        # A single token predicts nothing.
        of_documents = (documents.bounds.diff() + length - 2) // length
        self.rows = F.pad(of_documents.cumsum(0), (1, 0))

    def __len__(self) -> int:
        return int(self.rows[-1])

    def __getitem__(self, index: int) -> Row:
        bounds = self.documents.bounds
        document = int(torch.searchsorted(self.rows, index, right=True)) - 1
        start = int(bounds[document] + (index - self.rows[document]) * self.length)
        size = min(self.length, int(bounds[document + 1]) - start)
        ids = torch.zeros(self.length, dtype=torch.int64)
        ids[:size] = self.documents.stream[start : start + size]
        mask = torch.arange(self.length) < size
        return {"input_ids": ids, "labels": ids.masked_fill(~mask, IGNORED), "attention_mask": mask.long()}


_PACKINGS: dict[str, Callable[[Encoded, int], Concatenated | Isolated | Padded]] = {
    "concatenated": Concatenated,
    "isolated": Isolated,
    "padded": Padded,
}


class Windows(Dataset[Row]):
    """Windows of ``length`` tokens that move on by half of it, over a whole stream.

    Each token is predicted once, in the first window that holds it: with at least half a window of context, but for
    those of the first half. They are the same whatever the packing, so that perplexities compare.
    """

    def __init__(self, stream: Tensor, length: int) -> None:
        self.stream = stream
        self.length = length
        self.stride = length // 2

    def __len__(self) -> int:
        return (len(self.stream) - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> Row:
        ids = self.stream[index * self.stride :][: self.length].long()
        labels = ids.clone()
        if index:
            labels[: self.length - self.stride] = IGNORED
        return {"input_ids": ids, "labels": labels}
