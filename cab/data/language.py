"""Sequences of tokens for a language model: text, tokenised, held out in part, and cut to a length."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cab.config import TextConfig, UserError
from cab.data.documents import documents

IGNORED = -100  # the label of what is not learnt


class Tokens(Protocol):
    """What is asked of a tokenizer.

    Attributes:
        size: number of tokens.
        end: the token that ends a document.
    """

    size: int
    end: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any that stand for its beginning or end."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ByteTokens:
    """The bytes of UTF-8, and one token more for the end of a document."""

    size = 257
    end = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < self.end).decode(errors="replace")


class HuggingFaceTokens:
    """A tokenizer of transformers.

    Raises:
        UserError: no such tokenizer, or one without a token for the end of a document.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"expected a tokenizer by name or path, got {name!r}: {reason}") from None
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"expected a tokenizer with a token for the end of a text, got {name!r} without")
        self.size: int = len(self.tokenizer)
        self.end: int = self.tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)


class Row(TypedDict, total=False):
    """One sequence: its tokens, the labels of a language model (-100 does not count), and 0 where it is padding."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor


class TextSplits(NamedTuple):
    """The data of a run.

    Attributes:
        train: what is learnt.
        test: windows over the text that was held out.
        tokens: the tokenizer.
        train_tokens, test_tokens: how many.
    """

    train: Packed | Kept
    test: Windows
    tokens: Tokens
    train_tokens: int
    test_tokens: int


def load(config: TextConfig, teacher: str | None = None) -> TextSplits:
    """The splits that the configuration describes.

    Whole documents are held out for the test; of a single document the end.

    Args:
        config: of the data.
        teacher: the model whose tokenizer is meant by "teacher".

    Raises:
        UserError: no such file or tokenizer, no text, or less of it than a sequence.
    """
    tokens = tokenizer(config, teacher)
    encoded = [tokens.encode(text) + [tokens.end] for text in documents(config)]
    test, train = _held_out(encoded, config)
    test_stream = _stream(test)[: config.test_tokens]
    for name, count in (("test", len(test_stream)), ("training", sum(map(len, train)))):
        if count < config.length:
            raise UserError(f"expected {name} text of at least data.length={config.length} tokens, got {count}")
    rows = Packed(_stream(train), config.length) if config.boundaries == "crossed" else Kept(train, config.length)
    return TextSplits(rows, Windows(test_stream, config.length), tokens, sum(map(len, train)), len(test_stream))


def tokenizer(config: TextConfig, teacher: str | None = None) -> Tokens:
    """The tokenizer that the configuration names."""
    if config.tokenizer == "bytes":
        return ByteTokens()
    return HuggingFaceTokens(teacher or "" if config.tokenizer == "teacher" else config.tokenizer)


class Packed(Dataset[Row]):
    """A stream of tokens cut into sequences of one length; a shorter rest is dropped."""

    def __init__(self, stream: Tensor, length: int) -> None:
        self.stream = stream
        self.length = length

    def __len__(self) -> int:
        return len(self.stream) // self.length

    def __getitem__(self, index: int) -> Row:
        ids = self.stream[index * self.length :][: self.length].long()
        return {"input_ids": ids, "labels": ids}


class Kept(Dataset[Row]):
    """Documents cut into sequences of one length; what is shorter is filled up with padding on its right.

    Nothing that a model carries along, state or attention, then passes from one document to the next.
    """

    def __init__(self, documents: Sequence[Sequence[int]], length: int) -> None:
        self.stream = _stream(documents)
        self.length = length
        self.spans: list[tuple[int, int]] = []
        start = 0
        for document in documents:
            end = start + len(document)
            # A single token predicts nothing.
            self.spans += [(at, min(at + length, end)) for at in range(start, end - 1, length)]
            start = end

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Row:
        start, end = self.spans[index]
        ids = torch.zeros(self.length, dtype=torch.int64)
        ids[: end - start] = self.stream[start:end]
        mask = torch.arange(self.length) < end - start
        return {"input_ids": ids, "labels": ids.masked_fill(~mask, IGNORED), "attention_mask": mask.long()}


class Windows(Dataset[Row]):
    """Windows of ``length`` tokens that move on by half of it, over a whole stream.

    Each token is predicted once, in the first window that holds it: with at least half a window of context, but for
    those of the first half.
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


def _held_out(encoded: list[list[int]], config: TextConfig) -> tuple[list[list[int]], list[list[int]]]:
    """Documents for the test and for training."""
    if len(encoded) == 1:
        cut = max(round(len(encoded[0]) * (1 - config.held_out)), 1)
        return [encoded[0][cut:]], [encoded[0][:cut]]
    count = max(round(len(encoded) * config.held_out), 1)
    test = set(random.Random(config.seed).sample(range(len(encoded)), count)) if encoded else set()
    return (
        [document for index, document in enumerate(encoded) if index in test],
        [document for index, document in enumerate(encoded) if index not in test],
    )


def _stream(documents: Iterable[Sequence[int]]) -> Tensor:
    return torch.tensor([token for document in documents for token in document], dtype=torch.int32)
